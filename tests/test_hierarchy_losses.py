"""Controllers as workers of other controllers: what dies, what leaves, and ways that must not be. Brokers with one fake clock."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m
from zmqserve.link import FRESH_SOCKET_S, MOST_REFUSED_S
from zmqserve.uplink import Uplink

from .fakes.hierarchy import Node, Tree
from .fakes.network import card
from .fakes.scripted import ScriptedClient, ScriptedWorker

# --- what dies


@pytest.mark.parametrize(
    ("kind", "head"), [(m.DONE, {"outcome": "stop", "code": 1}), (m.DONE, {"outcome": "failed"}), (m.FAILED, {"outcome": "cancelled"})]
)
def test_a_worker_that_contradicts_itself_does_not_make_its_controller_a_liar(kind: int, head: dict[str, object]) -> None:
    """The parent would give up the whole child, with all that runs on its other workers."""
    tree = Tree()
    top, child = tree.chain(2)
    bad = child.worker("bad", card("bad"), slots=1)
    tree.run()
    client = top.client()
    client.generate(1, "bad")
    tree.run()
    client.cancel(1)
    tree.run()
    done = m.Done(1, 0, ["stop"], m.Usage(1, 1), m.Timings("bad"))
    bad.task(1)._say(kind, m.encode(done if kind == m.DONE else m.Error(1, errors.BackendError.code, "stopped")), **head)
    tree.run()
    assert len(client.ends(1)) == 1
    assert (child.counters["worker violations"], top.counters["worker violations"]) == (0, 0)
    tree.assert_clean()


def test_a_worker_lost_before_its_first_chunk_is_replaced_below() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    one, two = c.worker("one", slots=2), c.worker("two", slots=2)
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    first, second = (one, two) if one.tasks else (two, one)
    first.die()
    tree.run(1.2)
    assert second.task(1).head.attempts == 1
    second.task(1).done()
    tree.run()
    assert [node.ends()[0]["attempts"] for node in (a, b, c)] == [0, 0, 1]
    tree.assert_clean()


@pytest.mark.parametrize("left", [[], ["loading"]])
def test_where_a_child_has_no_other_worker_for_it_a_request_goes_on_at_a_sibling_with_its_attempt_counted(left: list[str]) -> None:
    tree = Tree()
    a = tree.node("a")
    b, c = tree.node("b", a), tree.node("c", a)
    d = tree.node("d", b)
    lost = d.worker("lost")
    for state in left:
        d.worker("later", state=state)
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    other = c.worker("other")
    lost.die()
    tree.run(1.2)
    assert other.task(1).head.attempts == 1
    other.task(1).done()
    tree.run()
    assert isinstance(client.end(1), m.Done)
    assert [[end["outcome"] for end in node.ends()] for node in (d, b, a)] == [["worker_lost"], ["worker_lost"], ["stop"]]
    tree.assert_clean()


def test_a_request_that_no_child_can_take_any_more_waits_in_the_parent() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    lost = c.worker("lost")
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    lost.die()
    tree.run(1.2)
    assert [sum(len(pool.waiting) for pool in node.broker.registry.pools.values()) for node in (a, b, c)] == [1, 0, 0]
    back = c.worker("back")
    tree.run()
    assert back.task(1).head.attempts == 1
    back.task(1).done()
    tree.assert_clean()


def lose_the_worker_beside_a_busy_one(tree: Tree, parent: Node, child: Node) -> tuple[ScriptedClient, ScriptedClient, ScriptedWorker]:
    """The parent's request 1 loses its worker, while the other one below answers the child's own request 2. The two clients, and that
    one."""
    lost = child.worker("lost")
    tree.run()
    client, own = parent.client(), child.client()
    client.generate(1)
    tree.run()
    busy = child.worker("busy")
    own.generate(2)
    tree.run()
    lost.die()
    tree.run(1.2)
    return client, own, busy


def test_a_request_that_lost_its_worker_waits_for_another_one_of_the_same_child() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    _, _, busy = lose_the_worker_beside_a_busy_one(tree, a, b)
    assert [task.rid for task in busy.tasks] == [2]
    busy.task(2).done()
    assert busy.task(1).head.attempts == 1
    busy.task(1).done()
    tree.assert_clean()


def test_a_request_that_waits_for_a_child_whose_other_worker_is_lost_as_well_goes_on_at_a_sibling() -> None:
    tree = Tree()
    a = tree.node("a")
    b = tree.node("b", a, orphan_grace_s=3.0)
    client, own, busy = lose_the_worker_beside_a_busy_one(tree, a, b)
    busy.say(m.BYE)
    sibling = tree.node("c", a).worker("other")
    tree.run(3.2)
    assert sibling.task(1).head.attempts == 1
    sibling.task(1).done()
    tree.run()
    assert isinstance(client.end(1), m.Done)
    assert own.error(2).code == errors.NoWorker.code
    tree.assert_clean()


def test_a_controller_below_whose_workers_all_drain_is_no_other_worker_to_wait_for() -> None:
    tree = Tree()
    a = tree.node("a")
    b = tree.node("b", a)
    d = tree.node("d", b)
    lost = b.worker("lost")
    tree.run()
    client, own = a.client(), d.client()
    client.generate(1)
    tree.run()
    drains = d.worker("drains")
    own.generate(2)
    drains.say(m.DRAINING)
    sibling = tree.node("c", a).worker("other")
    tree.run()
    lost.die()
    tree.run(1.2)
    assert sibling.task(1).head.attempts == 1
    sibling.task(1).done()
    drains.task(2).done()
    tree.assert_clean()


def test_the_last_worker_that_a_request_may_lose_is_lost_also_where_a_child_claims_otherwise() -> None:
    tree = Tree()
    a = tree.node("a", max_attempts=2)
    b = tree.node("b", a, max_attempts=9)
    lost = b.worker("lost")
    tree.run()
    client = a.client()
    client.generate(1, attempts=1)
    tree.run()
    lost.die()
    tree.run(1.2)
    assert (client.error(1).code, client.error(1).data["attempts"]) == (errors.WorkerLost.code, 2)
    tree.assert_clean()


def test_a_worker_lost_after_its_first_chunk_is_told_to_the_client_and_counts_once() -> None:
    tree = Tree()
    a, _, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    worker.task(1).first()
    worker.die()
    tree.run(1.2)
    error = client.error(1)
    assert (error.code, error.retryable, error.data) == (errors.WorkerLost.code, True, {"worker": "w", "attempts": 1, "beside": 0})
    assert next(iter(a.broker.registry)).name == "b"
    tree.assert_clean()


def test_a_request_for_what_has_just_gone_below_finds_another_way() -> None:
    """The parent did not know yet: that is not the request's fault."""
    tree = Tree()
    a = tree.node("a")
    b, c = tree.node("b", a), tree.node("c", a)
    gone = b.worker("w1", card(fingerprint="f1"), slots=8)
    b.worker("w2", card(fingerprint="f2"))
    tree.run()
    client = a.client()
    gone.say(m.BYE)
    client.generate(1, fingerprint="f1")
    tree.pump()
    assert not client.got
    worker = c.worker("w3", card(fingerprint="f1"))
    tree.run()
    worker.task(1).done()
    tree.assert_clean()


