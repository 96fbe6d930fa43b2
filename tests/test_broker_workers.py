"""Workers in the Broker: they come, beat, stall, break the protocol, drain and die."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m

from .fakes.hierarchy import Tree
from .fakes.network import Network, card
from .fakes.scripted import ScriptedWorker


def refusal(worker: ScriptedWorker) -> m.Refused:
    refused: m.Refused = m.read(m.decoder(m.Refused), next(payload for head, payload in worker.got if head.kind == m.REFUSED))
    return refused


# --- registration


def test_a_worker_registers_as_loading_and_changes_to_ready_under_the_same_epoch() -> None:
    network = Network()
    worker = network.worker(state="loading", slots=0)
    first, (head, payload) = worker.epoch, worker.got[-1]
    assert (head.kind, worker.seen.state) == (m.WELCOME, "loading")
    welcome = m.read(m.decoder(m.WorkerWelcome), payload)
    assert (welcome.protocol, welcome.controller, welcome.ttl_ms) == (m.PROTOCOL, "here", 3000)
    worker.ready(first, state="ready", slots=2)
    assert (worker.seen.state, worker.seen.free, worker.epoch == first) == ("ready", 2, True)
    assert network.counters["workers lost"] == 0


@pytest.mark.parametrize(
    ("offer", "code", "text"),
    [
        ({"protocol": 2}, errors.ProtocolMismatch.code, "protocol 1"),
        ({"state": "asleep"}, errors.MalformedMessage.code, "asleep"),
        ({"state": "x" * 500_000}, errors.MalformedMessage.code, "Ready.state"),
        ({"controllers": ["below", "here"]}, errors.RequestError.code, "loop"),
        ({"slots": -1}, errors.MalformedMessage.code, "Ready.slots"),
        ({"speed": 0.0}, errors.MalformedMessage.code, "Ready.speed"),
        ({"speed": float("nan")}, errors.MalformedMessage.code, "Ready.speed"),
        ({"ttl_ms": 0}, errors.MalformedMessage.code, "Ready.ttl_ms"),
    ],
)
def test_an_offer_that_cannot_be_taken_is_refused_for_good(offer: dict[str, object], code: int, text: str) -> None:
    network = Network()
    worker = network.worker(register=False)
    worker.ready(**offer)  # type: ignore[arg-type]
    refused = refusal(worker)
    assert (refused.code, refused.retry_after_ms) == (code, None)
    assert text in refused.why
    assert len(refused.why) < 1000
    assert not worker.is_registered()
    network.assert_clean()


def test_too_many_models_are_refused() -> None:
    network = Network()
    worker = network.worker("w", *[card(f"m{number}") for number in range(m.MAX_MODELS + 1)])
    assert refusal(worker).why == f"Ready.models: Expected `array` of length <= {m.MAX_MODELS}"
    assert not network.broker.registry.pools


def test_a_name_taken_by_a_living_worker_is_refused_for_now() -> None:
    network = Network()
    old, new = network.worker("same"), network.worker("same")
    assert old.is_registered()
    assert not new.is_registered()
    assert (refusal(new).retry_after_ms, "taken" in refusal(new).why) == (1000, True)


def test_a_restarted_worker_takes_its_name_from_its_dead_self_at_once() -> None:
    network = Network()
    client, old = network.client(), network.worker("same")
    client.generate(1)
    old.die()
    new = network.worker("same")
    assert new.is_registered()
    assert new.task(1).head.attempts == 1
    new.task(1).done()
    network.assert_clean()


def test_registering_again_moves_what_had_not_begun_and_ends_what_had() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    client.generate(2)
    worker.task(1).first()
    worker.ready()
    assert client.error(1).code == errors.WorkerLost.code
    assert [task.rid for task in worker.tasks] == [2]
    worker.task(2).done()
    network.assert_clean()


def test_a_registration_that_cannot_be_answered_is_none() -> None:
    network = Network()
    worker = network.worker(register=False)
    network.gone.add(worker.identity)
    worker.ready()
    assert not worker.is_registered()
    network.assert_clean()


# --- liveness


def test_the_controller_beats_every_third_of_its_ttl() -> None:
    network = Network(ttl_s=3.0)
    worker = network.worker()
    network.beat_for(10.0, worker)
    assert 9 <= worker.kinds().count(m.BEAT) <= 10


def test_a_silent_worker_is_given_up_after_its_own_ttl() -> None:
    network = Network()
    network.worker("slow", ttl_ms=10_000)
    quick = network.worker("quick", ttl_ms=1000)
    network.advance(0.9)
    assert quick.is_registered()
    network.advance(0.2)
    assert [worker.name for worker in network.broker.registry] == ["slow"]
    assert network.reports[-1] == {"event": "worker gone", "worker": "quick", "why": "silent for 1.0 s", "running": 0}


def test_a_worker_that_changes_to_a_shorter_ttl_is_given_up_after_that() -> None:
    network = Network()
    worker = network.worker(ttl_ms=600_000)
    network.advance(10.0)
    worker.ready(worker.epoch, ttl_ms=3000)
    network.check()
    network.advance(2.9)
    assert worker.is_registered()
    network.advance(0.2)
    assert not worker.is_registered()


def test_any_traffic_keeps_a_worker_alive() -> None:
    network = Network()
    client, worker = network.client(), network.worker(ttl_ms=1000)
    client.generate(1)
    worker.task(1).first()
    for _ in range(10):
        network.advance(0.9)
        worker.task(1).more()
    assert worker.is_registered()


def test_a_send_that_finds_the_worker_gone_gives_it_up() -> None:
    network = Network()
    client, one = network.client(), network.worker("one")
    one.die()
    client.generate(1)
    assert not one.is_registered()
    two = network.worker("two")
    assert two.task(1).head.attempts == 0
    two.task(1).done()
    network.assert_clean()


def test_a_request_runs_through_dead_workers_to_a_living_one() -> None:
    network = Network()
    client = network.client()
    dead = [network.worker(f"dead{number}") for number in range(50)]
    for worker in dead:
        worker.die()
    alive = network.worker("alive", speed=1e-6)
    client.generate(1)
    client.generate(2)
    alive.task(alive.tasks[0].rid).done()
    alive.task(alive.tasks[0].rid).done()
    network.assert_clean()


def test_a_worker_that_does_not_read_is_given_up() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    network.full.add(worker.identity)
    client.generate(1)
    assert not worker.is_registered()
    other = network.worker("other")
    other.task(1).done()
    network.assert_clean()


def test_a_stopped_controller_does_not_blame_its_peers() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.ping()
    network.now += 100.0
    network.tick()
    assert worker.is_registered()
    assert network.counters["pauses"] == 1
    network.advance(2.0)
    assert worker.is_registered()
    network.advance(1.5)
    assert not worker.is_registered()


# --- stalls


def test_a_worker_whose_engine_hangs_gets_no_new_work_and_is_given_up_later() -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    worker.load(step_age_ms=10_001)
    assert worker.seen.state == "stalled"
    client.generate(2)
    assert len(worker.tasks) == 1
    for _ in range(12):
        network.advance(1.0)
        worker.load(step_age_ms=12_000)
    assert worker.told()
    worker.ready(worker.told()[-1])
    assert not worker.tasks  # a new registration does not mend an engine
    assert worker.seen.state == "stalled"
    worker.load(running=1, yours=0, step_age_ms=13_000)
    assert not worker.tasks
    worker.load()
    assert [task.rid for task in worker.tasks] == [1]
    assert worker.task(1).head.attempts == 1
    worker.task(1).first()
    assert [task.rid for task in worker.tasks] == [1, 2]
    for rid in (1, 2):
        worker.task(rid).done()
    network.assert_clean()


def test_a_hung_worker_that_registers_again_is_still_stalled() -> None:
    """It was fenced, so nothing of what it hangs on is this controller's any more; it hangs all the same."""
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=2)
    worker.load(running=1, yours=0, step_age_ms=30_000)
    assert worker.seen.state == "stalled"
    client.generate(1)
    assert not worker.tasks
    worker.load(running=0, yours=0)
    assert [task.rid for task in worker.tasks] == [1]


