"""Clients in the Broker: handshakes, Pings, those that vanish, fall silent or do not read, and garbage."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m

from .fakes.network import Network, card


def test_hello_is_answered_with_the_limits() -> None:
    network = Network(queue_requests=7, client_requests=5, client_bytes=99)
    client = network.client()
    client.send(m.Hello(m.PROTOCOL, "test"))
    (welcome,) = client.got
    limits = welcome.limits
    assert (welcome.controller, limits.queue_requests, limits.ttl_ms) == ("here", 7, 3000)
    assert (limits.client_requests, limits.client_bytes) == (5, 99)
    network.assert_clean()


def test_hello_of_another_protocol_is_refused_with_both_versions() -> None:
    client = Network().client()
    client.send(m.Hello(9))
    (error,) = client.got
    assert (error.rid, error.code, error.data) == (0, errors.ProtocolMismatch.code, {"controller": 1, "client": 9})


def test_pong_disowns_what_this_controller_does_not_hold_for_this_client() -> None:
    network = Network()
    client, reconnected, worker = network.client(), network.client(), network.worker()
    assert client.ping(rids=[5]) == m.Pong("here", [5])
    client.generate(1)
    assert client.ping(rids=[1, 2]).unknown == [2]
    assert reconnected.ping(rids=[1]).unknown == [1]
    worker.task(1).done()
    assert client.ping(rids=[1]).unknown == [1]
    network.assert_clean()


def test_a_client_that_changes_to_a_shorter_ttl_is_let_go_after_that() -> None:
    network = Network()
    client, worker = network.client(), network.worker(ttl_ms=600_000)
    client.generate(1)
    client.ping(ttl_ms=500_000)
    network.advance(1.0)
    client.ping(ttl_ms=2000)
    network.check()
    network.advance(1.9)
    assert not worker.task(1).cancelled
    network.advance(0.2)
    assert worker.task(1).cancelled


def test_a_client_that_pinged_and_falls_silent_is_let_go() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    client.generate(1)
    client.generate(2)
    client.ping(ttl_ms=2000)
    network.beat_for(1.5, worker)
    client.ping(ttl_ms=2000)
    network.beat_for(1.5, worker)
    assert not worker.task(1).cancelled
    network.beat_for(1.0, worker)
    assert worker.task(1).cancelled
    assert client.ping(rids=[1, 2]).unknown == [1, 2]
    worker.task(1).done("cancelled")
    assert not worker.tasks
    assert client.got == []
    assert [end["outcome"] for end in network.ends()] == ["client silent"] * 2
    network.check()


def test_a_new_request_keeps_its_client_alive() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=9)
    client.generate(1)
    client.ping(ttl_ms=1000)
    for rid in range(2, 6):
        network.beat_for(0.5, worker)
        client.generate(rid)
    network.beat_for(0.5, worker)
    assert not worker.task(1).cancelled


def test_a_vanished_clients_slots_are_freed() -> None:
    network = Network()
    client, other, worker = network.client(), network.client(), network.worker(slots=1)
    client.generate(1)
    client.generate(2)
    other.generate(3)
    network.gone.add(client.envelope[0])
    worker.task(1).first()
    assert worker.task(1).cancelled
    worker.task(1).done("cancelled")
    assert [task.rid for task in worker.tasks] == [3]
    worker.task(3).done()
    network.assert_clean()


def test_everybody_behind_a_connection_goes_with_it() -> None:
    network = Network()
    one, two, worker = network.client(b"\0p", b"1"), network.client(b"\0p", b"2"), network.worker(slots=2)
    one.generate(1)
    two.generate(2)
    network.gone.add(b"\0p")
    worker.task(1).first()
    assert all(task.cancelled for task in worker.tasks)
    for task in list(worker.tasks):
        task.done("cancelled")
    network.assert_clean()


def test_a_slow_client_is_told_once_per_request_and_nobody_else_notices() -> None:
    network = Network()
    slow, other, worker = network.client(), network.client(), network.worker(slots=3)
    for rid in (1, 2, 3):
        slow.generate(rid)
    other.generate(4)
    network.full.add(slow.envelope[0])
    worker.task(1).first()
    assert [slow.error(rid).code for rid in (1, 2, 3)] == [errors.SlowConsumer.code] * 3
    network.gone.add(slow.envelope[0])
    for rid in (1, 2):
        worker.task(rid).more()
        worker.task(rid).done("cancelled")
    assert [task.cancelled for task in worker.tasks] == [True, False]
    worker.task(3).done("cancelled")
    worker.task(4).done()
    network.assert_clean()


def test_an_answer_that_fills_the_outbox_is_the_only_end_of_its_request() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    client.generate(2)
    network.full.add(client.envelope[0])
    worker.task(1).done()
    assert client.end(1).finish_reasons == ["stop"]
    assert client.error(2).code == errors.SlowConsumer.code
    worker.task(2).done("cancelled")
    network.assert_clean()


def test_a_slow_client_may_come_again_on_its_connection() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    network.full.add(client.envelope[0])
    worker.task(1).first()
    network.full.clear()
    client.generate(1)
    old, new = worker.tasks
    assert old.client != new.client
    new.done()
    old.done("cancelled")
    assert len(client.ends(1)) == 2
    network.assert_clean()


# --- client and worker go together


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("first", ["worker", "client"])
@pytest.mark.parametrize("attempts", [1, 2])
def test_a_client_and_its_worker_may_go_at_the_same_time(first: str, started: bool, attempts: int) -> None:
    network = Network(max_attempts=attempts)
    client, worker = network.client(), network.worker(slots=2)
    for rid in (1, 2, 3):
        client.generate(rid)
    if started:
        worker.task(2).first()
    task = worker.task(2)
    network.gone |= {client.envelope[0], worker.identity}
    if first == "client":
        task.more()
    network.advance(4.0)
    network.advance(11.0)
    network.assert_clean()
    assert len(network.ends()) == 3


def test_a_lost_request_whose_client_is_found_gone_meanwhile_goes_to_no_other_worker() -> None:
    network = Network()
    client, one = network.client(), network.worker("one", slots=2)
    client.generate(1)
    client.generate(2)
    one.task(2).first()
    two = network.worker("two", slots=2)
    network.gone.add(client.envelope[0])
    one.say(m.BYE)
    assert two.tasks == []
    network.assert_clean()


def test_a_client_may_be_found_gone_while_its_lost_requests_look_for_another_worker() -> None:
    network = Network()
    client = network.client()
    one = network.worker("one", slots=2)
    client.request(m.Embed(1, "m", texts=["a"]))
    client.generate(2)
    two = network.worker("two", card(verbs=["generate"]), slots=2)
    client.generate(3)
    two.task(3).first()
    network.gone |= {client.envelope[0], two.identity}
    one.say(m.BYE)
    assert len(network.ends()) == 3
    network.assert_clean()


def test_a_slow_client_is_told_of_every_request_though_its_worker_is_found_gone_meanwhile() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=3)
    for rid in (1, 2, 3):
        client.generate(rid)
    worker.task(2).first()
    task = worker.task(3)
    network.full.add(client.envelope[0])
    network.gone.add(worker.identity)
    task.first()
    assert [client.error(rid).code for rid in (1, 2, 3)] == [errors.SlowConsumer.code] * 3
    network.assert_clean()


def test_a_vanished_client_is_found_when_its_waiting_request_is_cancelled() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2)
    client.generate(3)
    network.gone.add(client.envelope[0])
    client.cancel(2)
    assert worker.task(1).cancelled
    worker.task(1).done("cancelled")
    network.assert_clean()
    assert len(network.ends()) == 3


def test_a_vanished_client_is_found_when_its_model_is_given_up() -> None:
    network = Network(orphan_grace_s=2.0)
    client, worker = network.client(), network.worker()
    for rid in (1, 2, 3):
        client.generate(rid)
    worker.say(m.BYE)
    network.gone.add(client.envelope[0])
    network.advance(2.5)
    network.assert_clean()
    assert len(network.ends()) == 3


def test_cancelling_all_of_a_silent_clients_requests_may_find_the_worker_gone() -> None:
    network = Network()
    client, one = network.client(), network.worker("one", slots=3)
    for rid in (1, 2, 3):
        client.generate(rid)
    one.task(2).first()
    client.ping(ttl_ms=500)
    two = network.worker("two", slots=3)
    network.beat_for(0.2, one, two)
    one.die()
    network.beat_for(1.0, two)
    for task in list(two.tasks):
        assert task.cancelled
        task.done("cancelled")
    network.beat_for(6.0, two)
    network.gone.add(client.envelope[0])
    network.assert_clean()
    assert len(network.ends()) == 3


def test_the_default_deadline_may_find_the_worker_gone() -> None:
    network = Network(default_deadline_s=2.0, max_attempts=1, ttl_s=1000.0)
    client, worker = network.client(), network.worker(slots=3, ttl_ms=10**6)
    for rid in (1, 2, 3):
        client.generate(rid)
    worker.die()
    network.advance(2.5)
    assert [type(client.end(rid)) for rid in (1, 2, 3)] == [m.Error] * 3
    network.advance(11.0)
    network.assert_clean()


def test_a_proxy_that_vanishes_takes_clients_on_many_workers_along() -> None:
    network = Network()
    clients = [network.client(b"\0p", b"%d" % number) for number in range(10)]
    workers = [network.worker(f"w{number}", slots=4) for number in range(3)]
    for number, client in enumerate(clients):
        client.generate(1 + 2 * number)
        client.generate(2 + 2 * number)
    network.gone |= {b"\0p", workers[0].identity, workers[1].identity}
    workers[2].tasks[0].first()
    for _ in range(60):
        for task in list(workers[2].tasks):
            task.done("cancelled" if task.cancelled else "stop")
        network.beat_for(0.5, workers[2])
    network.assert_clean()


# --- questions to the controller itself


def test_status_and_models_tell_what_is_so() -> None:
    network = Network()
    client, worker = network.client(), network.worker("w", card("m", context_length=99), slots=1, speed=2.0)
    client.generate(1)
    client.generate(2)
    worker.task(1).first()
    network.advance(1.0)
    worker.load(running=1, yours=1, step_age_ms=12.5)
    client.send(m.Status(100))
    status = client.end(100).status
    (seen,), (model,) = status.workers, status.models
    assert (seen.name, seen.state, seen.running, seen.free, seen.speed, seen.step_age_ms) == ("w", "ready", 1, 0, 2.0, 12.5)
    assert (model.state, model.running, model.waiting, model.slots, model.card.context_length) == ("ready", 1, 1, 1, 99)
    assert model.waiting_bytes > 0
    assert (status.controller, status.clients, status.running, status.waiting) == ("here", 1, 1, 1)
    assert (status.dispatch, status.up_s, status.counters["requests"]) == ("shortest_queue", 1.0, 2)
    client.send(m.ListModels(101))
    assert [served.card.name for served in client.end(101).models] == ["m"]
    worker.say(m.BYE)
    client.send(m.ListModels(102))
    assert client.end(102).models == []


def test_shutting_down_ends_every_request_and_lets_workers_go_on() -> None:
    network = Network()
    client, other, worker = network.client(), network.client(), network.worker(slots=1)
    client.generate(1)
    client.generate(2)
    other.generate(3)
    worker.task(1).first()
    network.broker.shut_down(network.now)
    for who, rid in ((client, 1), (client, 2), (other, 3)):
        assert (who.error(rid).code, who.error(rid).retryable) == (errors.GoingAway.code, True)
        assert sum(isinstance(message, m.GoAway) for message in who.got) == 1
    assert worker.task(1).cancelled
    worker.task(1).done("cancelled")
    network.assert_clean()


def test_a_client_gets_no_more_patience_by_asking_for_it() -> None:
    """One that says once that it may be silent for ages would be bounded by nothing."""
    network = Network(default_deadline_s=5.0)
    client, worker = network.client(), network.worker(ttl_ms=10_000_000)
    client.generate(1)
    client.ping(ttl_ms=2**53, rids=[1])
    network.advance(4.0)
    assert not worker.task(1).cancelled
    network.advance(2.0)
    assert worker.task(1).cancelled
    assert network.counters["clients: client silent"] == 1
    worker.task(1).done("cancelled")
    network.check()
    assert not network.broker.flights.open
