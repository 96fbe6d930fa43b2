"""What clients and workers make of handshakes that fail: pure, fed with time and what the socket tells."""

from __future__ import annotations

import pytest
import zmq

from tests.fakes.session import TWO, World, asked, ended, pair
from tests.test_link import Host
from zmqserve import curve
from zmqserve import messages as m
from zmqserve.call import Call
from zmqserve.curve import Handshakes
from zmqserve.errors import Unauthenticated
from zmqserve.link import FRESH_SOCKET_S
from zmqserve.peer import State

BEGUN, DONE = int(zmq.EVENT_CONNECTED), int(zmq.EVENT_HANDSHAKE_SUCCEEDED)
AUTH, CUT = int(zmq.EVENT_HANDSHAKE_FAILED_AUTH), int(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
PROTOCOL, MISMATCH = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL), int(zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH)


def told(handshakes: Handshakes, *events: tuple[int, int]) -> str:
    """What it makes of these."""
    for event, value in events:
        handshakes.tell(event, value)
    return handshakes.why


def test_why_a_handshake_failed_is_told_with_what_to_do() -> None:
    assert "`zmqserve keys allow DIR client FILE.key`" in told(Handshakes("clients", with_key=True), (AUTH, 400))
    assert "`zmqserve keys allow DIR worker FILE.key`" in told(Handshakes("workers", with_key=True), (AUTH, 400))
    assert "without CURVE" in told(Handshakes("clients", with_key=True), (PROTOCOL, MISMATCH))
    assert "it wants CURVE: give key" in told(Handshakes("clients", with_key=False), (PROTOCOL, MISMATCH))


def test_a_connection_that_is_cut_once_may_mean_nothing_twice_it_is_the_wrong_key() -> None:
    """A controller with another key than the one that was given just ends the connection; one that is being stopped does so, too."""
    cut = ((BEGUN, 0), (CUT, 32))
    handshakes = Handshakes("workers", with_key=True)
    assert told(handshakes, *cut) == ""
    assert "controller_key must be the workers-port.key" in told(handshakes, *cut)
    assert told(handshakes, (BEGUN, 0), (DONE, 0)) == ""
    assert told(handshakes, *cut) == ""
    assert told(Handshakes("workers", with_key=False), *cut * 3) == ""


