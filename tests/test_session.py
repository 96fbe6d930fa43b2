"""The client's state machine, with a wire that records and time that the test passes in."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes.broker import chunk, done
from tests.fakes.session import World, asked, ended, pair, texts
from zmqserve import messages as m
from zmqserve.errors import (
    BackendError,
    ControllerLost,
    ControllerUnreachable,
    DeadlineExceeded,
    GoingAway,
    InvalidParameter,
    MalformedMessage,
    Overloaded,
    ProtocolMismatch,
    SlowConsumer,
    StreamGap,
    UnknownModel,
    WorkerLost,
)
from zmqserve.params import SamplingParams
from zmqserve.peer import State

# --- the greeting ------------------------------------------------------------------------------


def test_requests_wait_for_the_welcome() -> None:
    world = World()
    call = world.open()
    assert [type(message) for message in world.wire.taken()] == [m.Hello]
    assert not call.sent
    world.welcome("c7")
    assert [message.rid for message in world.wire.taken()] == [call.rid]
    assert (world.session.state, world.session.controller) == (State.OPEN, "c7")


def test_hello_goes_out_when_the_connection_is_there() -> None:
    world = World()
    world.wire.takes = False
    world.open()
    assert world.session.blocked
    world.wire.takes = True
    world.session.flush()
    assert [type(message) for message in world.wire.taken()] == [m.Hello]
    assert not world.session.blocked


def test_absent_controllers_are_tried_in_order_and_then_named() -> None:
    world = World("tcp://a:1", "tcp://b:2")
    first, second = world.open(), world.open()
    world.pass_s(1.4)
    assert world.wire.connected == ["tcp://a:1", "tcp://b:2"]
    assert first.end is None
    world.pass_s(0.2)
    for call in (first, second):
        assert isinstance(call.end, ControllerUnreachable)
        assert call.end.data["endpoints"] == ["tcp://a:1", "tcp://b:2"]
        assert "tcp://a:1 or tcp://b:2" in str(call.end)
    assert first.end is not second.end
    assert world.session.next_s() is None


def test_the_second_endpoint_takes_the_requests_that_waited() -> None:
    world = World("tcp://a:1", "tcp://b:2")
    call = world.open()
    world.pass_s(0.8)
    world.welcome()
    assert call.sent
    world.pass_s(2)
    assert ended(call) is None


def test_after_unreachable_a_new_request_greets_again() -> None:
    world = World()
    world.open()
    world.pass_s(1)
    call = world.open()
    assert world.wire.connected == ["tcp://a:1"] * 2
    world.welcome()
    assert call.sent


@pytest.mark.parametrize(("theirs", "older"), [(2, "client"), (0, "controller")])
def test_another_protocol_version_is_refused_naming_both(theirs: int, older: str) -> None:
    world = World()
    call = world.open()
    world.hear(m.Welcome(theirs, "c1", m.Limits(), "9.9"))
    assert isinstance(call.end, ProtocolMismatch)
    assert not call.end.retryable
    assert f"protocol {theirs} (zmqserve 9.9), this client protocol {m.PROTOCOL}; upgrade the {older}" in str(call.end)
    assert not any(isinstance(message, m.Generate) for message in world.wire.taken())


def test_a_refused_hello_ends_what_waits_with_the_controllers_error() -> None:
    world = World()
    call = world.open()
    world.hear(m.Error(0, ProtocolMismatch.code, "protocol 1 is too old here"))
    assert isinstance(call.end, ProtocolMismatch)
    assert str(call.end) == "protocol 1 is too old here"
    assert world.session.state is State.AWAY


def test_a_message_over_the_controllers_limit_is_not_sent() -> None:
    world = World()
    held, fits = world.open(prompt="x" * 1000), world.open()
    world.welcome(message_bytes=200)
    assert isinstance(held.end, InvalidParameter)
    assert held.end.data["limit_bytes"] == 200
    assert fits.sent
    with pytest.raises(InvalidParameter, match=r"is 10\d\d bytes, the controller takes at most 200"):
        world.open(prompt="x" * 1000)
    assert [message.rid for message in world.wire.taken()[1:]] == [fits.rid]


def test_a_text_that_is_not_unicode_is_not_sent() -> None:
    world = World()
    with pytest.raises(InvalidParameter, match="surrogate"):
        world.open(prompt="a\ud800b")
    assert world.session.calls == {}


def test_after_a_long_silence_the_controller_is_greeted_on_the_same_connection() -> None:
    world = World().welcomed()
    world.pass_s(60)
    call = world.open()
    assert [type(message) for message in world.wire.taken()] == [m.Hello]
    assert len(world.wire.connected) == 1
    world.welcome()
    assert call.sent


def test_an_old_connection_that_leads_nowhere_is_made_anew_before_the_controller_counts_as_absent() -> None:
    world = World().welcomed()
    world.pass_s(60)
    first = world.open()
    world.pass_s(0.5)
    second = world.open()
    world.pass_s(0.3)
    assert world.wire.connected == ["tcp://a:1"] * 2
    assert [type(message) for message in world.wire.taken()] == [m.Hello] * 2
    world.welcome()
    assert first.sent
    assert second.sent


@pytest.mark.parametrize("endpoints", [("tcp://a:1",), ("tcp://a:1", "tcp://b:2")])
def test_after_a_long_silence_each_endpoint_is_dialed_once_and_then_named(endpoints: tuple[str, ...]) -> None:
    world = World(*endpoints).welcomed()
    world.pass_s(60)
    call = world.open()
    world.pass_s(0.75 * (1 + len(endpoints)) - 0.01)
    assert sorted(world.wire.connected[1:]) == sorted(endpoints)
    assert ended(call) is None
    world.pass_s(0.02)
    assert isinstance(call.end, ControllerUnreachable)
    assert len(world.wire.connected) == 1 + len(endpoints)
    assert world.session.next_s() is None


def test_after_a_long_silence_the_next_controller_takes_what_an_old_connection_does_not() -> None:
    world = World("tcp://a:1", "tcp://b:2").welcomed()
    world.pass_s(60)
    call = world.open()
    world.pass_s(0.8)
    assert world.wire.connected == ["tcp://a:1", "tcp://b:2"]
    world.welcome()
    assert call.sent


def test_after_a_long_silence_who_is_patient_waits_for_the_controller_to_be_back() -> None:
    world = World().welcomed()
    world.pass_s(60)
    patient, other = world.open(patient=True), world.open()
    world.pass_s(9)
    assert isinstance(other.end, ControllerUnreachable)
    assert ended(patient) is None
    world.welcome()
    assert patient.sent


def test_who_is_patient_and_could_not_be_sent_to_a_controller_that_was_lost_waits_for_it_to_be_back() -> None:
    world = World().welcomed()
    world.open()
    world.wire.takes = False
    patient = world.open(patient=True)
    world.disconnect()
    world.wire.takes = True
    world.pass_s(9)
    assert ended(patient) is None
    world.welcome()
    assert patient.sent


@pytest.mark.parametrize("code", [GoingAway.code, WorkerLost.code, Overloaded.code])
def test_whatever_answers_a_hello_is_no_word_about_a_request(code: int) -> None:
    """It would be sent again at once, to the same, without end, and then twice."""
    world = World()
    call = world.open()
    world.hear(m.Error(0, code, "not now", True))
    assert ended(call).code == code
    assert world.wire.connected == ["tcp://a:1"]
    again = world.open(retries=1)
    world.hear(m.Error(0, code, "not now", True))
    world.pass_s(0.2)
    world.welcome()
    assert again.sent
    assert asked(world) == [again.request]


def test_a_connection_found_broken_is_made_anew() -> None:
    world = World().welcomed()
    world.pass_s(1)
    world.wire.takes = False
    call = world.open()
    assert len(world.wire.connected) == 2
    world.wire.takes = True
    world.session.flush()
    world.welcome()
    assert call.sent


# --- streams -----------------------------------------------------------------------------------


def test_chunks_arrive_in_order_and_done_ends_them() -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    world.hear(m.Chunks([chunk(call.rid, 0), chunk(other.rid, 0), chunk(call.rid, 1)]), chunk(call.rid, 2))
    last = chunk(call.rid, 3)
    world.hear(done(call.rid, 3, last=last))
    assert texts(call) == ["t0 ", "t1 ", "t2 ", "t3 "]
    assert isinstance(call.end, m.Done)
    assert (bytes(call.received[0].token_ids), call.next_seq) == (m.pack_ids(range(4)), 4)
    assert other.end is None
    assert list(world.session.calls) == [other.rid]


def test_a_collected_call_keeps_the_whole_and_wakes_once() -> None:
    world = World().welcomed()
    call = world.open(collect=True)
    wakes: list[int] = []
    call.waiter = lambda: wakes.append(call.next_seq)
    world.hear(chunk(call.rid, 0), chunk(call.rid, 1))
    assert not call.ready
    world.hear(done(call.rid, 2))
    assert wakes == [2]
    assert call.received[0].texts == ["t0 ", "t1 "]


def test_choices_are_kept_apart() -> None:
    world = World().welcomed()
    call = world.open(params=SamplingParams(n=2))
    world.hear(chunk(call.rid, 0, "a"), chunk(call.rid, 1, "b", index=1), chunk(call.rid, 2, "c"))
    assert [received.texts for received in call.received] == [["a", "c"], ["b"]]


@pytest.mark.parametrize(("seqs", "what"), [([0, 2], "missing: expected seq 1, got 2"), ([0, 0], "twice: expected seq 1, got 0")])
def test_a_gap_or_a_repeat_ends_that_stream_only(seqs: list[int], what: str) -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    world.wire.taken()
    world.hear(*(chunk(call.rid, seq) for seq in seqs), chunk(other.rid, 0))
    assert texts(call) == ["t0 "]
    assert isinstance(call.end, StreamGap)
    assert what in str(call.end)
    assert world.wire.taken() == [m.Cancel(call.rid)]
    assert texts(other) == ["t0 "]


def test_a_done_that_skips_a_chunk_is_a_gap() -> None:
    world = World().welcomed()
    call = world.open()
    world.hear(chunk(call.rid, 0), done(call.rid, 2))
    assert isinstance(call.end, StreamGap)


def test_an_error_is_typed_and_carries_its_data() -> None:
    world = World().welcomed()
    call, busy = world.open(), world.open()
    world.hear(m.Error(call.rid, UnknownModel.code, "no model m", data={"known_models": ["a", "b"]}))
    world.hear(m.Error(busy.rid, Overloaded.code, "full", retryable=True, retry_after_ms=250))
    assert isinstance(call.end, UnknownModel)
    assert call.end.known_models == ["a", "b"]
    assert isinstance(busy.end, Overloaded)
    assert (busy.end.retryable, busy.end.retry_after_ms) == (True, 250)


@pytest.mark.parametrize(
    "answer",
    [
        m.Tokens(2, 5),
        m.Reply(2, [], m.Usage(1, 1), m.Timings("w")),
        m.Chunk(2, 0, 1, "x", b""),
        m.Chunk(2, 0, -1, "x", b""),
        m.Chunk(2, 0, 0, "x", b"abc"),
        m.Done(2, 0, [], m.Usage(1, 1), m.Timings("w")),
        done(2, 0, last=chunk(3, 0)),
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_of_the_wrong_kind_ends_the_request(answer: Any) -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    assert (call.rid, other.rid) == (2, 3)
    world.hear(answer)
    assert isinstance(call.end, MalformedMessage)
    assert other.end is None


def test_garbage_is_counted_and_ends_only_what_it_names() -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    world.hear(b"", b"\xff\xfe", b"\x91" * 100_000, m.encode((200, call.rid)), b"\x93\x24\x02", m.encode((36, "x")))
    assert world.session.malformed == 6
    assert isinstance(call.end, MalformedMessage)
    assert other.end is None


def test_messages_for_unknown_requests_are_dropped_and_counted() -> None:
    world = World().welcomed()
    call = world.open()
    world.hear(
        chunk(77, 0), m.Chunks([chunk(77, 1), chunk(78, 0)]), done(77, 2), m.Error(77, BackendError.code, "x"), m.Error(0, 40001, "x")
    )
    assert world.session.strays == 6
    assert ended(call) is None


def test_an_unread_stream_is_bounded_and_others_go_on() -> None:
    world = World(buffer_bytes=10_000).welcomed()
    slow, other, whole = world.open(), world.open(), world.open(collect=True)
    world.wire.taken()
    for seq in range(60):
        world.hear(m.Chunks([chunk(call.rid, seq, "x" * 200) for call in (slow, other, whole)]))
        assert texts(other) == ["x" * 200]
    assert isinstance(slow.end, SlowConsumer)
    assert world.wire.taken() == [m.Cancel(slow.rid)]
    assert 20 < len(texts(slow)) < 50
    assert other.end is whole.end is None


def test_a_chunk_larger_than_the_buffer_passes_when_nothing_is_unread() -> None:
    world = World(buffer_bytes=1000).welcomed()
    call = world.open()
    for seq in range(3):
        world.hear(chunk(call.rid, seq, "x" * 5000))
        assert texts(call) == ["x" * 5000]
    world.hear(chunk(call.rid, 3, "x" * 5000))
    assert ended(call) is None
    world.hear(chunk(call.rid, 4, "x"))
    assert isinstance(call.end, SlowConsumer)


def test_what_the_controller_has_no_deadline_for_ends_on_time() -> None:
    world = World().welcomed()
    listing = m.ListModels(77)
    call = world.session.open(world.now, listing, timeout_s=1.0, collect=True)
    world.pass_s(1.01)
    assert isinstance(call.end, DeadlineExceeded)


def test_a_reader_that_never_catches_up_is_bounded_by_what_is_unread_now() -> None:
    """However much it has read before, and though something is always unread."""
    world = World(buffer_bytes=10_000).welcomed()
    call = world.open()
    seq = 0
    world.hear(chunk(call.rid, seq, "x" * 200))
    for _ in range(100):
        for _ in range(20):
            seq += 1
            world.hear(chunk(call.rid, seq, "x" * 200))
        assert [call.take() is not None for _ in range(20)] == [True] * 20
    assert ended(call) is None
    assert len(call.chunks or ()) == 1
    heard = 1
    while call.end is None:
        seq += 1
        heard += 1
        world.hear(chunk(call.rid, seq, "x" * 200))
    assert isinstance(call.end, SlowConsumer)
    assert 10_000 // 400 < heard <= 10_000 // 200


def test_endless_empty_chunks_are_bounded_too() -> None:
    world = World(buffer_bytes=10_000).welcomed()
    call = world.open()
    for seq in range(200):
        world.hear(m.Chunk(call.rid, seq, 0, "", b""))
    assert isinstance(call.end, SlowConsumer)


def test_requests_for_later_leave_together_and_a_lone_one_at_once() -> None:
    world = World().welcomed()
    calls = [world.open(later=True) for _ in range(4)]
    assert [request.rid for request in asked(world)] == [calls[0].rid]
    assert [call.sent for call in calls] == [True, False, False, False]
    assert world.session.blocked
    world.session.cancel(calls[2])
    world.session.flush()
    assert [request.rid for request in asked(world)] == [calls[1].rid, calls[3].rid]
    assert not world.session.blocked


def test_thousands_of_requests_for_later_do_not_all_wait_for_the_last_one() -> None:
    world = World().welcomed()
    calls = [world.open(later=True) for _ in range(1000)]
    early = [request.rid for request in asked(world)]
    assert len(early) > 900
    world.session.flush()
    assert early + [request.rid for request in asked(world)] == [call.rid for call in calls]


def test_a_request_for_later_moves_like_any_other_that_was_not_sent() -> None:
    world = pair()
    first, later = world.open(), world.open(later=True)
    world.disconnect()
    world.wire.taken()
    world.welcome()
    assert [request.rid for request in asked(world)] == [first.rid, later.rid]


def test_a_waiter_hears_of_what_can_be_read_and_not_of_the_leaving() -> None:
    world = World().welcomed()
    world.open()
    call = world.open(later=True)
    heard: list[str] = []
    call.waiter = lambda: heard.append("waiter")
    call.on_left = lambda: heard.append("left")
    world.session.flush()
    assert heard == ["left"]
    world.hear(chunk(call.rid, 0))
    assert heard == ["left", "waiter"]
    unsent = world.open(later=True)
    unsent.on_left = lambda: heard.append("ended")
    world.session.cancel(unsent)
    assert heard == ["left", "waiter", "ended"]


# --- ending it -------------------------------------------------------------------------------


def test_cancel_is_sent_once_and_late_chunks_are_dropped() -> None:
    world = World().welcomed()
    call = world.open()
    world.wire.taken()
    world.session.cancel(call)
    world.session.cancel(call)
    world.hear(chunk(call.rid, 0), done(call.rid, 1, "cancelled"))
    assert world.wire.taken() == [m.Cancel(call.rid)]
    assert call.end == m.Cancel(call.rid)
    assert texts(call) == []
    assert world.session.strays == 2


def test_a_request_cancelled_before_it_was_sent_never_is() -> None:
    world = World()
    call, other = world.open(), world.open()
    world.session.cancel(call)
    world.welcome()
    assert [message.rid for message in world.wire.taken()[1:]] == [other.rid]


def test_a_cancel_goes_before_the_requests_that_wait() -> None:
    world = World().welcomed()
    first = world.open()
    world.wire.takes = False
    second, third = world.open(), world.open()
    world.session.cancel(first)
    assert world.session.blocked
    world.wire.takes = True
    world.wire.taken()
    world.session.flush()
    assert [(type(message), message.rid) for message in world.wire.taken()] == [
        (m.Cancel, first.rid),
        (m.Generate, second.rid),
        (m.Generate, third.rid),
    ]


def test_a_ping_goes_before_the_requests_that_wait() -> None:
    world = World().welcomed()
    first = world.open()
    world.wire.taken()
    world.wire.takes = False
    second = world.open()
    world.pass_s(0.2)
    world.wire.takes = True
    world.session.flush()
    assert [type(message) for message in world.wire.taken()] == [m.Ping, m.Generate]
    world.hear(m.Pong("c1", [second.rid]))
    assert not world.wire.taken(), "the second was sent after the Ping"
    assert first.there


def test_a_deadline_that_the_controller_does_not_enforce_is_enforced_here() -> None:
    world = World().welcomed()
    call = world.open(timeout_s=5)
    world.wire.taken()
    for _ in range(59):
        world.pass_s(0.1)
        world.hear(m.Pong("c1"))
    assert ended(call) is None
    world.pass_s(0.2)
    assert isinstance(call.end, DeadlineExceeded)
    assert m.Cancel(call.rid) in world.wire.taken()


def test_an_ended_request_leaves_no_timer() -> None:
    world = World().welcomed()
    call = world.open(timeout_s=100)
    world.hear(done(call.rid, 0))
    world.pass_s(5)
    assert world.session.next_s() is None


def test_close_ends_everything_with_an_error() -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    world.wire.taken()
    world.session.close()
    assert world.wire.taken() == [m.Cancel(call.rid), m.Cancel(other.rid)]
    assert "closed" in str(call.end)
    assert world.session.next_s() is None


# --- liveness --------------------------------------------------------------------------------


def test_pings_name_what_is_open_and_stop_with_the_last_request() -> None:
    world = World().welcomed()
    call, other = world.open(), world.open()
    world.wire.taken()
    world.pass_s(0.11)
    assert world.wire.taken() == [m.Ping(3000, [call.rid, other.rid])], "soon: until then the controller does not know the ttl"
    world.hear(m.Pong("c1"), done(call.rid, 0))
    world.pass_s(0.9)
    assert world.wire.taken() == []
    world.pass_s(0.11)
    assert world.wire.taken() == [m.Ping(3000, [other.rid])]
    world.hear(done(other.rid, 0))
    world.pass_s(10)
    assert world.wire.taken() == []
    assert world.session.next_s() is None


@pytest.mark.parametrize(("endpoints", "told_ms", "lost_s"), [(1, 0, 3.0), (1, 6000, 6.0), (1, 1500, 1.5), (2, 0, 2.4), (2, 1500, 1.2)])
def test_a_controller_is_judged_by_the_ttl_that_it_tells(endpoints: int, told_ms: int, lost_s: float) -> None:
    """A little sooner where there is another one to turn to."""
    world = World(*["tcp://a:1", "tcp://b:2"][:endpoints]).welcomed(ttl_ms=told_ms)
    world.pass_s(1)
    call = world.open(resume=False)
    world.hear(chunk(call.rid, 0))
    world.pass_s(lost_s - 0.1)
    assert ended(call) is None
    world.pass_s(0.2)
    assert isinstance(call.end, ControllerLost)
    assert "silent" in str(call.end)
    assert call.end.retryable
    assert texts(call) == ["t0 "]
    assert world.session.state is State.AWAY


def test_any_answer_keeps_the_controller() -> None:
    world = World().welcomed()
    call = world.open()
    for seq in range(10):
        world.pass_s(2)
        world.hear(chunk(call.rid, seq))
    assert ended(call) is None


def test_a_client_that_was_suspended_does_not_blame_the_controller() -> None:
    world = World().welcomed()
    call = world.open()
    world.now += 60
    world.session.tick(world.now)
    assert ended(call) is None
    world.hear(m.Pong("c1"))
    world.pass_s(2.5)
    assert ended(call) is None
