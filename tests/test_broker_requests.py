"""A request's life in the Broker: admitted, dispatched, waiting, ended. Time is told, sends are recorded."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from zmqserve import errors
from zmqserve import messages as m
from zmqserve.registry import MOST_LIGHT

from .fakes.hierarchy import Tree
from .fakes.network import Network, card


def test_a_request_goes_to_a_worker_and_its_answer_to_the_client() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(7, deadline_ms=5000, trace="00-abc")
    task = worker.task(7)
    assert msgspec.msgpack.decode(task.payload, type=m.Generate).prompt == "hello"
    assert (task.head.deadline_ms, task.head.attempts, task.head.queue_ms) == (5000, 0, 0.0)
    task.first()
    task.more()
    network.check()
    task.done()
    assert [isinstance(message, m.Chunk) for message in client.got] == [True, True, False]
    assert isinstance(client.end(7), m.Done)
    network.assert_clean()
    (end,) = network.ends()
    assert (end["outcome"], end["worker"], end["completion_tokens"], end["trace"]) == ("stop", "w", 2, "00-abc")


def test_the_payload_reaches_the_worker_untouched_newer_fields_included() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    fields = msgspec.msgpack.decode(m.encode(m.Generate(7, "m", prompt="hi")))
    payload = m.encode([*fields, None, "a field of the future"])
    client.send(payload)
    assert worker.task(7).payload == payload


def test_a_failed_request_ends_with_the_workers_error() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(7)
    worker.task(7).failed(50002)
    assert client.error(7).code == errors.OutOfMemory.code
    network.assert_clean()
    assert (network.ends()[0]["outcome"], network.ends()[0]["code"]) == ("failed", 50002)


def test_two_clients_with_one_rid_get_their_own_answers() -> None:
    network = Network()
    one, two, worker = network.client(), network.client(), network.worker(slots=2)
    one.generate(7)
    two.generate(7)
    first, second = worker.tasks
    assert first.client != second.client
    second.done("length")
    assert not one.got
    first.done("stop")
    assert (one.end(7).finish_reasons, two.end(7).finish_reasons) == (["stop"], ["length"])
    network.assert_clean()


def test_a_rid_in_flight_is_refused_again_and_free_after_its_end() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    client.generate(7)
    client.generate(7)
    assert client.error(7).code == errors.DuplicateRequest.code
    assert len(worker.tasks) == 1
    worker.task(7).done()
    client.generate(7)
    worker.task(7).done()
    assert len(client.ends(7)) == 3
    network.assert_clean()


def test_clients_numbers_are_never_used_twice() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    numbers = []
    for rid in range(1, 5):
        client.generate(rid)
        numbers.append(worker.task(rid).client)
        worker.task(rid).done()
    assert len(set(numbers)) == 4


# --- no worker, or none that can


def test_an_unknown_model_is_named_beside_those_there_are() -> None:
    network = Network()
    client = network.client()
    client.generate(1, "nobody")
    none_yet = client.error(1)
    assert (none_yet.code, none_yet.retryable, none_yet.retry_after_ms) == (errors.NoWorker.code, True, 1000)
    network.worker("a", card("m2"), card("m1"))
    client.generate(2, "nobody")
    error = client.error(2)
    assert (error.code, error.data["known_models"]) == (errors.UnknownModel.code, ["m1", "m2"])
    assert "known: m1, m2" in error.message
    network.assert_clean()


def test_a_model_that_is_loading_says_so() -> None:
    network = Network()
    client, worker = network.client(), network.worker(state="loading", slots=0)
    client.generate(1)
    error = client.error(1)
    assert (error.code, error.retryable, error.retry_after_ms) == (errors.ModelLoading.code, True, 1000)
    worker.ready(worker.epoch, state="ready", slots=1)
    client.generate(2)
    worker.task(2).done()
    network.assert_clean()


def test_a_verb_that_the_model_lacks_is_unsupported() -> None:
    network = Network()
    client = network.client()
    network.worker("w", card(verbs=["generate", "model_details"]))
    client.request(m.Embed(1, "m", texts=["a"]))
    error = client.error(1)
    assert (error.code, error.data["verbs"]) == (errors.Unsupported.code, ["generate", "model_details"])
    network.assert_clean()


def test_a_resume_goes_only_to_an_equal_fingerprint() -> None:
    network = Network()
    client = network.client()
    one, two = network.worker("one", card(fingerprint="f1"), slots=9), network.worker("two", card(fingerprint="f2"), slots=9)
    for rid in range(1, 5):
        client.generate(rid, fingerprint="f2")
    assert (len(one.tasks), len(two.tasks)) == (0, 4)
    client.generate(9, fingerprint="f3")
    error = client.error(9)
    assert (error.code, error.retryable) == (errors.WorkerLost.code, False)


def test_an_alias_names_the_same_model_also_while_its_worker_is_away() -> None:
    network = Network()
    client, worker = network.client(), network.worker("w", card("m", aliases=["nick"]))
    client.generate(1, "nick")
    worker.task(1).done()
    worker.say(m.BYE)
    client.generate(2, "nick")
    again = network.worker("again", card("m", aliases=["nick"]))
    again.task(2).done()
    network.assert_clean()


def test_an_alias_that_some_workers_do_not_know_leads_to_those_that_do() -> None:
    network = Network()
    client = network.client()
    knows, other = (
        network.worker("knows", card(aliases=["nick", "both"]), slots=20),
        network.worker("other", card(aliases=["both"]), slots=20),
    )
    for rid in range(1, 11):
        client.generate(rid, "nick")
    assert (len(knows.tasks), len(other.tasks)) == (10, 0)
    for rid in range(11, 21):
        client.generate(rid, "both")
    assert other.tasks
    network.check()
    knows.die()
    network.advance(1.0)
    assert {task.rid for task in other.tasks} == set(range(11, 21))
    late = network.worker("late", card(aliases=["nick"]), slots=20)
    late.task(1).first()
    assert {task.rid for task in late.tasks} <= set(range(1, 11))
    network.check()


def test_an_alias_that_a_new_worker_does_not_know_is_not_asked_of_that_one() -> None:
    """Also by those who asked when all knew it: who waits, and who loses a worker."""
    network = Network()
    client = network.client()
    first, second = (network.worker(name, card(aliases=["nick"]), slots=1) for name in ("first", "second"))
    for rid in (1, 2, 3, 4):
        client.generate(rid, "nick")
    client.generate(5)
    new = network.worker("new", slots=5)
    network.check()
    assert [task.rid for task in new.tasks] == [5]
    second.cards = [card()]
    second.ready(second.epoch)
    second.task(second.tasks[0].rid).done()
    assert not second.tasks
    (running,) = first.tasks
    first.say(m.BYE)
    network.check()
    again = network.worker("again", card(aliases=["nick"]), slots=5)
    assert {task.rid for task in again.tasks} == {running.rid, 3, 4}
    assert [task.rid for task in new.tasks] == [5]


def test_an_alias_that_nobody_knows_any_more_is_waited_for_as_a_worker_is() -> None:
    network = Network(orphan_grace_s=10.0)
    client, worker = network.client(), network.worker("w", card(aliases=["nick"]))
    for rid in (1, 2, 3):
        client.generate(rid, "nick")
    worker.cards = [card()]
    worker.ready(worker.epoch)
    worker.task(1).done()
    network.check()
    assert not worker.tasks
    network.beat_for(9.0, worker)
    again = network.worker("again", card(aliases=["nick"]))
    assert [task.rid for task in again.tasks] == [2]
    again.say(m.BYE)
    network.beat_for(10.5, worker)
    assert [client.error(rid).code for rid in (2, 3)] == [errors.NoWorker.code] * 2
    network.assert_clean()


@pytest.mark.parametrize(("state", "verbs", "code"), [("loading", [], 50301), ("ready", ["embed"], 40304)])
def test_what_nobody_who_knows_the_alias_can_do_now_is_refused(state: str, verbs: list[str], code: int) -> None:
    network = Network()
    client = network.client()
    network.worker("other", slots=5)
    network.worker("knows", card(aliases=["nick"], verbs=verbs), state=state)
    client.generate(1, "nick")
    error = client.error(1)
    assert (error.code, "'nick'" in error.message, error.data["model"]) == (code, True, "m")
    assert "generate" not in error.message.partition("it can")[2]


def test_an_alias_that_some_workers_of_a_controller_below_do_not_know_leads_to_those_that_do() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    knows, other = b.worker("knows", card(aliases=["nick"]), slots=2), b.worker("other", slots=2)
    tree.run()
    client = a.client()
    for rid in (1, 2, 3):
        client.generate(rid, "nick")
        tree.run()
    assert ([task.rid for task in knows.tasks], other.tasks) == ([1, 2], [])
    for rid in (1, 2):
        knows.task(rid).done()
    tree.run(1.0)
    assert [task.rid for task in knows.tasks] == [3]
    knows.task(3).done()
    tree.assert_clean()


def test_an_alias_of_one_model_that_is_anothers_name_leads_to_that() -> None:
    network = Network()
    client = network.client()
    network.worker("one", card("m", aliases=["n"]))
    network.worker("two", card("m"))
    third = network.worker("three", card("n"))
    client.generate(1, "n")
    assert [task.rid for task in third.tasks] == [1]


def test_one_worker_serves_several_models_from_the_same_slots() -> None:
    network = Network()
    client, worker = network.client(), network.worker("w", card("a"), card("b"), slots=1)
    client.generate(1, "a")
    client.generate(2, "b", priority=0)
    client.generate(3, "a", priority=-1)
    assert [task.rid for task in worker.tasks] == [1]
    worker.task(1).done()
    assert [task.rid for task in worker.tasks] == [3]
    worker.task(3).done()
    worker.task(2).done()
    network.assert_clean()


# --- waiting


def test_what_finds_every_slot_taken_waits_its_turn() -> None:
    network = Network()
    greedy, modest, worker = network.client(), network.client(), network.worker(slots=1)
    for rid in (1, 2, 3):
        greedy.generate(rid)
    modest.generate(4)
    modest.generate(5, priority=-1)
    served = []
    while worker.tasks:
        network.check()
        served.append(worker.tasks[0].rid)
        network.advance(0.1)
        worker.tasks[0].done()
    assert served == [1, 5, 2, 4, 3]
    assert network.ends()[-1]["queue_ms"] == pytest.approx(400)
    network.assert_clean()


@pytest.mark.parametrize("settings", [{"queue_requests": 2}, {"queue_bytes": 60}])
def test_beyond_its_bounds_the_queue_is_overloaded(settings: dict[str, Any]) -> None:
    network = Network(**settings)
    client, worker = network.client(), network.worker()
    for rid in (1, 2, 3, 4):
        client.generate(rid)
    error = client.error(4)
    assert (error.code, error.retryable) == (errors.Overloaded.code, True)
    assert error.retry_after_ms is not None
    assert error.retry_after_ms >= 50
    network.check()
    for rid in (1, 2, 3):
        worker.task(rid).done()
    network.assert_clean()


def test_an_overloaded_stranger_leaves_nothing_behind() -> None:
    network = Network(queue_requests=1)
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.generate(2)
    for _ in range(20):
        network.client().generate(3)
    assert len(network.broker.flights.clients) == 1
    worker.task(1).done()
    worker.task(2).done()
    network.assert_clean()


def test_light_requests_take_no_slot_and_pass_those_that_wait() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    client.generate(1)
    client.generate(2)
    client.request(m.CountTokens(3, "m", prompt="a"))
    client.request(m.ModelDetails(4, "m"))
    assert [task.rid for task in worker.tasks] == [1, 3, 4]
    assert worker.seen.running == 1
    for rid in (3, 4, 1, 2):
        worker.task(rid).done("ok")
    network.assert_clean()


def test_a_flood_of_light_requests_waits_instead_of_filling_the_workers_pipe() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    for rid in range(1, MOST_LIGHT + 11):
        client.request(m.CountTokens(rid, "m", prompt="a"))
    assert len(worker.tasks) == MOST_LIGHT
    network.check()
    client.generate(1000)
    assert worker.seen.running == 1
    worker.task(1).done("ok")
    assert worker.task(MOST_LIGHT + 1).head.kind == m.REQUEST
    while worker.tasks:
        worker.tasks[0].done()
    network.assert_clean()


def test_light_requests_that_waited_are_fed_although_every_slot_is_taken() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=1)
    worker.say(m.BYE)
    for rid in (1, 2):
        client.generate(rid)
    client.request(m.CountTokens(3, "m", prompt="a"))
    again = network.worker("again", slots=1)
    assert sorted(task.rid for task in again.tasks) == [1, 3]


# --- busy


def test_a_busy_workers_request_goes_elsewhere_with_no_attempt_spent() -> None:
    network = Network()
    client, one = network.client(), network.worker("one")
    client.generate(1)
    two = network.worker("two")
    one.task(1).busy()
    assert two.task(1).head.attempts == 0
    assert one.seen.free == 0
    one.load()
    assert one.seen.free == 1
    two.task(1).done()
    network.assert_clean()
    assert network.counters["busy"] == 1


def test_a_busy_workers_request_waits_at_the_head() -> None:
    network = Network()
    client, worker = network.client(), network.worker(slots=2)
    for rid in (1, 2, 3, 4):
        client.generate(rid)
    worker.task(2).busy()
    assert len(network.broker.registry.pools["m"].waiting) == 3
    worker.load(running=1, yours=1)
    assert [task.rid for task in worker.tasks] == [1, 2]
    for rid in (1, 2, 3, 4):
        worker.task(rid).done()
    network.assert_clean()


def test_busy_ends_a_request_that_was_cancelled_meanwhile() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    client.cancel(1)
    worker.task(1).busy()
    assert client.end(1).finish_reasons == ["cancelled"]
    network.assert_clean()


def test_the_slot_of_a_cancelled_request_that_was_answered_busy_goes_to_the_next_of_another_model() -> None:
    network = Network()
    worker = network.worker("w", card("m"), card("k", slots=1), slots=2)
    client = network.client()
    for rid, model in ((1, "k"), (2, "m"), (3, "m")):
        client.generate(rid, model)
    client.cancel(1)
    worker.task(1).busy()
    network.check()
    for rid in (2, 3):
        worker.task(rid).done()
    network.assert_clean()


def test_busy_ends_a_request_whose_deadline_has_passed_as_too_late() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=500)
    network.advance(0.6)
    worker.task(1).busy()
    assert client.error(1).code == errors.DeadlineExceeded.code
    network.assert_clean()


@pytest.mark.parametrize("begun", [True, False])
def test_busy_to_what_had_begun_or_takes_no_slot_breaks_the_protocol(begun: bool) -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    if begun:
        client.generate(1)
        worker.task(1).first()
    else:
        client.request(m.CountTokens(1, "m", prompt="a", attempts=1))
    task = worker.task(1)
    worker.say(m.BUSY, epoch=task.head.epoch, client=task.client, rid=1)
    assert not worker.is_registered()
    assert client.error(1).code == errors.WorkerLost.code
    network.assert_clean()