def test_a_worker_that_steps_again_is_fed_at_once() -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    worker.load(step_age_ms=10_001)
    client.generate(2)
    worker.load(step_age_ms=5)
    assert [task.rid for task in worker.tasks] == [1, 2]
    network.check()


@pytest.mark.parametrize("steps", [True, False], ids=["it was slow to cancel", "its engine hangs"])
def test_a_hung_engine_is_not_mended_by_what_its_worker_lets_go_of(steps: bool) -> None:
    network = Network(stall_s=10.0, cancel_timeout_s=5.0)
    client, worker = network.client(), network.worker(slots=2)
    for rid in (1, 2, 3):
        client.generate(rid)
    client.cancel(1)
    for second in range(1, 8):
        network.advance(1.0)
        client.ping()
        worker.load(step_age_ms=0.0 if steps else 10_000 + second * 1000)
    assert worker.seen.state == "stalled"
    worker.task(1).done("cancelled")
    assert [task.rid for task in worker.tasks] == ([2, 3] if steps else [2])
    assert worker.seen.state == ("ready" if steps else "stalled")


def test_a_hung_worker_whose_requests_are_all_cancelled_is_given_up_in_time() -> None:
    """It is tried with one request at a time when it has none left, since it can't tell then whether its engine steps."""
    network = Network(stall_s=60.0)
    client, hung, well = network.client(), network.worker("hung", slots=4), network.worker("well", slots=4)
    given: set[int] = set()
    for half_second in range(1, 300):
        client.generate(half_second, deadline_ms=20_000)
        client.ping()
        network.advance(0.5)
        for task in list(well.tasks):
            task.first()
            task.done()
        well.load()
        if not hung.is_registered():
            break
        for task in list(hung.tasks):
            given.add(task.rid)
            if task.cancelled:
                task.done("cancelled")
        hung.load(step_age_ms=half_second * 500.0)
    assert not hung.is_registered()
    assert 118.0 < half_second / 2 < 126.0
    assert len(given) <= 4 * 60 / 20 + 4 + 60 / 20  # all its slots until it counts as hung, and then one


