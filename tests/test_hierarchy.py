"""Controllers as workers of other controllers: Brokers wired together with one fake clock, up to three levels deep."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m

from .fakes.hierarchy import Tree, ready
from .fakes.network import Network, card

# --- what is offered


def test_a_child_offers_the_union_of_its_workers_as_one_worker() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    b.worker("w1", card("m", aliases=["x"], verbs=["generate"], resume={"n": "exact"}), slots=2, speed=2.0)
    b.worker("w2", card("m", aliases=["y"], verbs=["embed"], resume={"n": "approximate"}), card("k"), slots=3, speed=0.5)
    tree.run()
    client = a.client()
    client.send(m.Status(1))
    client.send(m.ListModels(2))
    (child,) = client.end(1).status.workers
    assert (child.name, child.backend, child.state, child.controllers) == ("b", "controller", "ready", ["b"])
    assert (child.models, child.slots, child.free, child.speed) == (["k", "m"], 5, 5, 2.5)
    cards = {model.card.name: model.card for model in client.end(2).models}
    assert (cards["m"].aliases, cards["m"].verbs, cards["m"].resume) == (["x", "y"], ["embed", "generate"], {"n": "approximate"})


def test_ids_of_all_controllers_below_are_told_upwards() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    tree.node("d", b)
    tree.run()
    assert [worker.controllers for worker in a.broker.registry] == [["b", "c", "d"]]
    assert ready(c)[0].controllers == ["c"]


def test_what_changes_below_is_told_in_place_while_requests_run() -> None:
    tree = Tree()
    a, _, c = tree.chain(3)
    one = c.worker("one", slots=1)
    tree.run()
    client, epoch = a.client(), next(iter(a.broker.registry)).epoch
    client.generate(1)
    tree.run()
    one.task(1).first()
    c.worker("two", card("other"), slots=4)
    tree.run()
    (child,) = a.broker.registry
    assert (child.epoch, child.slots, sorted(child.cards)) == (epoch, 5, ["m", "other"])
    c.workers[b"\0wk01"].say(m.BYE)
    tree.run()
    assert (child.epoch, child.slots, sorted(child.cards)) == (epoch, 1, ["m"])
    one.task(1).more()
    one.task(1).done()
    tree.run()
    assert [getattr(message, "text", None) for message in client.got] == ["a", "b", None]
    tree.assert_clean()


@pytest.mark.parametrize("state", ["loading", "draining", "stalled", "gone"])
def test_slots_of_workers_that_may_get_nothing_are_not_offered(state: str) -> None:
    tree = Tree()
    a, b = tree.chain(2, stall_s=60.0)
    b.worker("w1", slots=2)
    other = b.worker("w2", slots=3, state="loading" if state == "loading" else "ready")
    if state == "draining":
        other.say(m.DRAINING)
    elif state == "stalled":
        other.load(running=1, yours=0, step_age_ms=61_000)
    elif state == "gone":
        other.say(m.BYE)
    tree.run(0.05)
    assert [(child.slots, child.speed, child.state) for child in a.broker.registry] == [(2, 1.0, "ready")]


def test_a_child_without_a_ready_worker_is_loading() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    worker = b.worker("w", state="loading", slots=0)
    tree.run()
    client = a.client()
    client.generate(1)
    assert client.error(1).code == errors.ModelLoading.code
    worker.ready(worker.epoch, state="ready", slots=1)
    tree.run()
    client.generate(2)
    tree.run()
    worker.task(2).done()
    tree.assert_clean()


def test_an_offer_of_more_names_than_a_parent_takes_is_cut_and_said_once_a_change() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    b.worker("one", card(aliases=[f"x{number:02}" for number in range(60)], features=[f"f{number}" for number in range(60)]))
    b.worker("two", card(aliases=[f"y{number:02}" for number in range(60)], features=[f"g{number}" for number in range(60)]))
    tree.run(1.0)
    (seen,) = a.broker.registry
    offered = seen.cards["m"]
    assert [len(offered.aliases), len(offered.features)] == [m.MAX_LISTED] * 2
    assert set(offered.aliases) >= {f"x{number:02}" for number in range(60)}, "who came later takes nothing away"
    assert sorted(offered.verbs) == sorted(card().verbs)
    b.worker("three")
    tree.run(1.0)
    (told,) = b.says("offer is too large")
    assert (told["level"], told["left_out"], told["parent"]) == ("warning", 40, "tcp://a:1")
    assert set(told["names"]) < {f"{kind}{number}" for kind in "yg" for number in range(60)}


def test_more_models_than_a_parent_takes_of_a_worker_are_left_out_and_aliases_before_them() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    b.worker("one", *(card(f"a{number}", aliases=[f"alias{number}"]) for number in range(400)))
    tree.run()
    assert (len(a.broker.registry.pools), a.broker.registry.names) == (400, 800)
    b.worker("two", *(card(f"b{number}") for number in range(500)))
    tree.run()
    assert (len(a.broker.registry.pools), a.broker.registry.names) == (900, 1000)
    b.worker("three", *(card(f"c{number}") for number in range(500)))
    tree.run()
    offered = {f"{kind}{number}" for kind, most in (("a", 400), ("b", 500), ("c", 100)) for number in range(most)}
    assert set(a.broker.registry.known_models()) == offered
    assert [told["left_out"] for told in b.says("offer is too large")] == [300, 800]
    assert not a.says("worker refused")


def test_models_that_make_an_offer_too_long_are_left_out() -> None:
    tree = Tree()
    a, b = tree.chain(2, ready_bytes=10_000)
    b.worker("one", card("a", source="x" * 6000))
    b.worker("two", card("b", source="x" * 6000), card("c"))
    tree.run()
    assert a.broker.registry.known_models() == ["a", "c"]
    assert [told["names"] for told in b.says("offer is too large")] == [["b"]]
    assert not a.says("worker refused")


def test_a_resume_finds_its_worker_below_where_others_have_another_fingerprint() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    b.worker("near", card(fingerprint="f0"), slots=4)
    workers = [c.worker(f"w{number}", card(fingerprint=f"f{number}"), slots=4) for number in (1, 2, 3)]
    tree.run()
    client = a.client()
    for rid in (1, 2, 3):
        client.generate(rid, fingerprint=f"f{rid}", resume=m.Resume(b"\1\0\0\0", 1, 1))
    client.generate(4, fingerprint="f4")
    tree.run()
    assert [[task.rid for task in worker.tasks] for worker in workers] == [[1], [2], [3]]
    assert client.error(4).code == errors.WorkerLost.code
    for rid, worker in enumerate(workers, 1):
        worker.task(rid).done()
    tree.run()
    tree.assert_clean()


def test_a_burst_of_changes_is_one_announcement() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    tree.run()
    before = len(a.says("worker changed"))
    for number in range(20):
        b.worker(f"w{number}")
    tree.run()
    assert len(a.says("worker changed")) - before == 1
    assert next(iter(a.broker.registry)).slots == 20


def test_changes_that_go_on_are_announced_at_most_every_20_ms() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    tree.run()
    before = len(a.says("worker changed"))
    for number in range(50):
        b.worker(f"w{number}")
        tree.run(0.01)
    assert 20 <= len(a.says("worker changed")) - before <= 26
    tree.run()
    assert next(iter(a.broker.registry)).slots == 50


def test_a_request_whose_worker_stops_to_offer_the_model_is_never_forgotten() -> None:
    network = Network(orphan_grace_s=2.0)
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.cards = [card("k")]
    worker.ready(worker.epoch)
    network.beat_for(5.0, worker)
    assert network.broker.registry.known_models() == ["k", "m"]
    worker.die()
    network.advance(1.5)
    other = network.worker("other")
    other.task(1).done()
    network.advance(3.0)
    network.assert_clean()


# --- requests and answers


def test_an_answer_passes_three_levels_untouched() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    asked = m.Generate(1, "m", prompt="hello", trace="t", deadline_ms=60_000)
    client.request(asked)
    tree.run()
    task = worker.task(1)
    assert task.payload == m.encode(asked)
    task.first("one")
    task.more("two")
    task.done()
    tree.run()
    assert [getattr(message, "text", None) for message in client.got] == ["one", "two", None]
    assert client.end(1) == m.Done(1, 2, ["stop"], m.Usage(1, 2), m.Timings("w"))
    for node in (a, b, c):
        (end,) = node.ends()
        assert (end["outcome"], end["prompt_tokens"], end["completion_tokens"]) == ("stop", 1, 2)
    tree.assert_clean()


@pytest.mark.parametrize(
    "request_",
    [m.Embed(1, "m", texts=["a"]), m.CountTokens(1, "m", prompt="a"), m.ModelDetails(1, "m"), m.Generate(1, "m", messages=[])],
    ids=lambda request: type(request).__name__,
)
def test_every_verb_passes(request_: m.Request) -> None:
    tree = Tree()
    a, _, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    client.request(request_)
    tree.run()
    worker.task(1).done("ok")
    tree.run()
    assert isinstance(client.end(1), m.Done)
    tree.assert_clean()


def test_many_clients_with_equal_rids_are_kept_apart() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker(slots=9)
    tree.run()
    clients = [node.client() for node in (a, b, c) for _ in range(2)]
    for number, client in enumerate(clients):
        client.generate(1, prompt=str(number))
    tree.run()
    assert len({task.client for task in worker.tasks}) == 6
    for task in list(worker.tasks):
        task.first(m.read(m.decoder(m.Generate), task.payload).prompt or "")
        task.done()
    tree.run()
    assert [client.got[0].text for client in clients] == ["0", "1", "2", "3", "4", "5"]
    tree.assert_clean()


def test_an_error_of_a_worker_passes() -> None:
    tree = Tree()
    a, _, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    worker.task(1).failed(40303)
    tree.run()
    assert client.error(1).code == 40303
    assert [(end["outcome"], end["code"]) for end in a.ends()] == [("failed", 40303)]
    tree.assert_clean()


def test_what_no_worker_below_can_do_is_an_error_of_the_child() -> None:
    tree = Tree()
    _, b = tree.chain(2)
    b.worker()
    tree.run()
    (uplink,) = b.broker.uplinks
    head = m.ControllerHead(m.REQUEST, uplink.link.epoch, 1, 5)
    for request, error in ((m.Generate(5, "k"), errors.UnknownModel), (m.Generate(5, "m", fingerprint="f"), errors.WorkerLost)):
        assert uplink.offer(uplink.link, head, m.encode(request))
        assert b.counters[f"errors: {error.__name__}"] == 1
    tree.assert_clean()


def test_bytes_that_are_no_request_end_as_malformed() -> None:
    tree = Tree()
    _, b = tree.chain(2)
    b.worker()
    tree.run()
    (uplink,) = b.broker.uplinks
    head = m.ControllerHead(m.REQUEST, uplink.link.epoch, 1, 5)
    for payload in (b"", b"\x91" * 1000, m.encode(m.Ping(1000)), m.encode(m.Generate(6, "m"))):
        assert uplink.offer(uplink.link, head, payload)
    assert b.counters["errors: MalformedMessage"] == 4
    tree.assert_clean()


# --- the queue and others' load


def test_the_parent_keeps_the_queue_and_waiting_counts_once() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker(slots=1)
    tree.run()
    client = a.client()
    client.generate(1)
    client.generate(2, deadline_ms=60_000)
    tree.run(1.0)
    assert [sum(len(pool.waiting) for pool in node.broker.registry.pools.values()) for node in (a, b, c)] == [1, 0, 0]
    worker.task(1).done()
    tree.run()
    head = worker.task(2).head
    assert 1000 <= head.queue_ms <= 1200
    assert 58_800 <= (head.deadline_ms or 0) <= 59_000
    assert head.attempts == 0
    worker.task(2).done()
    tree.assert_clean()


def test_a_request_that_finds_no_room_goes_back_unharmed() -> None:
    """The slot went to one of the child's own clients a moment before."""
    tree = Tree()
    a, _, c = tree.chain(3)
    worker = c.worker(slots=1)
    tree.run()
    own, client = c.client(), a.client()
    client.generate(2)
    own.generate(1)
    tree.run()
    assert [task.rid for task in worker.tasks] == [1]
    assert a.counters["busy"] >= 1
    worker.task(1).done()
    tree.run(1.5)
    assert worker.task(2).head.attempts == 0
    worker.task(2).done()
    tree.assert_clean()


