"""How a client finds another controller, and what moves there: pure, with a wire that records and the test's own time."""

from __future__ import annotations

import pytest

from tests.fakes.broker import chunk, done
from tests.fakes.session import TWO, World, asked, ended, moved, pair
from zmqserve import messages as m
from zmqserve.errors import (
    ControllerLost,
    ControllerUnreachable,
    DeadlineExceeded,
    ProtocolMismatch,
)
from zmqserve.peer import State
from zmqserve.recovery import MOST_LOST_CONTROLLERS

# --- lost controllers ----------------------------------------------------------------------------


@pytest.mark.parametrize("cause", ["disconnected", "silent", "goaway"])
def test_requests_of_a_lost_controller_go_to_the_next_at_once(cause: str) -> None:
    world = pair()
    begun, waiting, listing = world.begin(3), world.open(), world.ask(m.ListModels(99))
    if cause == "disconnected":
        world.disconnect()
    elif cause == "silent":
        world.pass_s(3)
    else:
        world.hear(m.GoAway("upgrade"))
    assert world.wire.connected == list(TWO)
    world.hear(m.Pong("c1"), chunk(begun.rid, 3))
    world.wire.taken()
    world.welcome("c2")
    sent = world.wire.taken()
    assert [(type(message), message.rid) for message in sent] == [
        (m.Generate, begun.rid),
        (m.Generate, waiting.rid),
        (m.ListModels, listing.rid),
    ]
    assert sent[0].resume is not None
    assert sent[0].resume.next_seq == begun.next_seq
    assert (sent[0].attempts, sent[1].attempts, sent[1].resume) == (0, 0, None)
    assert world.session.controller == "c2"
    world.go_on(begun, 1)
    assert begun.resumed == 1


def test_an_old_connections_word_does_not_count_while_the_next_is_awaited() -> None:
    """The only endpoint was connected a moment ago: it is not dialed again so soon."""
    world = World().welcomed()
    call = world.begin(3)
    world.disconnect()
    assert world.session.state is State.AWAY
    world.wire.taken()
    world.hear(chunk(call.rid, 3), done(call.rid, 4), m.Pong("another"))
    assert (call.next_seq, ended(call), world.wire.taken()) == (3, None, [])
    world.pass_s(0.75)
    assert world.wire.connected == ["tcp://a:1"] * 2
    assert moved(world, call).resume is not None


def test_attempts_stay_as_they_were() -> None:
    world = pair()
    call = world.begin(3)
    world.lost(call, 1)
    world.disconnect()
    assert moved(world, call).attempts == 1


def test_what_was_not_sent_yet_moves_without_a_word() -> None:
    world = pair()
    world.begin(1)
    world.wire.takes = False
    held = world.open()
    world.wire.takes = True
    world.disconnect()
    assert moved(world, held).resume is None
    assert held.recovery is None


def test_begun_answers_go_before_the_others() -> None:
    world = pair()
    waiting, begun = world.open(), world.begin(2)
    world.disconnect()
    world.wire.taken()
    world.welcome()
    assert [message.rid for message in asked(world)] == [begun.rid, waiting.rid]


def test_the_loop_of_endpoints_goes_on_until_the_patience_is_over() -> None:
    world = pair()
    begun, waiting = world.begin(1), world.open()
    world.disconnect()
    world.pass_s(9.9)
    assert world.wire.connected[:6] == ["tcp://a:1", "tcp://b:2"] * 3
    assert begun.end is waiting.end is None
    world.pass_s(0.2)
    for call in (begun, waiting):
        assert isinstance(call.end, ControllerLost)
        assert "broke, and none answered at tcp://a:1 or tcp://b:2 within 10 s" in str(call.end)
    world.pass_s(2)
    assert world.session.next_s() is None


def test_new_requests_join_but_only_for_one_round() -> None:
    world = pair()
    begun = world.begin(1)
    world.disconnect()
    world.pass_s(0.3)
    new = world.open()
    world.pass_s(0.45 + 1.4)
    assert ended(new) is None
    world.pass_s(0.2)
    assert isinstance(new.end, ControllerUnreachable)
    late = world.open()
    assert ended(begun) is None
    world.welcome()
    assert {message.rid for message in asked(world)} == {begun.rid, late.rid}


def test_after_an_answer_the_patience_is_whole_again() -> None:
    world = pair()
    call = world.begin(1)
    for _ in range(2 * MOST_LOST_CONTROLLERS):
        world.disconnect()
        world.pass_s(8)
        world.welcome()
        world.go_on(call, 1)
        world.pass_s(1)
    assert ended(call) is None
    assert call.resumed == 2 * MOST_LOST_CONTROLLERS


def test_controllers_that_welcome_and_leave_do_not_take_the_time_of_others() -> None:
    """Each is dialed once in a while, and the patience does not begin anew."""
    world = pair()
    call = world.begin(1)
    world.disconnect()
    for _ in range(200):
        world.welcome()
        world.hear(m.GoAway("again"))
        world.pass_s(0.06)
    assert isinstance(call.end, ControllerLost)
    assert len(world.wire.connected) < 40


def test_a_request_that_controllers_die_of_ends() -> None:
    world = pair()
    call = world.open()
    for _ in range(MOST_LOST_CONTROLLERS):
        assert ended(call) is None
        world.pass_s(2)
        world.hear(m.Pong("c1"))
        world.disconnect()
        world.welcome()
    assert isinstance(call.end, ControllerLost)


def test_a_deadline_passes_while_no_controller_is_there() -> None:
    world = pair()
    call, other = world.begin(1, timeout_s=3.0), world.begin(1, timeout_s=30.0)
    world.disconnect()
    world.pass_s(2.9)
    assert ended(call) is None
    world.pass_s(0.2)
    assert isinstance(call.end, DeadlineExceeded)
    again = moved(world, other)
    assert again.deadline_ms is not None
    assert 26_500 < again.deadline_ms <= 27_000


