"""How a request ends in the Broker before its answer is whole: cancelled, too late."""

from __future__ import annotations

import pytest

from zmqserve import errors
from zmqserve import messages as m

from .fakes.network import Network


def test_cancelling_what_waits_ends_it_at_once() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2)
    client.cancel(2)
    client.cancel(2)
    assert client.end(2).finish_reasons == ["cancelled"]
    worker.task(1).done()
    network.assert_clean()


def test_cancelling_what_runs_tells_the_worker_once_and_keeps_the_slot_until_it_lets_go() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).first()
    client.cancel(1)
    client.cancel(1)
    assert worker.kinds().count(m.CANCEL) == 1
    assert worker.seen.free == 0
    worker.task(1).done("cancelled")
    assert client.end(1).finish_reasons == ["cancelled"]
    network.assert_clean()


def test_done_may_win_against_cancel() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.cancel(1)
    worker.task(1).done("stop")
    assert client.end(1).finish_reasons == ["stop"]
    assert network.ends()[0]["outcome"] == "stop"
    network.assert_clean()


def test_cancelling_what_has_ended_or_never_was_is_harmless() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).done()
    client.cancel(1)
    client.cancel(99)
    network.client().cancel(1)
    network.assert_clean()
    assert len(client.got) == 1


def test_a_worker_that_does_not_cancel_in_time_gets_no_new_work_until_it_does() -> None:
    network = Network(cancel_timeout_s=1.0)
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1)
    client.cancel(1)
    network.beat_for(1.5, worker)
    assert worker.seen.state == "stalled"
    client.generate(2)
    assert len(worker.tasks) == 1
    worker.task(1).done("cancelled")
    assert worker.seen.state == "ready"
    worker.task(2).done()
    network.assert_clean()


# --- deadlines


def test_a_deadline_passes_in_the_queue() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2, deadline_ms=1000)
    network.beat_for(1.0, worker)
    assert client.error(2).code == errors.DeadlineExceeded.code
    worker.task(1).done()
    network.assert_clean()
    assert network.ends()[0]["code"] == errors.DeadlineExceeded.code


@pytest.mark.parametrize("outcome", ["cancelled", "stop"])
def test_a_deadline_passes_while_the_worker_answers(outcome: str) -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=1000)
    worker.task(1).first()
    network.beat_for(1.0, worker)
    assert worker.task(1).cancelled
    worker.task(1).done(outcome)
    if outcome == "cancelled":
        assert client.error(1).code == errors.DeadlineExceeded.code
    else:
        assert client.end(1).finish_reasons == ["stop"]
    network.assert_clean()
    assert network.ends()[0]["outcome"] == ("deadline" if outcome == "cancelled" else "stop")


def test_a_deadline_that_the_worker_finds_passed_first_is_counted_as_one() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=1000)
    worker.task(1).failed(errors.DeadlineExceeded.code)
    assert client.error(1).code == errors.DeadlineExceeded.code
    assert network.ends()[0]["outcome"] == "deadline"
    assert network.counters["ended: deadline"] == 1
    network.assert_clean()


def test_a_deadline_passes_and_then_the_worker_is_lost() -> None:
    network = Network(cancel_timeout_s=60.0)
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=500)
    network.advance(1.0)
    worker.die()
    network.advance(3.0)
    assert client.error(1).code == errors.DeadlineExceeded.code
    network.advance(11.0)
    network.assert_clean()


def test_the_time_waited_is_taken_off_the_deadline_told_to_the_worker() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2, deadline_ms=5000)
    network.advance(2.0)
    worker.task(1).done()
    assert worker.task(2).head.deadline_ms == pytest.approx(3000, abs=1)
    assert worker.task(2).head.queue_ms == pytest.approx(2000)


def test_the_longest_deadline_is_one_that_a_worker_can_read() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    for rid in range(1, 40):
        network.now += 0.017
        client.generate(rid, deadline_ms=2**53)
        head = worker.task(rid).head
        assert m.read(m.decoder(m.ControllerHead), m.encode(head)) == head
        worker.task(rid).done()


def test_requests_without_a_deadline_of_clients_that_never_ping_end_after_the_default_one() -> None:
    network = Network(default_deadline_s=5.0)
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=60_000)
    client.generate(2)
    network.beat_for(2.0, worker)
    client.generate(3)
    network.beat_for(3.5, worker)
    assert client.error(2).code == errors.DeadlineExceeded.code
    assert not client.ends(3)
    network.beat_for(2.5, worker)
    assert client.error(3).code == errors.DeadlineExceeded.code
    assert not client.ends(1)
    worker.task(1).done()
    network.assert_clean()


