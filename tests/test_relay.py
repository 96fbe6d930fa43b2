"""The relay over real sockets: what it passes, what it survives, and what waits in outboxes. One thread, inproc, no clock."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import zmq

from zmqserve import messages as m
from zmqserve.delivery import GONE, SENT
from zmqserve.relay import MAX_ENVELOPE

from .fakes.rig import PATIENCE_MS, Rig, piece

TURNS = 50
"""In which anything is read, on a slow machine too: a turn is bounded by time."""
THIRD = m.Chunk(1, 0, 0, "third", b"")


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.close()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("frames", [[b"a"], [b""], [b"", b"x" * 100_000], [b"a", b"", b"c", b""]])
def test_compiled_and_wrapped_calls_read_and_write_the_same(compiled: bool, frames: list[bytes]) -> None:
    rig = Rig(compiled=compiled)
    try:
        peer = rig.connect("clients")
        peer.send(*frames)
        assert rig.clients.socket.poll(PATIENCE_MS)
        identity, *read = [rig.clients.recv(int(zmq.NOBLOCK)) for _ in range(len(frames) + 1)]
        assert read == frames
        assert not rig.clients.socket.getsockopt(zmq.RCVMORE)
        with pytest.raises(zmq.Again):
            rig.clients.recv(int(zmq.NOBLOCK))
        assert rig.clients.send(identity, *frames) == SENT
        assert peer.recv() == frames
        assert rig.clients.send(b"\0gone", *frames) == GONE
    finally:
        rig.close()


@pytest.mark.parametrize("compiled", [True, False])
def test_more_passes_untouched_whatever_it_holds(compiled: bool) -> None:
    rig = Rig(compiled=compiled, outbox_bytes=10**6)
    try:
        client, worker = rig.connect("clients"), rig.worker("w")
        number = rig.flight(client, worker)
        payloads = [piece(rest) for rest in (b"", b"not msgpack \xff", b"x" * 100_000, b"\0" * 5)]
        for payload in payloads:
            worker.more(number, payload)
        rig.pump()
        assert client.got() == [[payload] for payload in payloads]
        assert rig.broker.counters["resynchronised"] == 0
    finally:
        rig.close()


def test_a_head_in_another_form_takes_the_slow_path_and_arrives_all_the_same(rig: Rig) -> None:
    client, worker = rig.connect("clients"), rig.worker("w")
    number = rig.flight(client, worker)
    worker.send(m.encode(m.WorkerHead(m.MORE, worker.epoch, number)), piece(b"long form"))
    worker.more(number, piece(b"short form"))
    rig.pump()
    assert client.got() == [[piece(b"long form")], [piece(b"short form")]]


def test_more_renews_the_workers_lease(rig: Rig) -> None:
    client, worker = rig.connect("clients"), rig.worker("w")
    number = rig.flight(client, worker)
    rig.now = 2.5
    worker.more(number, piece(b"x"))
    rig.pump()
    (known,) = rig.broker.registry
    assert known.lease.heard_s == 2.5


def test_another_workers_route_cannot_be_used(rig: Rig) -> None:
    client, one, two = rig.connect("clients"), rig.worker("one", slots=1), rig.worker("two", slots=1)
    client.send(m.encode(m.Generate(1, "m", prompt="hi")))
    rig.pump()
    busy, idle = (one, two) if one.socket.poll(100) else (two, one)
    number = rig.head(busy).client
    idle.send(m.more_head(busy.epoch, number), b"forged")
    idle.more(number, piece(b"no flight here"))
    rig.pump()
    assert client.got() == []


BAD = {
    "one frame": lambda worker, number: worker.send(b"x"),
    "an empty frame": lambda worker, number: worker.send(b""),
    "empty frames": lambda worker, number: worker.send(b"", b"", b"", b""),
    "a MORE without payload": lambda worker, number: worker.send(m.more_head(worker.epoch, number)),
    "a MORE with an extra frame": lambda worker, number: worker.more(number, piece(b"ok"), b"extra"),
    "a MORE with two extra frames": lambda worker, number: worker.more(number, piece(b"ok"), b"extra", b"more"),
    "a MORE with three extra frames": lambda worker, number: worker.more(number, piece(b"ok"), b"a", b"b", b"c"),
    "a MORE with an empty extra frame": lambda worker, number: worker.more(number, piece(b"ok"), b""),
    "a MORE with a frame like a routing id": lambda worker, number: worker.more(number, piece(b"ok"), b"\0abcd"),
    "a MORE with a MORE inside": lambda worker, number: worker.more(
        number, piece(b"ok"), b"\0abcd", m.more_head(worker.epoch, number), b"x"
    ),
    "a hundred frames": lambda worker, number: worker.send(*[b"%d" % n for n in range(100)]),
    "another kind with an extra frame": lambda worker, number: worker.send(
        m.encode(m.WorkerHead(m.LOAD, worker.epoch)), m.encode(m.Load(0, 0, 0)), b"extra"
    ),
}
UNPROVEN = {"a MORE with three extra frames", "a MORE with a MORE inside"}
"""These read as a stranger's message of its own: dropped, and nobody is fenced for them."""


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("last", [True, False])
def test_frames_too_many_or_too_few_cost_nobody_else_anything(rig: Rig, bad: str, last: bool) -> None:
    good_client, bad_client = rig.connect("clients"), rig.connect("clients")
    good, bad_worker = rig.worker("good", slots=1), rig.worker("bad", slots=1)
    good_client.send(m.encode(m.Generate(1, "m", prompt="hi")))
    rig.pump()
    if not good.socket.poll(100):  # the names follow what each got
        good, bad_worker = bad_worker, good
    number = rig.head(good).client
    other = rig.flight(bad_client, bad_worker)
    good.more(number, piece(b"first"))
    BAD[bad](bad_worker, other)
    if not last:
        good.more(number, piece(b"second"))
        good.send(m.encode(m.WorkerHead(m.FIRST, good.epoch, number, 1)), m.encode(THIRD))
    good.more(number, piece(b"fourth"))
    rig.pump()
    good.more(number, piece(b"fifth"))
    rig.pump()
    between = [] if last else [piece(b"second"), m.encode(THIRD)]
    expected = [piece(b"first"), *between, piece(b"fourth"), piece(b"fifth")]
    assert good_client.got() == [[payload] for payload in expected]
    assert good.epoch in [known.epoch for known in rig.broker.registry]
    good.more(number, piece(b"sixth"))
    rig.pump()
    assert good_client.got() == [[piece(b"sixth")]]


