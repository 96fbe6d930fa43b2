"""What a client does with requests whose worker or controller was lost: pure, with a wire that records and the test's own time."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.broker import chunk, done
from tests.fakes.session import TWO, World, asked, ended, moved, pair, texts
from zmqserve import messages as m
from zmqserve.errors import (
    BackendError,
    ControllerLost,
    GoingAway,
    MalformedMessage,
    ModelLoading,
    NoWorker,
    Overloaded,
    QuotaExceeded,
    RateLimited,
    StreamGap,
    UnknownModel,
    WorkerLost,
)
from zmqserve.params import Guided, SamplingParams
from zmqserve.peer import State
from zmqserve.recovery import CROWD, FIRST_PAUSE_S, MOST_LOST_WORKERS, RECOVERED_S, RECOVERED_TOKENS

# --- lost workers ------------------------------------------------------------------------------


def test_a_begun_answer_is_resumed_with_what_has_come() -> None:
    world = pair()
    call = world.begin(3, timeout_s=20.0)
    (first,) = asked(world)
    world.pass_s(1.5)
    world.lost(call)
    (again,) = asked(world)
    assert (again.rid, again.prompt, again.attempts, again.fingerprint) == (first.rid, first.prompt, 1, "f")
    assert again.resume == m.Resume(m.pack_ids([0, 1, 2]), len("t0 t1 t2 "), 3)
    assert again.deadline_ms == 18500
    assert call.resumed == 0
    world.go_on(call, 2)
    world.hear(done(call.rid, 5))
    assert texts(call) == ["t0 ", "t1 ", "t2 ", "t3 ", "t4 "]
    assert isinstance(call.end, m.Done)
    assert call.resumed == 1


def test_a_join_that_completes_the_answer_at_once_counts() -> None:
    world = pair()
    call = world.begin(3)
    world.lost(call)
    world.hear(done(call.rid, 3))
    assert isinstance(call.end, m.Done)
    assert call.resumed == 1


def test_the_join_is_exact_or_an_error() -> None:
    for seq in (2, 4):
        world = pair()
        call = world.begin(3)
        world.lost(call)
        world.hear(m.FirstChunk(call.rid, seq, 0, "x", b"", None, "f"))
        assert isinstance(call.end, StreamGap)


def test_another_model_does_not_continue_the_answer() -> None:
    world = pair()
    call = world.begin(3)
    world.lost(call)
    world.go_on(call, 1, fingerprint="g")
    assert isinstance(call.end, MalformedMessage)
    assert texts(call) == ["t0 ", "t1 ", "t2 "]
    assert m.Cancel(call.rid) in world.wire.taken()


def test_nothing_of_a_dispatch_that_was_given_up_is_taken() -> None:
    world = pair()
    call = world.begin(3)
    world.lost(call)
    world.lost(call)
    assert not call.there, "it pauses"
    world.hear(chunk(call.rid, 3), m.Chunks([chunk(call.rid, 4)]), done(call.rid, 5))
    assert (call.next_seq, ended(call), world.session.strays) == (3, None, 3)


def test_a_request_that_has_not_begun_is_sent_again_as_it_was() -> None:
    world = pair()
    call = world.open(resume=False)
    (first,) = asked(world)
    world.lost(call)
    (again,) = asked(world)
    assert (again.attempts, again.resume, again.fingerprint) == (1, None, None)
    assert (again.rid, again.prompt) == (first.rid, first.prompt)


@pytest.mark.parametrize(
    ("params", "terms", "fingerprint"),
    [
        (None, {"resume": False}, "f"),
        (None, {}, ""),
        (SamplingParams(n=2), {}, "f"),
        (SamplingParams(guided=Guided(regex="a")), {}, "f"),
    ],
    ids=["not wanted", "no fingerprint", "n", "guided"],
)
@pytest.mark.parametrize("cause", ["worker", "connection", "goaway", "going away"])
def test_what_cannot_be_resumed_ends_with_the_original_error(params: Any, terms: Any, fingerprint: str, cause: str) -> None:
    world = pair()
    call = world.open(params=params, **terms)
    world.go_on(call, 2, fingerprint)
    asked(world)
    if cause == "worker":
        world.lost(call)
    elif cause == "connection":
        world.disconnect()
    elif cause == "goaway":
        world.hear(m.GoAway("upgrade"))
    else:
        world.hear(m.Error(call.rid, GoingAway.code, "leaving", retryable=True))
    kinds = {"worker": WorkerLost, "connection": ControllerLost, "goaway": GoingAway, "going away": GoingAway}
    assert type(call.end) is kinds[cause]
    assert asked(world) == []
    assert texts(call) == ["t0 ", "t1 "]


def test_a_refused_resume_is_the_callers_affair() -> None:
    world = pair()
    call = world.begin(40)
    world.lost(call)
    world.hear(m.Error(call.rid, WorkerLost.code, "no worker left has its fingerprint", data={"model": "m"}))
    assert isinstance(call.end, WorkerLost)
    assert not call.end.retryable


def test_only_the_count_is_forgiven() -> None:
    world = pair()
    call = world.begin(2 * RECOVERED_TOKENS)
    world.lost(call, None, retryable=False)
    assert isinstance(call.end, WorkerLost)


def test_two_lost_workers_in_a_row_end_a_request() -> None:
    world = pair()
    call = world.begin(40)
    world.lost(call, 1)
    world.go_on(call, RECOVERED_TOKENS - 1)
    world.lost(call, 2, retryable=False)
    assert isinstance(call.end, WorkerLost)
    assert not call.end.retryable


def test_a_worker_that_lived_on_after_it_had_answered_forgives_too() -> None:
    """One token is no proof, since a worker may die before it has sent what it made; but it was not killed at once."""
    world = pair()
    call = world.begin(40)
    world.lost(call, 1)
    world.go_on(call, 1)
    world.pass_s(RECOVERED_S)
    asked(world)
    world.lost(call, 2, retryable=False)
    (again,) = asked(world)
    assert again.attempts == 1
    world.go_on(call, 1)
    world.lost(call, 2, retryable=False)
    assert isinstance(call.end, WorkerLost)


def test_one_of_many_that_had_progress_is_not_suspected() -> None:
    world = pair()
    call = world.begin(RECOVERED_TOKENS)
    asked(world)
    world.lost(call, 1, beside=CROWD)
    (again,) = asked(world)
    assert again.attempts == 0
    world.lost(call, 1, beside=CROWD)
    world.pass_s(FIRST_PAUSE_S)
    (again,) = asked(world)
    assert again.attempts == 1
    world.lost(call, 2, retryable=False, beside=CROWD)
    assert isinstance(call.end, WorkerLost)


def test_one_of_few_is_suspected_whatever_its_progress() -> None:
    world = pair()
    call = world.begin(RECOVERED_TOKENS)
    asked(world)
    world.lost(call, 1, beside=CROWD - 1)
    (again,) = asked(world)
    assert again.attempts == 1


def test_progress_before_a_controller_was_lost_counts_too() -> None:
    world = pair()
    call = world.begin(40)
    world.lost(call, 1)
    world.go_on(call, RECOVERED_TOKENS)
    asked(world)
    world.disconnect()
    world.welcome("c2")
    (again,) = asked(world)
    assert again.attempts == 0
    world.lost(call, 1)
    (again,) = asked(world)
    assert again.attempts == 1
    world.go_on(call, RECOVERED_TOKENS // 2)
    world.disconnect()
    world.welcome("c3")
    (again,) = asked(world)
    assert again.attempts == 1
    world.go_on(call, RECOVERED_TOKENS // 2)
    world.lost(call, 2, retryable=False)
    (again,) = asked(world)
    assert again.attempts == 1


def test_progress_forgives_but_not_for_ever() -> None:
    world = pair()
    call = world.begin(40)
    attempts, told = [], 1
    for lost in range(1, MOST_LOST_WORKERS + 1):
        asked(world)
        world.lost(call, told, retryable=told < 2)
        if lost < MOST_LOST_WORKERS:
            (again,) = asked(world)
            attempts.append(again.attempts)
            world.go_on(call, RECOVERED_TOKENS)
            told = again.attempts + 1
    assert attempts == [1] * (MOST_LOST_WORKERS - 1)
    assert isinstance(call.end, WorkerLost)
    assert not call.end.retryable
    assert call.resumed == MOST_LOST_WORKERS - 1


def test_workers_that_leave_cost_no_attempt() -> None:
    world = pair()
    call = world.begin(3)
    for _ in range(3 * MOST_LOST_WORKERS):
        asked(world)
        world.lost(call, 0)
        (again,) = asked(world)
        assert again.attempts == 0
        world.go_on(call, 1)
    assert ended(call) is None


def test_workers_that_leave_with_nothing_new_are_counted_all_the_same() -> None:
    """A worker may say it of itself, over and over."""
    world = pair()
    call = world.begin(3)
    for _ in range(1 + MOST_LOST_WORKERS):  # the first had something to show
        while not asked(world):
            world.pass_s(0.05)
            world.hear(m.Pong(world.session.controller))
        assert ended(call) is None
        world.lost(call, 0)
    assert isinstance(call.end, WorkerLost)
    assert not call.end.retryable


def test_workers_lost_without_progress_are_not_asked_for_at_once() -> None:
    world = pair()
    call = world.begin(3)
    asked(world)
    world.lost(call, 0)
    assert len(asked(world)) == 1
    world.lost(call, 0)
    assert asked(world) == []
    world.pass_s(0.06)
    assert len(asked(world)) == 1


# --- turned down for now -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Overloaded, NoWorker, ModelLoading, GoingAway, UnknownModel])
def test_what_moved_is_not_turned_away_by_what_may_pass(kind: Any) -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    for _ in range(4):
        world.hear(m.Error(call.rid, kind.code, "not now", retryable=kind.retryable))
        assert ended(call) is None
        world.pass_s(1)
        world.hear(m.Pong("c2"))
        assert len(asked(world)) == 1
    world.go_on(call, 1)
    assert call.resumed == 1


def test_a_restarted_network_is_asked_soon() -> None:
    """A controller that has just started says `retry_after_ms` 1000, but has its workers in tenths of a second."""
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    tries = 0
    for _ in range(8):
        world.hear(m.Error(call.rid, NoWorker.code, "none yet", retryable=True, retry_after_ms=1000))
        world.pass_s(0.05)
        tries += len(asked(world))
    assert tries >= 2


@pytest.mark.parametrize("kind", [Overloaded, RateLimited, QuotaExceeded])
def test_a_controller_that_says_when_is_given_its_time(kind: Any) -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    world.hear(m.Error(call.rid, kind.code, "full", retryable=True, retry_after_ms=2000))
    world.pass_s(1.9)
    assert asked(world) == []
    world.hear(m.Pong("c2"))
    world.pass_s(0.2)
    assert len(asked(world)) == 1


def test_what_may_pass_too_late_is_told_at_once() -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=20_000))
    assert isinstance(call.end, Overloaded)


def test_after_the_patience_the_last_error_is_told() -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    while ended(call) is None:
        if call.there:
            world.hear(m.Error(call.rid, NoWorker.code, "none", retryable=True))
        world.pass_s(0.05)
        world.hear(m.Pong("c2"))
    assert isinstance(call.end, NoWorker)
    assert 9 < world.now - 1001 < 11


def test_other_errors_end_what_moved() -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    moved(world, call)
    world.hear(m.Error(call.rid, BackendError.code, "broken"))
    assert isinstance(call.end, BackendError)


def test_without_retries_a_new_request_is_told_at_once() -> None:
    world = pair()
    call = world.open()
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=10))
    assert isinstance(call.end, Overloaded)


def test_retries_wait_as_long_as_they_were_told_and_then_end() -> None:
    world = pair()
    call = world.open(retries=2, timeout_s=60.0)
    for left in (1, 0):
        asked(world)
        world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=1000))
        world.pass_s(0.99)
        world.hear(m.Pong("c1"))
        assert asked(world) == []
        world.pass_s(0.52)
        (again,) = asked(world)
        assert (call.retries, again.attempts) == (left, 0)
        assert again.deadline_ms is not None
        assert again.deadline_ms < 60_000
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=1000))
    assert isinstance(call.end, Overloaded)


def test_retries_back_off_with_jitter() -> None:
    pauses = []
    for seed in range(5):
        world = World(*TWO, seed=seed).welcomed()
        world.pass_s(1)
        call = world.open(retries=4)
        for _ in range(4):
            world.hear(m.Error(call.rid, NoWorker.code, "none", retryable=True))
            assert call.pause is not None
            pauses.append(round(call.pause.when_s - world.now, 3))
            world.pass_s(call.pause.when_s - world.now)
            world.hear(m.Pong("c1"))
    for place, most in enumerate((0.1, 0.2, 0.4, 0.8)):
        assert all(most / 2 <= pause <= most for pause in pauses[place::4])
    assert len(set(pauses)) > 15


def test_retries_stay_within_the_deadline() -> None:
    world = pair()
    call = world.open(retries=5, timeout_s=1.0)
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=2000))
    assert isinstance(call.end, Overloaded)


@pytest.mark.parametrize("begun", [True, False])
def test_retries_are_for_what_may_pass_and_has_not_begun(begun: bool) -> None:
    world = pair()
    call = world.begin(1, retries=5) if begun else world.open(retries=5)
    error = m.Error(call.rid, Overloaded.code, "full", retryable=True) if begun else m.Error(call.rid, BackendError.code, "broken")
    world.hear(error)
    assert ended(call) is not None


def test_retries_outlast_a_time_without_controllers() -> None:
    world = World(*TWO)
    call = world.open(retries=3)
    world.pass_s(1.6)
    assert ended(call) is None
    assert world.session.state is not State.OPEN
    world.pass_s(0.5)
    world.welcome()
    assert call.there
    assert len(world.wire.connected) > 2


def test_a_retry_whose_controller_is_lost_meanwhile_finds_the_next() -> None:
    world = pair()
    call = world.open(retries=1)
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=20_000))
    world.disconnect()
    assert world.session.state is State.AWAY
    world.pass_s(31)
    assert world.wire.connected[:2] == list(TWO)
    assert isinstance(call.end, ControllerLost), "nobody answered in its round"
    assert world.session.next_s() is None


def test_a_retry_whose_controller_is_lost_meanwhile_has_the_patience_of_what_moves() -> None:
    world = pair()
    call = world.open(retries=1)
    world.hear(m.Error(call.rid, Overloaded.code, "full", retryable=True, retry_after_ms=500))
    world.disconnect()
    world.pass_s(9)
    assert ended(call) is None
    world.welcome()
    assert call.there


def test_an_end_that_the_controller_made_itself_keeps_what_has_come() -> None:
    world = pair()
    call = world.begin(3)
    world.hear(m.Done(call.rid, 0, ["cancelled"], m.Usage(0, 0), m.Timings("")))
    assert isinstance(call.end, m.Done)
    assert texts(call) == ["t0 ", "t1 ", "t2 "]
