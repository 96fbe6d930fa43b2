"""Hostile peers: they replay what was recorded, changed, by libzmq's sockets and over bare TCP. Each runs in a process of its own.

They write no message to standard output; how many they sent comes back through a pipe, after each BATCH.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from random import Random

import msgspec
import zmq

from bench.zmtp import COMMAND, LONG, MORE, RawPeer, claim, frame, greeting, message, ready
from zmqserve import messages as m

from .mutator import Mutator
from .recording import Recording

SOCKETS = 6
"""Connections of one attacker at a time."""
LIFE = 300
"""Messages of one connection, about."""
BATCH = 500
RAW_SHARE = 0.03
"""Of the turns: a bare TCP connection in place of libzmq's. It counts as RAW messages, and costs about what so many do."""
RAW = 4
AGAIN_SHARE = 0.02
"""Of the messages: after it the recording begins anew, as for a worker that has to register again."""
WAIT_MS = 1000
LINGER_MS, PIPE = 2000, 50
READ = 64
"""Messages that are read after one was sent, by those who read at all."""

_heads = msgspec.msgpack.Decoder(m.WorkerHead)
_readies = msgspec.msgpack.Decoder(m.Ready)
_told = msgspec.msgpack.Decoder(m.ControllerHead)


class Attacker:
    """`messages` in all, to `endpoint`. `chosen`: the share of connections that choose their routing id, out of few."""

    def __init__(self, endpoint: str, recorded: Sequence[Sequence[bytes]], random: Random, chosen: float) -> None:
        self.endpoint = endpoint
        self._chosen = chosen
        self.random = random
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._recorded = recorded
        self._mutator = Mutator([each for frames in recorded for each in frames] or [b""], random)

    def attack(self, messages: int, pipe: Connection) -> None:
        """Send them, and tell how many have been sent."""
        random, sent, told = self.random, 0, 0
        peers = [self._connect() for _ in range(SOCKETS)]
        while sent < messages:
            place = random.randrange(SOCKETS)
            if random.random() < 1 / LIFE:
                peers[place].socket.close()
                peers[place] = self._connect()
            if random.random() < RAW_SHARE:
                with suppress(OSError):
                    self._over_tcp()
                sent += RAW
            else:
                sent += peers[place].say(self._mutator)
            if sent - told >= BATCH:
                pipe.send(sent - told)
                told = sent
        pipe.send(sent - told)
        for peer in peers:
            peer.socket.close()
        self._context.term()

    def _connect(self) -> Peer:
        socket = self._context.socket(zmq.DEALER)
        # What it sends shall arrive, though it goes soon.
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, PIPE)
        if self.random.random() < self._chosen:
            # A name that it takes for itself: one of few, so that others have it or had it.
            socket.setsockopt(zmq.IDENTITY, b"chosen%d" % self.random.randrange(3))
        socket.connect(self.endpoint)
        return Peer(socket, self._recorded, self.random)

    def _over_tcp(self) -> None:
        """A handshake and some messages, broken somewhere."""
        random, mutator = self.random, self._mutator
        kind = random.choice((b"DEALER", b"DEALER", b"REQ", b"ROUTER", b"PUB", b"\0"))
        said = b"".join(
            (
                greeting(random.choice((b"NULL", b"NULL", b"NULL", b"CURVE", b"PLAIN", b"\xff" * 20)), as_server=random.random() < 0.2),
                ready(kind, random.choice((b"", b"me", b"\0abcd", b"x" * 300))),
                *(message(*random.choice(self._recorded), whole=random.random() < 0.8) for _ in range(random.randrange(3))),
                random.choice((b"", claim(2**32, MORE), claim(2**63 - 1), claim(5 * 10**7), frame(b"\4PING\0\1" + bytes(30), COMMAND))),
                random.choice((b"", frame(b"\x05ERROR\xff", COMMAND), bytes([LONG | COMMAND | MORE]), frame(b"\4PONG", COMMAND | MORE))),
            )
        )
        with RawPeer(self.endpoint, handshake=False, patience_s=1.0) as peer:
            if random.random() < 0.3:
                peer.write(said)
            else:
                whole = said[:64] if random.random() < 0.7 else b""
                peer.write(whole, mutator.change(said[len(whole) :]))


class Peer:
    """One connection that goes through the recording from its beginning, with what it was told since put in."""

    def __init__(self, socket: zmq.Socket[bytes], recorded: Sequence[Sequence[bytes]], random: Random) -> None:
        self.socket = socket
        self._recorded = recorded
        self._random = random
        self._at = 0
        self._reads = random.random() < 0.8
        self._name = f"hostile-{random.getrandbits(40)}"
        self._epoch = self._client = self._rid = 0

    def say(self, mutator: Mutator) -> int:
        """Send one message, if the socket takes it; returns how many were sent."""
        random = self._random
        frames = self._fitted(list(self._recorded[self._at % len(self._recorded)]))
        self._at = 0 if random.random() < AGAIN_SHARE else self._at + (1 if random.random() < 0.9 else random.randrange(100))
        dice = random.random() * (1.0 if len(frames) == 1 else 2.0)
        if dice < 0.5:
            place = random.randrange(len(frames))
            frames[place] = mutator.change(frames[place])
        elif dice < 0.6:
            frames = [mutator.draw() for _ in range(random.choice((1, 2, 3, 4, 20)))]
        elif dice < 0.65:
            frames.insert(random.randrange(len(frames) + 1), random.choice((b"", b"\0abcd", b"x" * 300, frames[0])))
        elif dice < 0.7:
            frames.pop()
        if self._reads:
            self._hear()
        try:
            self.socket.send_multipart(frames or [b""], zmq.NOBLOCK)
        except zmq.Again:
            self.socket.poll(WAIT_MS, zmq.POLLOUT)
            return 0
        return 1

    def _fitted(self, frames: list[bytes]) -> list[bytes]:
        """A worker's head with the epoch and the request that this connection was given, mostly."""
        if len(frames) != 2 or self._random.random() < 0.1:
            return frames
        head = _heads.decode(frames[0])
        if head.kind == m.READY:
            return [frames[0], m.encode(msgspec.structs.replace(_readies.decode(frames[1]), name=self._name))]
        if head.kind == m.MORE:
            return [m.more_head(self._epoch, self._client), frames[1]]
        return [m.encode(msgspec.structs.replace(head, epoch=self._epoch, client=self._client, rid=self._rid)), frames[1]]

    def _hear(self) -> None:
        with suppress(zmq.Again):
            for _ in range(READ):
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
                if len(frames) == 2:
                    with suppress(msgspec.DecodeError):
                        head = _told.decode(frames[0])
                        self._epoch = head.epoch or self._epoch
                        if head.kind == m.REQUEST:
                            self._client, self._rid = head.client, head.rid


def attack(pipe: Connection, endpoint: str, recording: bytes, side: str, messages: int, seed: str, chosen: float) -> None:
    """The process. `recording`: a Recording as msgpack; `side`: ``clients`` or ``workers``, which socket the endpoint is of."""
    recorded = msgspec.msgpack.decode(recording, type=Recording)
    mine = recorded.from_client if side == "clients" else recorded.from_worker
    Attacker(endpoint, mine, Random(seed), chosen).attack(messages, pipe)