def test_attempts_count_over_all_levels() -> None:
    tree = Tree()
    a, _, c = tree.chain(3)
    workers = [c.worker("one"), c.worker("two"), c.worker("three")]
    tree.run()
    client = a.client()
    client.generate(1, attempts=1)
    tree.run()
    next(worker for worker in workers if worker.tasks).die()
    tree.run(1.2)
    error = client.error(1)
    assert (error.code, error.retryable, error.data["attempts"]) == (errors.WorkerLost.code, False, 2)
    tree.assert_clean()


@pytest.mark.parametrize(("clean", "attempts"), [(False, 1), (True, 0)])
def test_a_child_that_dies_is_a_dying_worker_and_one_that_stops_says_bye(clean: bool, attempts: int) -> None:
    tree = Tree()
    a = tree.node("a")
    b, c = tree.node("b", a), tree.node("c", a)
    under = {"b": b.worker("wb", slots=2), "c": c.worker("wc", slots=2)}
    tree.run()
    client = a.client()
    client.generate(1)
    client.generate(2)
    tree.run()
    begun, other = under["b"].tasks[0], under["c"]
    begun.first()
    tree.run()
    client.generate(3)
    client.generate(4)
    tree.run()
    unbegun = next(task.rid for task in under["b"].tasks if task is not begun)
    if clean:
        b.broker.shut_down(tree.now)
    tree.pump()
    tree.kill(b)
    other.task(other.tasks[0].rid).done()
    tree.run(1.5)
    error = client.error(begun.rid)
    assert (error.code, error.retryable, error.data["attempts"]) == (errors.WorkerLost.code, True, attempts)
    assert other.task(unbegun).head.attempts == attempts
    for task in list(other.tasks):
        task.done()
    tree.assert_clean()