@pytest.mark.parametrize("proof", ["its first chunk", "its answer", "a refusal", "a count"])
def test_a_worker_that_was_freed_of_what_it_hung_on_has_all_its_slots_when_it_has_made_something(proof: str) -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=3)
    client.generate(1)
    worker.load(step_age_ms=10_001)
    client.cancel(1)
    worker.task(1).done("cancelled")
    assert worker.seen.state == "stalled"
    worker.load()
    for rid in (2, 3, 4):
        client.generate(rid)
    network.check()
    assert [task.rid for task in worker.tasks] == [2]
    if proof == "its first chunk":
        worker.task(2).first()
    elif proof == "its answer":
        worker.task(2).done()
    elif proof == "a refusal":
        worker.task(2).failed()
    else:
        client.request(m.CountTokens(5, "m", prompt="light"))
        count = worker.task(5)
        worker.forget(count)
        worker.say(m.DONE, m.encode(m.Tokens(5, 1, 100)), client=count.client, rid=5, outcome="ok")
    network.check()
    expected = {"its first chunk": [2, 3, 4], "its answer": [3, 4], "a refusal": [3], "a count": [2]}
    assert [task.rid for task in worker.tasks] == expected[proof]


def test_a_hung_worker_that_steps_again_shows_it_by_its_heartbeats() -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=3)
    client.generate(1)
    worker.load(step_age_ms=10_001)
    worker.load()
    assert worker.seen.free == 2
    worker.task(1).done()
    worker.load(step_age_ms=10_001)
    assert worker.seen.state == "ready"  # it has nothing to do


