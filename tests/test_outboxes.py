"""What a full pipe does not take waits in order, up to a limit, and is counted beyond it."""

from __future__ import annotations

import errno

import zmq

from zmqserve import messages as m
from zmqserve.delivery import FULL, GONE, SENT
from zmqserve.errors import SlowConsumer
from zmqserve.shedding import dropped_ends

from .fakes.rig import PATIENCE_MS, Peer, Rig, piece


def fill(rig: Rig, identity: bytes, size: int = 100) -> int:
    """Send until the pipe is full and something waits; returns how many messages were taken."""
    count = 0
    while identity not in rig.clients.outboxes:
        assert rig.clients.send(identity, b"%04d" % count + b"x" * size) == SENT
        count += 1
    return count


to_client = m.decoder(m.ToClient).decode


def drain(rig: Rig, peer: Peer) -> list[bytes]:
    """Let the peer read all that is and will be there."""
    received: list[bytes] = []
    for _ in range(200):
        received += [payload for (payload,) in peer.got()]
        rig.now += 1.0
        rig.relay.flush(rig.now)
    return received


def identity_of(rig: Rig, peer: Peer) -> bytes:
    peer.send(b"who am I")
    assert rig.clients.socket.poll(PATIENCE_MS)
    identity: bytes = rig.clients.recv(int(zmq.NOBLOCK))
    rig.clients.recv(int(zmq.NOBLOCK))
    return identity


def test_what_a_full_pipe_does_not_take_waits_in_order() -> None:
    rig = Rig(pipe_messages=10)
    try:
        peer = rig.connect("clients", receives=10)
        identity = identity_of(rig, peer)
        count = fill(rig, identity)
        assert rig.clients.send(identity, b"%04d" % count) == SENT
        assert rig.clients.waiting_bytes == 5 + 104 + 5 + 4
        assert rig.clients.next_s() == 0.0
        assert rig.clients.flush(1.0) == []
        due_s = rig.clients.next_s()
        assert due_s is not None
        assert due_s > 1.0
        received = []
        now = due_s
        while rig.clients.outboxes or peer.socket.poll(0):
            received += peer.got()
            rig.clients.flush(now)
            now += 1.0
        assert [int(payload[:4]) for (payload,) in received] == list(range(count + 1))
        assert (rig.clients.waiting_bytes, rig.clients.next_s(), repr(rig.clients)) == (0, None, "Port(0 outboxes, 0 dropped)")
    finally:
        rig.close()


def test_an_outbox_says_full_beyond_its_limit_and_counts_what_it_drops_beyond_twice_that() -> None:
    rig = Rig(pipe_messages=10, outbox_bytes=1000)
    try:
        identity = identity_of(rig, rig.connect("clients", receives=10))
        fill(rig, identity, size=96)
        said = [rig.clients.send(identity, b"x" * 100) for _ in range(40)]
        assert said[:8] == [SENT] * 8
        assert set(said[9:]) == {FULL}
        assert rig.clients.waiting_bytes == 20 * 105  # the last of them was let in when 1995 waited
        assert rig.clients.dropped == 40 - 19
    finally:
        rig.close()


def test_a_peer_that_goes_takes_its_outbox_along() -> None:
    rig = Rig(pipe_messages=10)
    try:
        peer = rig.connect("clients", receives=10)
        identity = identity_of(rig, peer)
        fill(rig, identity)
        peer.socket.close(linger=0)
        for _ in range(100):  # the end of an inproc pipe is a command that the ROUTER works off when it is used
            gone = rig.clients.flush(rig.now)
            if gone:
                break
            rig.now += 1.0
            rig.clients.socket.poll(10)
        assert gone == [identity]
        assert rig.clients.waiting_bytes == 0
        assert rig.clients.send(identity, b"x") == GONE
    finally:
        rig.close()