@pytest.mark.parametrize("bad", BAD)
def test_who_sends_frames_too_many_or_too_few_is_fenced_where_that_is_certain(rig: Rig, bad: str) -> None:
    client, other, one = rig.connect("clients"), rig.connect("clients"), rig.worker("one", slots=1)
    number = rig.flight(client, one)
    two = rig.worker("two", slots=1)
    others = rig.flight(other, two)
    for _ in range(2):  # the first time it may be somebody else's doing; from then on it is looked at closely
        BAD[bad](one, number)
        two.more(others, piece(b"two goes on"))
        rig.pump()
        assert other.got() == [[piece(b"two goes on")]]
    assert sorted(rig.broker.registry.by_name) == (["one", "two"] if bad in UNPROVEN else ["two"])


@pytest.mark.parametrize("frames", [(b"x",), (b"x", b"y", b"z"), (b"GET / HTTP/1.1",), (b"",)])
def test_what_a_stranger_sends_costs_no_worker_its_place(rig: Rig, frames: tuple[bytes, ...]) -> None:
    """A port scanner's bytes arrive as a message of a peer that chose its routing id, between two of a stream."""
    client, good = rig.connect("clients"), rig.worker("good")
    number = rig.flight(client, good)
    stranger = rig.connect("workers", identity=b"evil")
    for _ in range(3):
        good.more(number, piece(b"one"))
        stranger.send(*frames)
        good.more(number, piece(b"two"))
        rig.pump()
        assert client.got() == [[piece(b"one")], [piece(b"two")]]
    assert "good" in rig.broker.registry.by_name


def test_a_peer_with_a_routing_id_of_its_own_cannot_have_others_fenced(rig: Rig) -> None:
    client, good = rig.connect("clients"), rig.worker("good")
    number = rig.flight(client, good)
    evil = rig.worker("evil", identity=b"evil")
    for frames in (
        (b"a", b"b", b"c"),
        (b"evil", m.more_head(evil.epoch, 1), b"x"),
        (b"evil", m.encode(m.WorkerHead(m.BYE, evil.epoch)), b"", b""),
        (b"\0abcd", m.more_head(good.epoch + 5, number), b"forged"),
    ):
        good.more(number, piece(b"mine"))
        evil.send(*frames)
        good.more(number, piece(b"mine too"))
        rig.pump()
        assert client.got() == [[piece(b"mine")], [piece(b"mine too")]]
    assert "good" in rig.broker.registry.by_name