def test_a_client_that_pings_is_not_bound_by_the_default_deadline() -> None:
    network = Network(default_deadline_s=5.0)
    client, worker = network.client(), network.worker()
    client.generate(1)
    for _ in range(10):
        assert client.ping().unknown == []
        network.beat_for(1.0, worker)
    assert not client.ends(1)
    worker.task(1).done()
    network.assert_clean()


# --- a worker that beats and never ends what it was told to end


def test_a_deadline_is_told_soon_although_the_worker_never_answers() -> None:
    """The slot stays taken until the worker lets go; the client has its end, and nothing comes after it."""
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    client.generate(1, deadline_ms=1000)
    client.generate(2)
    task = worker.task(1)
    network.beat_for(1.0, worker)
    assert not client.got
    network.beat_for(0.5, worker)
    assert client.error(1).code == errors.DeadlineExceeded.code
    assert worker.seen.running == 1
    assert client.ping(rids=[1, 2]).unknown == [1]
    network.check()
    task.first()
    task.more()
    client.generate(1)
    assert [message.code for message in client.ends(1)] == [errors.DeadlineExceeded.code, errors.DuplicateRequest.code]
    network.beat_for(1.0, worker)
    task.done("cancelled")
    assert len(client.got) == 2
    worker.task(2).done()
    network.assert_clean()
    assert [end["outcome"] for end in network.ends()] == ["deadline", "stop"]


def test_a_neighbour_on_the_same_worker_is_not_disturbed_by_a_request_that_was_told_early() -> None:
    """MORE may hold chunks of both, so it still passes while the other is open: clients drop what is for a rid that has ended."""
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.generate(1, deadline_ms=500)
    client.generate(2)
    for rid in (1, 2):
        worker.task(rid).first()
    network.beat_for(1.0, worker)
    assert client.error(1).code == errors.DeadlineExceeded.code
    worker.task(2).more()
    worker.task(2).done()
    assert client.end(2).finish_reasons == ["stop"]
    worker.task(1).more()  # now nobody waits for anything on this way
    chunks = [message.rid for message in client.got if isinstance(message, m.Chunk)]
    assert chunks == [1, 2, 2]
    worker.task(1).done("cancelled")
    network.assert_clean()


def test_a_cancelled_request_that_never_ends_is_told_and_its_worker_fenced() -> None:
    network = Network(cancel_timeout_s=1.0, stall_s=2.0)
    client, worker, other = network.client(), network.worker(slots=2), network.client()
    client.generate(1)
    other.generate(2)
    client.cancel(1)
    network.beat_for(1.0, worker)
    assert client.end(1).finish_reasons == ["cancelled"]
    assert worker.seen.state == "stalled"
    network.beat_for(2.5, worker)
    assert not worker.is_registered()
    assert worker.told()
    spare = network.worker("spare")
    spare.task(2).done()
    assert other.end(2).finish_reasons == ["stop"]
    assert len(client.got) == 1
    network.assert_clean()


@pytest.mark.parametrize("end", ["it is lost", "it says BUSY"])
def test_a_request_told_early_ends_once_whatever_becomes_of_its_worker(end: str) -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    client.generate(1, deadline_ms=500)
    network.beat_for(1.0, worker)
    assert client.error(1).code == errors.DeadlineExceeded.code
    if end == "it is lost":
        worker.say(m.BYE)
    else:
        worker.task(1).busy()
    assert len(client.got) == 1
    network.assert_clean()


def test_a_client_with_nothing_but_told_requests_need_not_ping() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.ping(2000)
    client.generate(1, deadline_ms=500)
    client.ping(2000)
    network.beat_for(5.0, worker)
    assert not network.counters["clients: client silent"]
    client.generate(2)
    client.ping(2000)
    worker.task(2).done()
    worker.task(1).done("cancelled")
    assert client.end(2).finish_reasons == ["stop"]
    network.assert_clean()


def test_the_default_deadline_is_told_soon_as_well() -> None:
    network = Network(default_deadline_s=2.0, cancel_timeout_s=60.0)
    client, worker = network.client(), network.worker()
    client.generate(1)
    network.beat_for(3.5, worker)
    assert client.error(1).code == errors.DeadlineExceeded.code
    worker.task(1).done("cancelled")
    network.assert_clean()