def test_a_parent_that_is_lost_takes_its_requests_along_and_nothing_else() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker(slots=3)
    tree.run()
    above, own = a.client(), b.client()
    above.generate(1)
    own.generate(2)
    tree.run()
    tree.wires()[0].cut()
    tree.run()
    assert (worker.task(1).cancelled, worker.task(2).cancelled) == (True, False)
    worker.task(1).done("cancelled")
    worker.task(2).first()
    tree.wires()[0].reconnect()
    tree.run(1.1)
    assert [seen.state for seen in a.broker.registry] == ["ready"]
    again = worker.task(1)
    assert again.head.attempts == 1
    again.done()
    worker.task(2).done()
    tree.run()
    assert len(own.got) == 2
    tree.assert_clean()


def test_a_parent_that_restarts_has_its_children_back() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    worker = b.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    (seen,) = a.broker.registry
    a.broker.members.lose(seen, "it forgot", a.now)
    worker.task(1).first()
    tree.run()
    assert worker.task(1).cancelled
    worker.task(1).done("cancelled")
    tree.run(0.5)
    assert next(iter(a.broker.registry)).epoch != seen.epoch
    worker.task(1).done()
    tree.assert_clean()


def test_a_parent_that_hangs_is_reached_by_a_fresh_connection() -> None:
    tree = Tree()
    tree.chain(2)
    (wire,) = tree.wires()
    before = wire.identity
    tree.dead.add("a")
    tree.run(6.5)
    assert wire.identity != before


def test_a_parent_that_does_not_read_costs_bounded_memory() -> None:
    tree = Tree()
    a = tree.node("a")
    b = tree.node("b", a, outbox_bytes=10_000)
    worker = b.worker(slots=2)
    tree.run()
    above, own = a.client(), b.client()
    above.generate(1)
    own.generate(2)
    tree.run()
    (wire,) = tree.wires()
    task = worker.task(1)
    task.first()
    tree.run()
    wire.stuck = True
    for _ in range(200):
        task.more("x" * 100)
        assert wire.link.outbox_bytes <= 10_000
    assert b.counters["parents that did not read"] == 1
    assert task.cancelled
    task.done("cancelled")
    tree.run(1.5)
    assert wire.seen is not None
    assert above.error(1).code == errors.WorkerLost.code
    worker.task(2).done()
    tree.assert_clean()


def test_an_answer_over_a_limit_above_is_a_typed_error() -> None:
    tree = Tree()
    a = tree.node("a", message_bytes=200)
    b = tree.node("b", a)
    worker = b.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    task = worker.task(1)
    worker.forget(task)
    reply = m.Reply(1, [m.Choice("x" * 300, b"", "stop")], m.Usage(1, 1), m.Timings("w"))
    worker.say(m.DONE, m.encode(reply), client=task.client, rid=1, outcome="stop")
    tree.run()
    assert client.error(1).code == errors.BackendError.code
    tree.assert_clean()


# --- leaving


def test_a_drained_child_leaves_that_parent_only() -> None:
    tree = Tree()
    a, b = tree.node("a"), tree.node("b")
    child = tree.node("c", a)
    child.join(b)
    worker = child.worker(slots=3)
    tree.run()
    client, other = a.client(), b.client()
    client.generate(1)
    tree.run()
    client.send(m.Drain(50, "c"))
    tree.run()
    assert [seen.state for seen in a.broker.registry] == ["draining"]
    other.generate(2)
    tree.run()
    worker.task(1).done()
    tree.run()
    assert not len(a.broker.registry.workers)
    assert [kind for kind in tree.wires()[0].kinds if kind not in (m.LOAD, m.READY)] == [m.DRAINING, m.DONE, m.BYE]
    assert isinstance(client.end(1), m.Done)
    worker.task(2).done()
    tree.run(5.0)
    assert not len(a.broker.registry.workers)
    assert [seen.state for seen in b.broker.registry] == ["ready"]
    tree.assert_clean()


def test_a_drained_child_does_not_come_back_when_its_connection_breaks() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    worker = b.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    client.send(m.Drain(50, "b"))
    tree.run()
    (wire,) = tree.wires()
    wire.cut()
    wire.reconnect()
    tree.run(3.0)
    assert not len(a.broker.registry.workers)
    worker.task(1).done("cancelled")
    tree.run(11.0)
    tree.assert_clean()


def test_what_outlasts_the_grace_of_a_drain_is_moved() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    worker = b.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    worker.task(1).first()
    client.send(m.Drain(50, "b", 1000))
    tree.run(1.2)
    error = client.error(1)
    assert (error.code, error.data["attempts"]) == (errors.WorkerLost.code, 0)
    worker.task(1).done("cancelled")
    tree.assert_clean()


# --- refusals