def test_a_slow_reader_gets_everything_in_order_through_the_relay_or_is_told_that_it_did_not() -> None:
    rig = Rig(pipe_messages=10, outbox_bytes=10**6)
    try:
        client, worker = rig.connect("clients", receives=10), rig.worker("w")
        number = rig.flight(client, worker)
        received: list[list[bytes]] = []
        for turn in range(300):
            worker.more(number, piece(b"%d" % turn))
            rig.pump()
            rig.now += 1.0
            if turn % 50 == 49:
                received += client.got()
                rig.relay.flush(rig.now)
        while rig.clients.outboxes or client.socket.poll(0):
            received += client.got()
            rig.now += 1.0
            rig.relay.flush(rig.now)
        assert received == [[piece(b"%d" % turn)] for turn in range(300)]
    finally:
        rig.close()


def test_beyond_the_total_the_largest_is_let_go_of_and_its_ends_are_told() -> None:
    """What waits for all stays within the total, and those with less keep all of theirs."""
    rig = Rig(pipe_messages=10, outbox_bytes=10**6, outbox_total_bytes=20_000)
    try:
        big, small, worker = (*(rig.connect("clients", receives=10) for _ in range(2)), rig.worker("w"))
        numbers = [rig.flight(peer, worker, rid) for rid, peer in enumerate((big, small), 1)]
        done = rig.flight(big, worker, 3)
        for turn in range(40):
            worker.more(numbers[1], piece(b"%d" % turn))
        rig.pump()
        more = m.WorkerHead(m.DONE, worker.epoch, done, 3, "stop")
        large = piece(b"x" * 1000)
        for turn in range(42):
            worker.more(numbers[0], large)
            if turn == 35:
                worker.send(m.encode(more), m.encode(m.Done(3, 0, ["stop"], m.Usage(1, 1), m.Timings("w"))))
            rig.pump()
        assert rig.broker.counters["outboxes over their total"] == 1
        assert rig.clients.waiting_bytes < 20_000
        messages = drain(rig, big)
        assert len([payload for payload in messages if payload == large]) < 42
        errors = [message for payload in messages if payload != large and isinstance(message := to_client(payload), m.Error)]
        assert {(error.rid, error.code) for error in errors} == {(1, SlowConsumer.code), (3, SlowConsumer.code)}
        assert len(errors) == 2
        assert drain(rig, small) == [piece(b"%d" % turn) for turn in range(40)]
        assert rig.clients.waiting_bytes == 0
    finally:
        rig.close()


def test_what_waits_for_a_client_that_fell_silent_is_dropped() -> None:
    rig = Rig(pipe_messages=10, outbox_bytes=10**6)
    try:
        peer, worker = rig.connect("clients", receives=10), rig.worker("w")
        number = rig.flight(peer, worker)
        peer.send(m.encode(m.Ping(1000, [1])))
        rig.pump()
        for _ in range(50):
            worker.more(number, piece(b"x" * 100))
        rig.pump()
        assert rig.clients.waiting_bytes > 1000
        rig.broker.tick(rig.now + 0.9)
        rig.broker.tick(rig.now + 1.8)
        assert rig.broker.counters["clients: client silent"] == 1
        assert (rig.clients.waiting_bytes, rig.clients.outboxes) == (0, {})
    finally:
        rig.close()


def test_ends_are_told_only_where_that_wins_space() -> None:
    """A client that reads nothing at all must not be told for ever what it does not read."""
    done = (b"id", b"env", m.encode(m.Done(5, 0, ["stop"], m.Usage(1, 1), m.Timings("w"))))
    chunks = (b"id", b"env", m.encode(m.Chunks([m.Chunk(6, 0, 0, "x" * 1000, b"")])))
    assert dropped_ends([done, chunks]) == [((b"id", b"env"), 5)]
    assert dropped_ends([done] * 100) == []
    assert dropped_ends([(b"id", b"no message")]) == []


# --- what is gathered in a turn