def test_a_worker_that_hung_is_tried_also_while_others_use_it() -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=4)
    worker.load(running=2, yours=0, step_age_ms=30_000)
    worker.load(running=0, yours=0)
    worker.load(running=2, yours=0)
    client.generate(1)
    client.generate(2)
    assert [task.rid for task in worker.tasks] == [1]
    worker.task(1).first()
    assert [task.rid for task in worker.tasks] == [1, 2]
    network.check()


def test_a_worker_that_hung_is_one_slot_to_the_controllers_above() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    worker = b.worker(slots=3)
    tree.run()
    client, (seen,) = a.client(), a.broker.registry
    worker.load(running=1, yours=0, step_age_ms=70_000)
    tree.run(0.05)
    assert seen.slots == 0
    worker.load(running=0, yours=0)
    tree.run()
    assert (seen.slots, seen.others, seen.free) == (1, 0, 1)
    client.generate(1)
    client.generate(2)
    tree.run()
    assert [task.rid for task in worker.tasks] == [1]
    worker.task(1).first()
    tree.run()
    assert [task.rid for task in worker.tasks] == [1, 2]
    assert seen.slots == 3
    for rid in (1, 2):
        worker.task(rid).done()
    tree.assert_clean()


# --- other controllers' load


def test_others_load_takes_slots_and_gives_them_back() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=3)
    worker.load(running=2, waiting=1, yours=0)
    assert (worker.seen.others, worker.seen.free) == (3, 0)
    client.generate(1)
    assert not worker.tasks
    worker.load(running=1, yours=0)
    assert [task.rid for task in worker.tasks] == [1]
    assert (worker.seen.load, worker.seen.free) == (2, 1)


def test_more_of_ours_than_run_at_all_is_no_negative_load() -> None:
    network = Network()
    worker = network.worker(slots=3)
    worker.load(running=1, yours=5)
    assert (worker.seen.others, worker.seen.free) == (0, 3)


@pytest.mark.parametrize("dispatch", ["shortest_queue", "lottery"])
def test_figures_as_large_as_the_wire_allows_do_no_harm(dispatch: str) -> None:
    network = Network(dispatch=dispatch)
    client = network.client()
    worker = network.worker(slots=1_000_000, speed=1e9)
    worker.load(running=2**63 - 1, waiting=2**63 - 1, yours=0, step_age_ms=float("inf"))
    client.generate(1)
    assert worker.seen.free == 0
    worker.load()
    worker.task(1).done()
    client.send(m.Status(5))
    network.assert_clean()


# --- broken connections


def test_a_broken_connection_finds_the_dead_worker_at_once_and_again_a_little_later() -> None:
    """The monitor may speak before the socket knows: the first beat may still be taken for the dead."""
    network = Network()
    client, one, two = network.client(), network.worker("one"), network.worker("two")
    client.generate(1)
    dead, alive = (one, two) if one.tasks else (two, one)
    network.broker.members.disconnected(network.now)
    assert one.kinds()[-1] == two.kinds()[-1] == m.BEAT
    dead.die()
    network.advance(0.02)
    assert not dead.is_registered()
    assert [task.rid for task in alive.tasks] == [1]
    alive.tasks[0].done()
    network.assert_clean()


def test_connections_that_break_all_the_time_cost_a_beat_every_20_ms() -> None:
    network = Network()
    worker = network.worker()
    before = worker.kinds().count(m.BEAT)
    for _ in range(100):
        network.broker.members.disconnected(network.now)
        network.advance(0.001)
    assert worker.kinds().count(m.BEAT) - before in range(5, 8)
    network.advance(0.1)
    network.check()