def test_a_child_that_is_refused_for_what_one_worker_offers_is_back_when_that_one_is_gone() -> None:
    tree = Tree()
    a = tree.node("a", worker_models=2)
    b = tree.node("b", a)
    b.worker("good")
    b.worker("other", card("k"))
    tree.run()
    assert a.broker.registry.known_models() == ["k", "m"]
    bad = b.worker("bad", card("one too many"))
    tree.run(20.0)
    assert not len(a.broker.registry.workers)
    (told,) = b.says("parent refused")
    assert "3 names of models, this controller takes 2" in told["why"]
    bad.say(m.BYE)
    tree.run(FRESH_SOCKET_S[1] + 0.2)
    assert [seen.name for seen in a.broker.registry] == ["b"]
    client = a.client()
    client.generate(1)
    tree.run()
    assert b.workers[b"\0wk00"].tasks
    b.workers[b"\0wk00"].task(1).done()
    tree.assert_clean()


def test_a_child_that_was_never_taken_waits_for_another_offer() -> None:
    tree = Tree()
    a = tree.node("a", worker_models=1)
    b = tree.node("b")
    b.worker("one", card("m"))
    bad = b.worker("two", card("k"))
    wire = b.join(a)
    tree.run(200.0)
    assert (wire.link.state, wire.kinds) == ("refused", [m.READY])
    bad.say(m.BYE)
    tree.run(FRESH_SOCKET_S[1] + 0.2)
    assert [seen.name for seen in a.broker.registry] == ["b"]


def test_a_parent_that_took_a_child_before_is_asked_again_after_a_minute() -> None:
    """What it refused may be allowed by then: keys and rules change."""
    tree = Tree()
    a, b = tree.chain(2)
    b.worker()
    tree.run()
    (wire,) = tree.wires()
    a.broker.members.lose(wire.seen, "refused", a.now)
    wire.down(wire.identity, m.encode(m.ControllerHead(m.REFUSED, 0)), m.encode(m.Refused(errors.Refused.code, "not its key")))
    tree.run(MOST_REFUSED_S - 1)
    assert wire.link.state == "refused"
    tree.run(1 + FRESH_SOCKET_S[1] + 0.2)
    assert wire.link.state == "registered"
    assert [seen.name for seen in a.broker.registry] == ["b"]


# --- loops and double paths


def test_a_controller_below_itself_is_refused_for_good() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    a.join(c)
    tree.run(1.0)
    assert not any("a" in seen.controllers for node in (a, b, c) for seen in node.broker.registry)
    states = {wire.child.name: wire.link.state for wire in tree.wires()}
    assert "refused" in states.values()
    refusals = [report for node in (a, b, c) for report in node.says("parent refused")]
    assert refusals
    assert all(report["level"] == "error" and "a loop of --parent links" in report["why"] for report in refusals)
    tree.run(10.0)
    assert {wire.child.name: wire.link.state for wire in tree.wires()} == states


def test_two_controllers_that_name_each_other_at_once_do_not_both_live() -> None:
    tree = Tree()
    a, b = tree.node("a"), tree.node("b")
    a.join(b)
    b.join(a)
    client, worker = a.client(), b.worker()
    tree.run(0.1)
    below = [sorted(seen.name for seen in node.broker.registry if seen.controllers) for node in (a, b)]
    assert below != [["b"], ["a"]]
    tree.run(5.0)
    assert "refused" in {wire.link.state for wire in tree.wires()}
    own = b.client()
    own.generate(1)
    worker.task(1).done()
    client.generate(2)
    tree.run(11.0)
    for task in list(worker.tasks):
        task.done()
    tree.assert_clean()


def test_a_second_path_to_a_controller_is_refused_until_the_first_is_gone() -> None:
    tree = Tree()
    a = tree.node("a")
    b, c = tree.node("b", a), tree.node("c", a)
    d = tree.node("d", b)
    worker = d.worker()
    tree.run()
    d.join(c)
    tree.run()
    (refused,) = c.says("parent refused for now")
    assert "two paths to controller d: by way of b and by way of c" in refused["why"]
    assert [seen.name for seen in a.broker.registry] == ["b"]
    tree.kill(b)
    tree.run(15.0)
    assert [seen.name for seen in a.broker.registry] == ["c"]
    client = a.client()
    client.generate(1)
    tree.run()
    worker.task(1).done()
    tree.assert_clean()


def test_a_child_may_come_back_before_its_loss_was_noticed() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    b.worker()
    tree.run()
    (wire,) = tree.wires()
    wire.cut()
    wire.reconnect()
    tree.run(1.1)
    assert [(seen.name, seen.identity) for seen in a.broker.registry] == [("b", wire.identity)]


def test_repr_tells_where_it_leads() -> None:
    tree = Tree()
    _, b = tree.chain(2)
    (uplink,) = b.broker.uplinks
    assert isinstance(uplink, Uplink)
    assert repr(uplink).startswith("Uplink('b' to ControllerLink('tcp://a:1', registered")
