"""What a hostile peer may try below the messages: handshakes, frames, lengths, names of connections."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from bench.zmtp import COMMAND, MORE, RawPeer, claim, frame, greeting, message, ready
from tests.processes import PATIENCE_S, eventually
from zmqserve import messages as m
from zmqserve.params import SamplingParams

from .site import MESSAGE_BYTES, RawClient, Site

pytestmark = pytest.mark.usefixtures("honest")

HANDSHAKE_S = 1.0
"""HANDSHAKE_IVL of a controller's sockets."""
SOON_S = 5.0
"""After which nobody who has not finished a handshake may still be connected, on a busy machine."""
SIDES = ("clients", "workers")
each_side = pytest.mark.parametrize("side", SIDES)


@contextmanager
def connected(site: Site, side: str, *, handshake: bool = True) -> Iterator[RawPeer]:
    with RawPeer(getattr(site.controller, side), handshake=handshake) as peer:
        yield peer


@each_side
@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\xff",
        greeting()[:40],
        greeting(),
        greeting() + frame(b"\x05READY", COMMAND)[:4],
        greeting(version=(1, 0)),
        b"\x00" * 100,
        b"\xff" * 1000,
    ],
    ids=["nothing", "a byte", "half a greeting", "a greeting only", "half a READY", "an old version", "zeros", "ones"],
)
def test_who_does_not_finish_a_handshake_is_gone_within_seconds(site: Site, side: str, said: bytes) -> None:
    with connected(site, side, handshake=False) as peer:
        peer.write(said)
        assert peer.ends(SOON_S)


@each_side
def test_a_handshake_byte_by_byte_gets_no_more_time(site: Site, side: str) -> None:
    """One every 50 ms: all of them would take five seconds."""
    began_s = time.monotonic()
    with connected(site, side, handshake=False) as peer:
        for byte in greeting() + ready():
            peer.write(bytes([byte]))
            if peer.ends(0.05):
                break
    assert time.monotonic() - began_s < 4 * HANDSHAKE_S


@each_side
@pytest.mark.parametrize("mechanism", [b"PLAIN", b"CURVE", b"GSSAPI", b"\xff" * 20, b""])
def test_another_mechanism_is_not_spoken(site: Site, side: str, mechanism: bytes) -> None:
    with connected(site, side, handshake=False) as peer:
        peer.write(greeting(mechanism), ready())
        assert peer.ends(SOON_S)


@each_side
@pytest.mark.parametrize("kind", [b"PUB", b"PUSH", b"PAIR", b"STREAM", b"\0", b"x" * 300])
def test_a_socket_of_a_kind_that_fits_none_is_turned_away(site: Site, side: str, kind: bytes) -> None:
    with connected(site, side, handshake=False) as peer:
        peer.write(greeting(), ready(kind))
        assert peer.ends(SOON_S)


@each_side
@pytest.mark.parametrize("size", [MESSAGE_BYTES + 1, 2**31, 2**32, 2**63 - 1, 2**64 - 1])
def test_a_frame_that_claims_to_be_too_large_ends_the_connection_unread(site: Site, side: str, size: int) -> None:
    with connected(site, side) as peer:
        peer.write(claim(size))
        assert peer.ends(SOON_S)


@each_side
@pytest.mark.parametrize("flags", [0x08, 0xFF, COMMAND | MORE])
def test_flags_that_no_frame_has_cost_their_sender_at_most_the_connection(site: Site, side: str, flags: int) -> None:
    with connected(site, side) as peer:
        peer.write(bytes([flags, 1, 0x41]))
    assert site.controller.process.poll() is None


@each_side
def test_a_message_that_never_ends_is_never_taken(site: Site, side: str) -> None:
    """libzmq keeps it until its sender goes, and nobody sees it: the memory watch is for those who send many."""
    with connected(site, side) as peer:
        for _ in range(20):
            peer.send(b"x" * 10_000, whole=False)
        assert not peer.ends(0.5)


@each_side
def test_a_message_that_stops_in_its_middle_dies_with_its_connection(site: Site, side: str) -> None:
    with connected(site, side) as peer:
        peer.write(claim(10_000), b"x" * 5000)
    assert site.controller.process.poll() is None


def test_a_routing_id_of_ones_choice_is_no_better_than_another(site: Site) -> None:
    for identity in (b"me", b"\0abcd", b"x" * 255, b"\xff"):
        with site.raw_client(identity=identity) as peer:
            assert peer.is_served()


def test_who_takes_the_routing_id_of_another_is_mute_and_the_other_is_not(site: Site) -> None:
    with site.raw_client(identity=b"taken") as first, site.raw_client(identity=b"taken") as second:
        assert first.is_served()
        second.say(m.Hello(m.PROTOCOL), m.ListModels(1))
        second.socket.settimeout(0.5)
        with pytest.raises(TimeoutError):
            second.hear()
        assert first.is_served()


def test_a_routing_id_that_comes_again_inherits_nothing(site: Site) -> None:
    """The first holder's requests are not the second's: it is told nothing of them, and may use their rids."""
    with site.raw_client(identity=b"again") as first:
        first.say(m.Generate(7, "m", prompt="the first holder's secret", params=SamplingParams(max_tokens=10_000)))
        assert isinstance(first.hear(), m.Chunk)
    eventually(lambda: site.status().running == 1, PATIENCE_S, "the first holder's request has ended; the honest one runs")
    with site.raw_client(identity=b"again") as second:
        assert second.answer(m.Ping(3000, [7])).unknown == [7]
        second.say(m.Generate(7, "m", prompt="mine", stream=False))
        assert second.hear().choices[0].text == "mine"


@each_side
def test_a_connection_that_is_reset_while_its_queue_is_full_ends_nothing(site: Site, side: str) -> None:
    """Nobody reads the queue of a connection whose routing id is taken. libzmq aborted the process when its own heartbeat came next, after
    2 s; so the controller sends none, and the honest stream here lasts longer."""
    endpoint = getattr(site.controller, side)
    with RawPeer(endpoint, identity=b"taken") as first, site.honest_stream(tokens=300):
        first.send(b"", b"")
        with RawPeer(endpoint, identity=b"taken") as second, suppress(TimeoutError):
            second.socket.settimeout(1.0)
            second.write(message(b"", b"") * 20_000)
            second.reset()
    assert site.controller.process.poll() is None


@each_side
def test_a_peer_who_never_reads_is_let_go(site: Site, side: str) -> None:
    with connected(site, side) as peer:
        peer.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        hello = m.encode(m.Status(1)) if side == "clients" else b"\xc1"
        for _ in range(2000):
            peer.send(hello) if side == "clients" else peer.send(hello, b"")
    assert site.controller.process.poll() is None


@each_side
def test_three_hundred_silent_connections_keep_nobody_out(site: Site, side: str) -> None:
    with ExitStack() as silent:
        for _ in range(300):
            silent.enter_context(connected(site, side, handshake=False))
        began_s = time.monotonic()
        with site.raw_client() as peer:
            assert peer.is_served()
        assert time.monotonic() - began_s < SOON_S


def test_two_hundred_bad_handshakes_in_a_row_keep_nobody_out(site: Site) -> None:
    for _ in range(200):
        with RawClient(site.controller.clients, handshake=False) as peer:
            peer.write(b"\xff" * 70)
    with site.raw_client() as peer:
        assert peer.is_served()