def test_a_newcomer_behind_an_unfinished_message_is_told_to_say_it_again(rig: Rig) -> None:
    client, good = rig.connect("clients"), rig.worker("good")
    number = rig.flight(client, good)
    good.more(number, piece(b"x"))
    assert rig.worker("new").epoch
    assert client.got() == [[piece(b"x")]]


def test_random_frames_never_stop_the_relay(rig: Rig) -> None:
    random = Random(3)
    client, good = rig.connect("clients", receives=0), rig.worker("good")
    number = rig.flight(client, good)
    bad = [rig.connect("workers") for _ in range(3)]
    pieces = [b"", b"x", b"\0abcd", b"\x90", m.more_head(good.epoch, number + 7), m.encode(m.WorkerHead(m.LOAD, 5)), b"\xc1" * 50]
    for turn in range(2000):
        random.choice(bad).send(*random.choices(pieces, k=random.randint(1, 6)))
        if turn % 3 == 0:
            good.more(number, piece(b"%d" % turn))
        if turn % 5 == 0:
            rig.pump()
            for peer in bad:
                peer.got()
    rig.pump()
    assert client.got() == [[piece(b"%d" % turn)] for turn in range(0, 2000, 3)]
    assert "good" in rig.broker.registry.by_name


# --- envelopes


def test_a_req_socket_gets_its_answer_behind_its_empty_frame(rig: Rig) -> None:
    client = rig.connect("clients", zmq.REQ)
    client.send(m.encode(m.Status(5)))
    rig.pump()
    (reply,) = client.recv()
    assert m.read(m.decoder(m.ToClient), reply).rid == 5


def test_envelopes_come_back_as_they_came_and_too_long_ones_are_dropped(rig: Rig) -> None:
    client = rig.connect("clients")
    frames = [b"%d" % number for number in range(MAX_ENVELOPE - 1)]
    client.send(*frames, m.encode(m.Status(5)))
    client.send(*frames, b"one too many", m.encode(m.Status(6)))
    client.send(b"x" * 256, m.encode(m.Status(6)))
    client.send(m.encode(m.Status(7)))
    rig.pump()
    first, second = client.got()
    assert first[:-1] == frames
    rids = [m.read(m.decoder(m.ToClient), message[-1]).rid for message in (first, second)]
    assert rids == [5, 7]
    assert rig.broker.counters["dropped: envelope too large"] == 2


def test_a_message_of_very_many_frames_is_dropped_piece_by_piece(rig: Rig) -> None:
    """While it is read on, the other socket has its turns, and what comes behind it is read as if it had not been there."""
    hostile, client, worker = rig.connect("clients"), rig.connect("clients"), rig.worker("w")
    number = rig.flight(client, worker)
    hostile.send(*[b""] * 20_000)
    hostile.send(m.encode(m.Status(7)))
    worker.more(number, piece(b"a stream goes on"))
    rig.relay.from_clients(rig.now, 1)
    begun = rig.clients.skipping
    rig.relay.from_workers(rig.now, 100)
    assert client.got() == [[piece(b"a stream goes on")]]
    for _ in range(TURNS):
        rig.pump()
    assert (begun, rig.clients.skipping) == (True, False)
    assert m.read(m.decoder(m.ToClient), hostile.recv()[-1]).rid == 7
    assert rig.broker.counters["dropped: envelope too large"] == 1


def test_a_worker_that_sends_very_many_frames_is_fenced_and_the_others_go_on(rig: Rig) -> None:
    client, worker = rig.connect("clients"), rig.worker("w")
    number = rig.flight(client, worker)
    hostile = rig.worker("hostile")
    hostile.send(m.encode(m.WorkerHead(m.LOAD, hostile.epoch)), *[b""] * 20_000)
    for _ in range(TURNS):
        rig.pump()
    worker.more(number, piece(b"behind it"))
    rig.pump()
    assert client.got() == [[piece(b"behind it")]]
    assert not rig.workers.skipping
    assert "hostile" not in rig.broker.registry.by_name
    assert "w" in rig.broker.registry.by_name


def test_two_clients_behind_one_connection_have_flights_of_their_own(rig: Rig) -> None:
    proxy, worker = rig.connect("clients"), rig.worker("w")
    for name in (b"a", b"b"):
        proxy.send(name, m.encode(m.Generate(1, "m", prompt="hi")))
    rig.pump()
    numbers: list[Any] = [rig.head(worker).client for _ in range(2)]
    for number in numbers:
        worker.more(number, piece(b"for %d" % number))
    rig.pump()
    assert proxy.got() == [[b"a", piece(b"for %d" % numbers[0])], [b"b", piece(b"for %d" % numbers[1])]]
