"""Workers in the Broker that are lost or drained, and what becomes of their requests."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m

from .fakes.effort import calls
from .fakes.hierarchy import Tree
from .fakes.network import Network, card
from .fakes.scripted import ScriptedClient, ScriptedWorker


@pytest.mark.parametrize(("dies", "attempts"), [(True, 1), (False, 0)])
def test_what_had_not_begun_goes_to_another_worker_first(dies: bool, attempts: int) -> None:
    """A worker that dies may have been killed by what it ran; one that says BYE was not, and costs no attempt."""
    network = Network()
    client = network.client()
    one, two = network.worker("one", slots=4), network.worker("two", slots=4)
    for rid in range(1, 5):
        client.generate(rid)
    lost = [task.rid for task in one.tasks]
    if dies:
        one.die()
        network.advance(1.1)
        for rid in lost:  # what may have killed it is tried one at a time
            two.task(rid).first()
    else:
        one.say(m.BYE)
    assert sorted(task.rid for task in two.tasks) == [1, 2, 3, 4]
    assert [two.task(rid).head.attempts for rid in lost] == [attempts] * len(lost)
    again = network.worker("one", slots=4)
    assert not again.tasks
    for rid in range(1, 5):
        two.task(rid).done()
    network.assert_clean()
    assert not any(isinstance(message, m.Error) for message in client.got)


def test_a_lost_request_never_goes_to_a_worker_that_cannot_do_it() -> None:
    network = Network(orphan_grace_s=5.0)
    client, one = network.client(), network.worker("one", card(verbs=["embed"]))
    client.request(m.Embed(1, "m", texts=["a"]))
    two = network.worker("two", card(verbs=["generate"]))
    one.say(m.BYE)
    assert not two.tasks
    network.beat_for(5.5, two)
    assert client.error(1).code == errors.NoWorker.code
    network.assert_clean()


def test_a_worker_lost_first_is_used_again_when_it_is_the_only_one() -> None:
    network = Network()
    client, worker = network.client(), network.worker("only")
    client.generate(1)
    first = worker.task(1)
    worker.ready()
    assert worker.task(1) is not first
    assert worker.task(1).head.attempts == 0


def test_what_is_lost_unbegun_keeps_its_order_in_the_queue() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=3)
    for rid in range(1, 6):
        client.generate(rid)
    worker.say(m.BYE)
    again = network.worker("again", slots=5)
    assert [task.rid for task in again.tasks] == [1, 2, 3, 4, 5]


def test_what_had_begun_ends_as_worker_lost_to_be_resumed() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).first()
    network.advance(3.5)
    error = client.error(1)
    assert (error.code, error.retryable, error.data) == (errors.WorkerLost.code, True, {"worker": "w", "attempts": 1, "beside": 0})
    network.advance(11.0)
    network.assert_clean()
    assert "m" not in network.broker.registry.pools


@pytest.mark.parametrize("attempts", [0, 1])
def test_a_request_that_has_lost_two_workers_is_not_given_to_a_third(attempts: int) -> None:
    network = Network()
    client = network.client()
    workers = [network.worker(f"w{number}") for number in range(4)]
    client.generate(1, attempts=attempts)
    for _ in range(2 - attempts):
        next(worker for worker in workers if worker.tasks).die()
        for worker in workers:
            worker.load()
        network.beat_for(1.5, *[worker for worker in workers if worker.identity not in network.gone])
    error = client.error(1)
    assert (error.code, error.retryable, error.data["attempts"]) == (errors.WorkerLost.code, False, 2)
    network.assert_clean()
    client.generate(2, attempts=2)
    assert client.error(2).retryable is False


def test_requests_wait_for_a_worker_that_restarts() -> None:
    network = Network(orphan_grace_s=5.0)
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.say(m.BYE)
    network.advance(4.0)
    client.generate(2)
    again = network.worker("again", slots=2)
    network.beat_for(5.0, again)
    assert client.got == []
    for rid in (1, 2):
        again.task(rid).done()
    network.assert_clean()


def test_requests_whose_model_nobody_serves_any_more_end_as_no_worker() -> None:
    network = Network(orphan_grace_s=5.0)
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2)
    worker.say(m.BYE)
    network.advance(5.1)
    assert [client.error(rid).code for rid in (1, 2)] == [errors.NoWorker.code] * 2
    network.assert_clean()
    client.generate(3)
    assert client.error(3).code == errors.NoWorker.code


def test_a_resume_whose_last_equal_worker_goes_ends_although_others_serve_the_model() -> None:
    network = Network(orphan_grace_s=5.0)
    client = network.client()
    one, two = network.worker("one", card(fingerprint="f1")), network.worker("two", card(fingerprint="f2"))
    client.generate(1, fingerprint="f1")
    client.generate(2, fingerprint="f1")
    client.generate(3)
    one.say(m.BYE)
    network.beat_for(5.5, two)
    assert [client.error(rid).code for rid in (1, 2)] == [errors.NoWorker.code] * 2
    two.task(3).done()
    network.assert_clean()
    assert network.broker.registry.pools["m"].orphan_timer is None


def test_what_waits_for_a_restart_ends_when_the_new_worker_cannot_do_it() -> None:
    network = Network(orphan_grace_s=5.0)
    client, worker = network.client(), network.worker()
    worker.say(m.BYE)
    client.request(m.Embed(1, "m", texts=["a"]))
    other = network.worker("other", card(verbs=["generate"]))
    network.beat_for(5.5, other)
    assert client.error(1).code == errors.NoWorker.code
    network.assert_clean()


def one_left() -> tuple[Network, ScriptedClient, ScriptedWorker]:
    """A request to embed, 1, waits in vain: the only worker that could has left, another one generates."""
    network = Network(orphan_grace_s=10.0)
    client = network.client()
    embeds, generates = network.worker("embeds", card(verbs=["embed"])), network.worker("generates", card(verbs=["generate"]))
    client.request(m.Embed(1, "m", texts=["a"]))
    embeds.say(m.BYE)
    return network, client, generates


def test_what_asks_for_different_things_ends_no_slower_than_what_asks_for_the_same() -> None:
    """Where a model has no workers any fingerprint is taken on, and each waits in a queue of its own."""

    def effort(fingerprints: int) -> int:
        network = Network(orphan_grace_s=5.0)
        network.worker().say(m.BYE)
        client = network.client()
        for rid in range(1, 301):
            client.generate(rid, fingerprint=f"f{rid % fingerprints}")
        network.now += 6.0
        needed = calls(network.tick)
        assert [client.error(rid).code for rid in range(1, 301)] == [errors.NoWorker.code] * 300
        network.assert_clean()
        return needed

    assert effort(300) < 2 * effort(1)


def test_each_waits_for_its_own_grace_time() -> None:
    """What has waited in vain for long takes nothing from what loses its worker later."""
    network, client, generates = one_left()
    network.beat_for(9.5, generates)
    client.generate(2)
    generates.say(m.BYE)
    network.check()
    network.advance(1.0)
    assert client.error(1).code == errors.NoWorker.code
    client.generate(3)
    network.check()
    network.advance(8.0)
    again = network.worker("again", card(verbs=["generate"]), slots=2)
    for rid in (2, 3):
        again.task(rid).done()
    network.assert_clean()
    assert network.broker.registry.pools["m"].orphan_timer is None


def test_a_grace_time_that_was_begun_for_one_who_gave_up_is_not_the_next_ones() -> None:
    network, client, generates = one_left()
    client.cancel(1)
    network.beat_for(9.5, generates)
    client.generate(2)
    generates.say(m.BYE)
    network.advance(9.5)
    assert [message.rid for message in client.got] == [1]
    network.advance(1.0)
    assert client.error(2).code == errors.NoWorker.code
    assert not network.broker.registry.pools
    network.assert_clean()


def test_what_comes_back_to_a_model_while_it_is_given_up_is_not_given_up_with_it_unheard() -> None:
    """Who is told that nobody came is gone, and so is a worker that is to cancel more of that one's: it still had another's request."""
    network = Network(orphan_grace_s=10.0)
    client, dies = network.client(), network.client()
    worker = network.worker("w", card("m"), card("k"), slots=2)
    client.generate(1)
    dies.generate(2, "k")
    network.advance(0.5)
    worker.cards = [card("k")]
    worker.ready(worker.epoch)
    dies.generate(3)
    network.beat_for(9.5, worker)
    network.advance(0.2)
    network.gone.update((dies.envelope[0], worker.identity))
    network.advance(0.5)
    assert client.error(1).code == errors.NoWorker.code
    network.assert_clean()


# --- draining


def test_a_draining_worker_finishes_and_gets_nothing_new() -> None:
    network = Network()
    client, one = network.client(), network.worker("one")
    client.generate(1)
    client.send(m.Drain(50, "one", 1500))
    assert client.got[-1] == m.DrainReply(50, "one", 1)
    assert one.got[-1][0].deadline_ms == 1500
    client.generate(2)
    assert one.seen.state == "draining"
    one.task(1).done()
    assert not one.tasks
    one.say(m.BYE)
    two = network.worker("two")
    two.task(2).done()
    network.assert_clean()


def test_a_worker_may_say_itself_that_it_drains() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    worker.say(m.DRAINING)
    worker.say(m.DRAINING)
    client.generate(1)
    assert not worker.tasks
    assert [report["event"] for report in network.reports].count("worker draining") == 1


def test_draining_a_worker_that_is_not_there_names_those_that_are() -> None:
    network = Network()
    client = network.client()
    network.worker("one")
    client.send(m.Drain(50, "two"))
    error = client.error(50)
    assert (error.code, error.data["known"]) == (errors.InvalidParameter.code, ["one"])


def test_draining_a_worker_that_is_gone_gives_it_up() -> None:
    network = Network()
    client, worker = network.client(), network.worker("one")
    worker.die()
    client.send(m.Drain(50, "one"))
    assert client.end(50) == m.DrainReply(50, "one", 0)
    assert not worker.is_registered()


def test_a_worker_that_missed_a_heartbeat_gets_new_work_only_when_there_is_no_other() -> None:
    """It may be dead already, and whoever is sent there now would find out only when its ttl is over."""
    network = Network()
    client = network.client()
    silent, heard = network.worker("silent", slots=8), network.worker("heard", slots=2)
    for _ in range(2):
        network.advance(1.0)
        heard.load()
    client.generate(1)
    client.generate(2)
    assert sorted(task.rid for task in heard.tasks) == [1, 2]
    client.generate(3)
    assert [task.rid for task in silent.tasks] == [3]
    silent.load()
    client.generate(4)
    assert [task.rid for task in silent.tasks] == [3, 4]


def test_a_worker_that_was_silent_before_it_got_a_request_does_not_count_against_it() -> None:
    """It was dead already. With controllers below that share it, one death would count twice and end the request."""
    network = Network()
    client = network.client()
    silent = network.worker("silent", slots=8)
    client.generate(1)
    network.advance(2.0)
    client.generate(2)
    assert sorted(task.rid for task in silent.tasks) == [1, 2]
    network.advance(1.5)
    assert not silent.is_registered()
    other = network.worker("other", slots=8)
    attempts = {task.rid: task.head.attempts for task in other.tasks}
    assert attempts == {1: 1, 2: 0}


def test_hundreds_of_workers_and_clients_that_die_together_take_nobody_with_them() -> None:
    """Each loss finds the next one out: a worker's that a client is gone, a client's that another worker is."""
    many = 300
    network = Network()
    workers = [network.worker(f"w{number}", slots=2) for number in range(many)]
    clients = [network.client() for _ in range(many)]
    for rid in range(2 * many):
        clients[rid % many].generate(rid + 1)
    for worker in workers:
        for task in worker.tasks:
            task.first()
    last = network.worker("last", slots=1)
    survivor = network.client()
    survivor.generate(1)
    network.gone |= {worker.identity for worker in workers} | {client.envelope[0] for client in clients}
    network.broker.members.disconnected(network.now)
    network.check()
    assert [seen.name for seen in network.broker.registry] == ["last"]
    last.task(1).done()
    network.assert_clean()


def test_a_parent_that_is_lost_while_a_request_goes_back_to_it_hides_no_worker_that_is_lost_with_it() -> None:
    """What it asked for is cancelled at once, which finds one more worker gone, with another's request that had not begun."""
    tree = Tree()
    a = tree.node("a")
    b = tree.node("b", a, outbox_bytes=60)
    one = b.worker("one", slots=1)
    tree.run()
    client, own = a.client(), b.client()
    client.generate(1)
    tree.run()
    two = b.worker("two", slots=2)
    tree.run()
    client.generate(2)
    tree.run()
    own.generate(3)
    assert [task.rid for task in two.tasks] == [2, 3]
    (wire,) = tree.wires()
    wire.stuck = True
    two.die()
    (uplink,) = b.broker.uplinks
    uplink.link.post(uplink.link.epoch, b"x" * 50, b"")
    one.task(1).busy()
    b.check()
    assert [seen.name for seen in b.broker.registry] == ["one"]
    one.load(running=0, yours=0)
    assert [task.rid for task in one.tasks] == [3]