def test_one_model_that_is_full_below_does_not_hold_up_another() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    one, two = b.worker("one", card("m"), slots=1), b.worker("two", card("k"), slots=3)
    tree.run()
    client = a.client()
    for rid in range(1, 9):
        client.generate(rid)
    tree.run()
    client.generate(20, model="k")
    tree.run()
    assert [task.rid for task in two.tasks] == [20]
    two.task(20).done()
    for _ in range(8):
        (task,) = one.tasks
        task.done()
        tree.run()
    tree.assert_clean()


def test_parents_see_each_others_load_and_the_childs_own() -> None:
    tree = Tree()
    a, b = tree.node("a"), tree.node("b")
    child = tree.node("c", a)
    child.join(b)
    worker = child.worker(slots=4)
    tree.run()
    for node, rid in ((a, 1), (a, 2), (b, 3), (child, 4)):
        node.client().generate(rid)
    tree.run()
    assert len(worker.tasks) == 4
    loads = [(seen.running, seen.others, seen.free) for node in (a, b) for seen in node.broker.registry]
    assert loads == [(2, 2, 0), (1, 3, 0)]
    for rid in (1, 2, 3, 4):
        worker.task(rid).done()
    tree.run()
    assert [seen.free for node in (a, b) for seen in node.broker.registry] == [4, 4]
    tree.assert_clean()