def test_a_controller_that_takes_too_long_has_not_said_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends handshakes that are not finished after a second; when many come at once that is no wrong key, however late it is noticed."""
    now_s = 100.0
    monkeypatch.setattr(curve, "monotonic", lambda: now_s)
    handshakes = Handshakes("clients", with_key=True)
    for _ in range(5):
        now_s += 1.0
        assert told(handshakes, (BEGUN, 0), (CUT, 32)) == ""
    handshakes = Handshakes("clients", with_key=True)
    now_s += 3.0  # in which the client's own loop was busy
    assert told(handshakes, *((BEGUN, 0), (CUT, 32)) * 3) == ""
    for _ in range(20):  # but this one is refused, each time sooner than that
        now_s += 0.5
        told(handshakes, (BEGUN, 0), (CUT, 32))
    assert "controller_key" in handshakes.why
    assert told(handshakes, (BEGUN, 0), (DONE, 0)) == ""
    now_s += 3600
    assert told(handshakes, *((BEGUN, 0), (CUT, 32)) * 2) != ""


def shut_out(host: Host, why: str = "no such key") -> None:
    """The socket tells of it, once it has told that the connection broke."""
    host.connected = False
    host.link.disconnected(host.now)
    host.link.shut_out(host.now, why)


def wait_for_fresh_socket(host: Host) -> None:
    """Let time pass until the link asks for one; `now` is then."""
    host.take()
    while True:
        due_s = host.link.tick(host.now)
        if "fresh socket" in host.events:
            return
        host.now = due_s


def test_a_worker_that_is_shut_out_says_so_once_and_tries_again_with_fresh_sockets() -> None:
    host = Host()
    host.connected = False
    host.link.tick(host.now)
    shut_out(host)
    assert host.events.count("registering") == 1
    assert host.link.refusal is not None
    assert (host.link.refusal.code, host.link.refusal.why) == (Unauthenticated.code, "no such key")
    for _ in range(3):
        began_s = host.now
        wait_for_fresh_socket(host)
        assert FRESH_SOCKET_S[0] <= host.now - began_s <= FRESH_SOCKET_S[1]
        shut_out(host)
        assert "registering" not in host.events
        assert "registering silent" not in host.events
    wait_for_fresh_socket(host)
    shut_out(host, "another reason")
    assert "registering" in host.events


def test_a_worker_that_is_let_in_at_last_is_as_any_other() -> None:
    host = Host()
    shut_out(host)
    host.connects = True
    while not host.connected:
        host.now = host.link.tick(host.now)
    assert m.READY in host.take()
    host.welcome()
    assert (host.link.state, host.link.refusal) == ("registered", None)
    host.now += 0.1
    shut_out(host)  # its connection breaks, and then its key is not allowed any more
    assert "registering" in host.events
    assert host.link.refusal is not None


def test_a_worker_that_drains_is_not_kept_by_a_controller_that_shuts_it_out() -> None:
    host = Host()
    shut_out(host)
    host.link.drain()
    host.take()
    for _ in range(5):
        host.now += 10
        host.link.tick(host.now)
    assert host.events.count("fresh socket") == 0


def test_one_that_was_refused_for_good_stays_so() -> None:
    host = Host()
    host.hear(m.REFUSED, 0, m.encode(m.Refused(40103, "no")))
    shut_out(host)
    assert host.link.state == "refused"


# --- a client ------------------------------------------------------------------------------------


def test_a_client_that_is_shut_out_is_told_at_once() -> None:
    world = World()
    call = world.open()
    world.disconnect()
    world.session.on_shut_out(world.now, "no such key")
    assert isinstance(ended(call), Unauthenticated)
    assert str(call.end) == "the controller at tcp://a:1 does not let this client in: no such key"
    assert world.session.state is State.AWAY
    assert world.session.next_s() is None


def test_it_asks_the_other_endpoints_first_and_names_the_one_that_said_no() -> None:
    world = World(*TWO)
    call = world.open()
    world.session.on_shut_out(world.now, "no such key")
    assert world.wire.connected == list(TWO)
    assert ended(call) is None
    world.pass_s(1)  # nobody is at the second
    assert isinstance(ended(call), Unauthenticated)
    assert "tcp://a:1" in str(call.end)

    world = World(*TWO)
    call = world.open()
    world.session.on_shut_out(world.now, "no such key")
    world.welcome()
    assert call.sent


def test_a_client_that_is_let_in_takes_no_notice_of_an_old_connection() -> None:
    world = World().welcomed()
    call = world.open()
    world.session.on_shut_out(world.now, "no such key")
    assert (world.session.state, ended(call)) == (State.OPEN, None)


def revoke(world: World, call: Call) -> None:
    world.hear(m.Error(call.rid, Unauthenticated.code, "revoked"))


def test_a_stream_whose_key_is_revoked_goes_on_where_it_is_known() -> None:
    world = pair()
    stream = world.begin(3)
    revoke(world, stream)
    assert world.wire.connected[-1] == "tcp://b:2"
    world.welcome("c2")
    (again,) = [request for request in asked(world) if request.resume is not None]
    assert again.resume is not None
    assert again.resume.next_seq == 3
    assert ended(stream) is None


def test_it_ends_at_once_where_nobody_knows_it() -> None:
    """Without waiting for `failover_s`: what is said of a key is not said of a restart."""
    world = pair()
    stream, other = world.begin(3), world.open()
    began_s = world.now
    revoke(world, stream)
    while ended(stream) is None:
        world.session.on_shut_out(world.now, "no such key")
        world.pass_s(0.1)
    for call in (stream, other):
        assert isinstance(ended(call), Unauthenticated)
    assert world.now - began_s < 3


def test_one_that_may_not_be_moved_ends_with_what_the_controller_said() -> None:
    world = pair()
    stream = world.begin(3, resume=False)
    revoke(world, stream)
    assert isinstance(ended(stream), Unauthenticated)
    assert str(stream.end) == "revoked"


def test_while_one_endpoint_may_come_back_a_stream_waits_for_it() -> None:
    world = pair()
    stream = world.begin(3)
    revoke(world, stream)  # by the first; the second is only away for a moment
    for _ in range(3):
        world.pass_s(1)
        if world.session.greets and world.wire.connected[-1] == "tcp://a:1":
            world.session.on_shut_out(world.now, "no such key")
    assert ended(stream) is None
    while world.wire.connected[-1] != "tcp://b:2":
        world.pass_s(0.25)
    world.welcome("c2")
    assert asked(world)[-1].rid == stream.rid