def test_a_resume_that_comes_back_from_a_controller_below_waits_for_a_grace_time_only() -> None:
    """Its model has another fingerprint there by now, and nobody else has the one that is needed."""
    network = Network()
    below = network.worker("below", card(fingerprint="x"), controllers=["c"])
    other = network.worker("other", card(fingerprint="z"))
    client = network.client()
    client.generate(1, fingerprint="x")
    below.cards = [card(fingerprint="z")]
    below.ready(below.epoch)
    below.task(1).busy()
    network.check()
    network.beat_for(network.config.orphan_grace_s + 1.0, below, other)
    assert client.error(1).code == 50005
    network.assert_clean()


def test_clients_of_a_worker_that_breaks_the_protocol_learn_nothing_of_each_other() -> None:
    network = Network()
    worker = network.worker(slots=2)
    one, two = network.client(), network.client()
    one.generate(1)
    two.generate(7_654_321)
    worker.task(1).first()
    task = worker.task(7_654_321)
    worker.say(m.FIRST, b"\xc0", client=task.client, rid=task.rid)
    assert one.error(1).message == "worker w was lost (it broke the protocol)"
    (gone,) = [report for report in network.reports if report["event"] == "worker gone"]
    assert "7654321" in gone["why"]


@pytest.mark.parametrize("why", ["silent for 3", "it left", "connection lost"])
def test_clients_are_told_how_a_worker_was_lost(why: str) -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).first()
    if why == "it left":
        worker.say(m.BYE)
    else:
        if why == "connection lost":
            network.gone.add(worker.identity)
        network.advance(10.0)
    assert f"worker w was lost ({why}" in client.error(1).message