# --- cancel and deadlines


@pytest.mark.parametrize("how", ["cancel", "client gone", "client silent"])
def test_a_request_that_is_not_wanted_any_more_stops_at_the_worker(how: str) -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    client.ping()
    tree.run()
    task = worker.task(1)
    task.first()
    tree.run()
    if how == "cancel":
        client.cancel(1)
        client.cancel(1)
    elif how == "client gone":
        a.gone.add(client.envelope[0])
        task.more()
    else:
        tree.run(3.1)
        a.gone.add(client.envelope[0])
    tree.run()
    assert task.cancelled
    assert worker.kinds().count(m.CANCEL) == 1
    assert all(seen.running == 1 for node in (a, b, c) for seen in node.broker.registry)
    task.done("cancelled")
    tree.run()
    if how == "cancel":
        assert client.end(1).finish_reasons == ["cancelled"]
    assert [len(node.ends()) for node in (a, b, c)] == [1, 1, 1]
    tree.assert_clean()


def test_a_deadline_ends_it_once_at_each_level() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    worker = c.worker()
    tree.run()
    client = a.client()
    client.generate(1, deadline_ms=1000)
    tree.run()
    worker.task(1).first()
    tree.run(1.0)
    assert worker.task(1).cancelled
    worker.task(1).done("cancelled")
    tree.run()
    assert client.error(1).code == errors.DeadlineExceeded.code
    assert [end["code"] for node in (a, b, c) for end in node.ends()] == [errors.DeadlineExceeded.code] * 3
    tree.assert_clean()


def test_a_worker_that_does_not_cancel_stalls_itself_and_not_the_controllers_above_it() -> None:
    tree = Tree()
    a, b, c = tree.chain(3)
    hung, other = c.worker("hung"), c.worker("other", state="loading")
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run()
    hung.task(1).first()
    client.cancel(1)
    other.ready(other.epoch, state="ready", slots=1)
    tree.run(6.0)
    assert client.end(1).finish_reasons == ["cancelled"]
    states = [sorted(seen.state for seen in node.broker.registry) for node in (a, b, c)]
    assert states == [["ready"], ["ready"], ["ready", "stalled"]]
    assert (a.counters["stalled"], b.counters["stalled"]) == (0, 0)
    client.generate(2)
    tree.run()
    other.task(2).done()
    hung.task(1).done("cancelled")
    tree.assert_clean()


def test_the_default_deadline_of_a_child_is_not_for_its_parents_clients() -> None:
    tree = Tree()
    a = tree.node("a")
    b = tree.node("b", a, default_deadline_s=1.0)
    worker = b.worker()
    tree.run()
    client = a.client()
    client.generate(1)
    tree.run(5.0)
    assert not worker.task(1).cancelled
    worker.task(1).done()
    tree.assert_clean()
