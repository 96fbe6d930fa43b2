"""Workers in the Broker: they come, beat, stall, break the protocol, drain and die."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m
from zmqserve.membership import MAX_MODELS_PER_WORKER, MAX_TOLD

from .fakes.network import Network, ScriptedWorker, card


def refusal(worker: ScriptedWorker) -> m.Refused:
    refused: m.Refused = m.read(m.decoder(m.Refused), next(payload for head, payload in worker.got if head.kind == m.REFUSED))
    return refused


def told(worker: ScriptedWorker) -> list[int]:
    return [head.epoch for head, _ in worker.got if head.kind == m.REREGISTER]


# --- registration


def test_a_worker_registers_as_loading_and_then_as_ready_with_a_new_epoch() -> None:
    network = Network()
    worker = network.worker(state="loading", slots=0)
    first, (head, payload) = worker.epoch, worker.got[-1]
    assert (head.kind, worker.seen.state) == (m.WELCOME, "loading")
    welcome = m.read(m.decoder(m.WorkerWelcome), payload)
    assert (welcome.protocol, welcome.controller, welcome.ttl_ms) == (m.PROTOCOL, "here", 3000)
    worker.ready(first, state="ready", slots=2)
    assert (worker.seen.state, worker.seen.free, worker.epoch != first) == ("ready", 2, True)
    assert network.counters["workers lost"] == 0


@pytest.mark.parametrize(
    ("offer", "code", "text"),
    [
        ({"protocol": 2}, errors.ProtocolMismatch.code, "protocol 1"),
        ({"state": "asleep"}, errors.MalformedMessage.code, "asleep"),
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
    assert not worker.is_registered()
    network.assert_clean()


def test_too_many_models_are_refused() -> None:
    network = Network()
    worker = network.worker("w", *[card(f"m{number}") for number in range(MAX_MODELS_PER_WORKER + 1)])
    assert "over the limit" in refusal(worker).why
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
    worker.ready(worker.epoch)
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
    assert told(worker)
    worker.ready(told(worker)[-1])
    assert sorted(task.rid for task in worker.tasks) == [1, 2]
    assert worker.task(1).head.attempts == 1
    for rid in (1, 2):
        worker.task(rid).done()
    network.assert_clean()


def test_a_worker_that_steps_again_is_fed_at_once() -> None:
    network = Network(stall_s=10.0)
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    worker.load(step_age_ms=10_001)
    client.generate(2)
    worker.load(step_age_ms=5)
    assert [task.rid for task in worker.tasks] == [1, 2]
    network.check()


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


# --- strangers, stale epochs and forgeries


def test_a_stranger_is_told_to_register_once_per_beat() -> None:
    network = Network()
    worker = network.worker(register=False)
    for _ in range(10):
        worker.say(m.LOAD, m.encode(m.Load(0, 0, 0)))
    assert len(told(worker)) == 1
    network.advance(1.0)
    worker.say(m.LOAD, m.encode(m.Load(0, 0, 0)))
    assert len(set(told(worker))) == 2


def test_strangers_remembered_are_bounded() -> None:
    network = Network()
    for number in range(MAX_TOLD + 50):
        network.broker.members.tell_to_register(network.now, b"\0%d" % number)
    assert len(network.broker.members._told) <= MAX_TOLD
    network.advance(1.0)
    network.broker.members.tell_to_register(network.now, b"\0late")
    assert len(network.broker.members._told) == 1


def test_an_uncertain_ready_counts_only_with_the_number_told() -> None:
    network = Network()
    worker = network.worker(register=False)
    worker.ready(certain=False)
    assert not worker.is_registered()
    worker.ready(told(worker)[0] + 1, certain=False)
    assert not worker.is_registered()
    worker.ready(told(worker)[0], certain=False)
    assert worker.is_registered()


def test_an_uncertain_ready_cannot_unseat_a_registered_worker() -> None:
    network = Network()
    worker = network.worker()
    epoch = worker.epoch
    worker.ready(0, certain=False)
    assert worker.epoch == epoch
    assert network.counters["dropped: stale epoch"] == 1
    worker.ready(0)
    assert worker.epoch != epoch


def test_a_number_told_to_one_peer_is_of_no_use_to_another() -> None:
    network = Network()
    one, two = network.worker("one", register=False), network.worker("two", register=False)
    one.say(m.LOAD)
    two.say(m.LOAD)
    two.ready(told(one)[0], certain=False)
    assert not two.is_registered()


def test_nothing_of_an_old_epoch_reaches_anybody() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=60_000)
    task = worker.task(1)
    network.advance(3.5)
    assert not worker.is_registered()
    for act in (task.first, task.more, task.done):
        act()
    assert client.got == []
    worker.ready(told(worker)[0])
    assert worker.task(1).head.epoch != task.head.epoch
    task.first()
    assert client.got == []
    assert network.counters["dropped: stale epoch"] == 1
    worker.task(1).done()
    network.assert_clean()


def test_a_worker_reaches_only_clients_with_an_open_flight_on_it() -> None:
    network = Network()
    client, other = network.client(), network.client()
    one, two = network.worker("one"), network.worker("two")
    client.generate(1)
    other.generate(1)
    mine, theirs = (one, two) if one.task(1).client == 1 else (two, one)
    task = mine.task(1)
    for kind in (m.FIRST, m.MORE, m.DONE, m.FAILED, m.BUSY):
        theirs.say(kind, m.encode(m.Chunk(1, 0, 0, "x", b"")), client=task.client, rid=1)
    assert client.got == []
    assert network.counters["dropped: no open flight"] == 5


@pytest.mark.parametrize("head", [b"", b"\xc1", b"\x91" * 100_000, b"\x93\x47\xd9\xff", b"\x92\xa1\xff\x00", b"\x90"])
def test_a_head_that_is_none_fences_its_sender_where_that_is_certain(head: bytes) -> None:
    network = Network()
    worker = network.worker()
    network.broker.from_worker(network.now, worker.identity, head, b"", certain=False)
    assert worker.is_registered()
    network.broker.from_worker(network.now, worker.identity, head, b"")
    assert not worker.is_registered()
    assert told(worker)
    network.broker.from_worker(network.now, b"\0nobody", head, b"")
    network.assert_clean()


@pytest.mark.parametrize("kind", [m.WELCOME, m.REQUEST, 0, -5, 2**40])
def test_a_kind_that_workers_do_not_send_is_a_violation(kind: int) -> None:
    network = Network()
    worker = network.worker()
    worker.say(kind)
    assert not worker.is_registered()
    assert network.counters["worker violations"] == 1


def test_a_heartbeat_that_is_none_is_a_violation() -> None:
    network = Network()
    worker = network.worker()
    worker.say(m.LOAD, b"\x93\x00\x00\xff")
    assert not worker.is_registered()


def test_an_infinite_flood_of_firsts_starts_a_request_once() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).first()
    network.advance(0.5)
    worker.task(1).first()
    worker.task(1).done()
    assert network.ends()[0]["first_ms"] == 0.0
    network.assert_clean()


# --- loss


def test_what_had_not_begun_goes_to_another_worker_first() -> None:
    network = Network()
    client = network.client()
    one, two = network.worker("one", slots=4), network.worker("two", slots=4)
    for rid in range(1, 5):
        client.generate(rid)
    lost = [task.rid for task in one.tasks]
    one.say(m.BYE)
    assert sorted(task.rid for task in two.tasks) == [1, 2, 3, 4]
    assert [two.task(rid).head.attempts for rid in lost] == [1] * len(lost)
    again = network.worker("one", slots=4)
    assert not again.tasks
    for rid in range(1, 5):
        two.task(rid).done()
    network.assert_clean()
    assert not any(isinstance(message, m.Error) for message in client.got)


def test_a_worker_lost_first_is_used_again_when_it_is_the_only_one() -> None:
    network = Network()
    client, worker = network.client(), network.worker("only")
    client.generate(1)
    worker.ready(worker.epoch)
    assert worker.task(1).head.attempts == 1


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
    assert (error.code, error.retryable, error.data) == (errors.WorkerLost.code, True, {"worker": "w", "attempts": 1})
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
    assert client.error(3).code == errors.UnknownModel.code


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