def test_what_is_posted_while_gathering_waits_for_the_flush_in_order() -> None:
    rig = Rig()
    try:
        peer = rig.connect("clients")
        identity = identity_of(rig, peer)
        rig.clients.gathering = True
        assert [rig.clients.post(identity, b"%d" % number) for number in range(3)] == [SENT] * 3
        assert peer.got() == []
        assert rig.clients.waiting_bytes == 3 * 6
        rig.clients.gathering = False
        assert rig.clients.flush(rig.now) == []
        assert peer.got() == [[b"0"], [b"1"], [b"2"]]
        assert (rig.clients.waiting_bytes, rig.clients.outboxes) == (0, {})
    finally:
        rig.close()


def test_what_is_sent_goes_behind_what_was_gathered_and_says_who_is_gone() -> None:
    rig = Rig()
    try:
        peer = rig.connect("clients")
        identity = identity_of(rig, peer)
        rig.clients.gathering = True
        rig.clients.post(identity, b"first")
        assert rig.clients.send(identity, b"second") == SENT
        assert peer.got() == [[b"first"], [b"second"]]
        assert rig.clients.post(b"\0gone", b"x") == SENT
        assert rig.clients.send(b"\0gone", b"y") == GONE
        rig.clients.post(b"\0gone", b"x")
        assert rig.clients.flush(rig.now) == [b"\0gone"]
        assert (rig.clients.waiting_bytes, rig.clients.outboxes) == (0, {})
    finally:
        rig.close()


def test_large_messages_are_not_gathered_and_nobody_is_slow_for_what_was() -> None:
    rig = Rig(outbox_bytes=1000)
    try:
        peer = rig.connect("clients")
        identity = identity_of(rig, peer)
        rig.clients.gathering = True
        assert [rig.clients.post(identity, b"%d" % number + b"x" * 300) for number in range(9)] == [SENT] * 9
        assert rig.clients.waiting_bytes <= 500
        assert rig.clients.post(identity, b"9" + b"x" * 5000) == SENT
        assert rig.clients.waiting_bytes == 0
        assert [payload[:1] for (payload,) in peer.got()] == [b"%d" % number for number in range(10)]
    finally:
        rig.close()


def test_a_worker_that_is_found_gone_when_what_was_gathered_is_sent_loses_its_requests() -> None:
    rig = Rig()
    try:
        client, worker = rig.connect("clients"), rig.worker("w")
        (known,) = rig.broker.registry
        send = rig.workers.send_frame

        def unreachable(frame: bytes, flags: int) -> None:
            if frame == known.identity:
                raise zmq.ZMQError(errno.EHOSTUNREACH)
            send(frame, flags)

        rig.workers.send_frame = unreachable
        client.send(m.encode(m.Status(1)))  # the first message's outcome is not gathered
        client.send(m.encode(m.Generate(2, "m", prompt="hi")))
        rig.pump()
        assert (len(rig.broker.registry.workers), len(rig.broker.registry.pools["m"].waiting)) == (0, 1)
        assert (len(client.got()), worker.got(), rig.workers.outboxes) == (1, [], {})
    finally:
        rig.close()


def test_the_first_of_several_messages_is_answered_before_the_others_are_read() -> None:
    rig = Rig()
    try:
        client, worker = rig.connect("clients"), rig.worker("w")
        for rid in range(1, 6):
            client.send(m.encode(m.Generate(rid, "m", prompt="hi")))
        events: list[str] = []
        recv, send = rig.clients.recv, rig.workers.send_frame
        rig.clients.recv = lambda *flags, **copy: (events.append("read"), recv(*flags, **copy))[1]  # type: ignore[func-returns-value]
        rig.workers.send_frame = lambda *frame: (events.append("sent"), send(*frame))[1]  # type: ignore[func-returns-value]
        rig.pump()
        assert events[:13] == ["read"] * 2 + ["sent"] * 3 + ["read"] * 8
        assert events.count("sent") == 5 * 3
        assert [rig.head(worker).rid for _ in range(5)] == [1, 2, 3, 4, 5]
    finally:
        rig.close()