def test_a_first_request_tells_what_is_left_after_the_greeting() -> None:
    world = World()
    world.open(timeout_s=2.0)
    world.pass_s(0.5)
    world.welcome()
    assert [message.deadline_ms for message in asked(world)] == [1500]


def test_another_version_at_one_endpoint_does_not_end_what_moves() -> None:
    world = pair()
    call = world.begin(1)
    world.disconnect()
    world.hear(m.Welcome(7, "c2", m.Limits(), "9.9"))
    assert world.wire.connected == ["tcp://a:1", "tcp://b:2", "tcp://a:1"]
    new = world.open()
    assert moved(world, call, controller="c1").resume is not None
    assert ended(new) is None


def test_a_new_request_is_told_that_the_only_one_to_answer_refused() -> None:
    world = World(*TWO)
    call = world.open()
    world.hear(m.Welcome(7, "c2", m.Limits(), "9.9"))
    assert world.wire.connected == list(TWO)
    world.pass_s(1)
    assert isinstance(call.end, ProtocolMismatch)


def test_a_connection_that_breaks_while_nothing_is_open_costs_nothing() -> None:
    world = pair()
    world.disconnect()
    assert (world.session.state, world.session.next_s()) == (State.AWAY, None)
    call = world.open()
    assert world.wire.connected == list(TWO)
    assert moved(world, call).attempts == 0


def test_a_connection_that_breaks_in_the_greeting_is_greeted_again() -> None:
    world = World()
    world.open()
    world.wire.taken()
    world.disconnect()
    assert world.session.blocked
    world.session.flush()
    assert [type(message) for message in world.wire.taken()] == [m.Hello]


def test_pong_disowns_requests_of_a_connection_that_broke_unseen() -> None:
    world = pair()
    call, other = world.begin(2), world.open()
    world.pass_s(1.01)
    late = world.open()
    world.wire.taken()
    world.hear(m.Pong("c1", [call.rid, late.rid, 999]))
    (again,) = asked(world)
    assert again.rid == call.rid
    assert again.resume is not None
    assert late.there, "it was sent after the Ping that this Pong answers"
    assert other.there


def test_a_pong_that_answers_an_earlier_ping_disowns_nothing() -> None:
    """Several may be under way: what was sent again is not known to those that were sent before it."""
    world = pair()
    call = world.begin(2)
    world.pass_s(2.2)
    pings = [message for message in world.wire.taken() if isinstance(message, m.Ping)]
    assert len(pings) == 3
    world.hear(m.Pong("c1", [call.rid]))
    assert len(asked(world)) == 1
    world.pass_s(1)
    world.hear(m.Pong("c1", [call.rid]), m.Pong("c1", [call.rid]))
    assert asked(world) == []
    world.hear(m.Pong("c1", [call.rid]))
    assert len(asked(world)) == 1


def test_pings_are_counted_anew_on_each_connection() -> None:
    world = pair()
    call = world.begin(2)
    world.pass_s(2.2)
    world.disconnect()
    world.welcome("c2")
    world.pass_s(0.5)
    world.wire.taken()
    world.hear(m.Pong("c2", [call.rid]))
    assert len(asked(world)) == 1


def test_a_ping_that_never_left_does_not_count() -> None:
    world = pair()
    call = world.begin(2)
    world.wire.takes = False
    world.pass_s(1.2)
    world.wire.takes = True
    world.session.flush()
    assert [type(message) for message in world.wire.taken()[1:]] == [m.Ping]
    world.hear(m.Pong("c1"))
    late = world.open()
    world.pass_s(1)
    world.wire.taken()
    world.hear(m.Pong("c1", [call.rid, late.rid]))
    assert [message.rid for message in asked(world)] == [call.rid, late.rid]


def test_a_replaced_controller_is_greeted_and_gets_what_it_does_not_know() -> None:
    world = pair()
    call, single = world.begin(2), world.begin(2, resume=False)
    world.pass_s(1.01)
    world.wire.taken()
    world.hear(m.Pong("c2", [call.rid, single.rid]))
    assert [type(message) for message in world.wire.taken()] == [m.Hello, m.Generate]
    assert isinstance(single.end, ControllerLost)
    assert "c2" in str(single.end)
    world.welcome("c2", message_bytes=5000)
    assert world.session.limits.message_bytes == 5000


def test_cancel_and_close_end_what_moves() -> None:
    world = pair()
    call, other = world.begin(1), world.begin(1)
    world.disconnect()
    world.wire.taken()
    world.session.cancel(call)
    assert call.end == m.Cancel(call.rid)
    world.session.close()
    assert "closed" in str(other.end)
    assert not [message for message in world.wire.taken() if isinstance(message, m.Cancel)], "nobody has them"
    assert (world.session.state, world.session.next_s()) == (State.AWAY, None)


def test_cancels_are_for_the_controller_that_has_the_request() -> None:
    world = pair()
    call, other = world.begin(1), world.begin(1)
    world.wire.takes = False
    world.session.cancel(call)
    world.wire.takes = True
    world.disconnect()
    world.wire.taken()
    world.welcome("c2")
    assert [(type(message), message.rid) for message in world.wire.taken()] == [(m.Generate, other.rid)]


def test_a_request_that_outgrew_the_next_controller_ends() -> None:
    world = pair()
    call = world.begin(100)
    world.disconnect()
    world.welcome("c2", message_bytes=200)
    assert ended(call) is not None
    assert "takes at most 200" in str(call.end)
