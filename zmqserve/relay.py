"""The hot path: frames in, frames out, by raw calls of pyzmq's compiled base class.

`socket.recv_multipart` costs 3.7 us for three frames, three raw calls 0.4 us; asking for RCVMORE after each message costs
another 1 to 2 us. So a worker's MORE, two frames behind its routing id, is read without asking where it ends: its head (kind,
epoch, client number) is looked up whole in `Flights.routes`, and a hit proves that the reader is in step, since nobody
else knows that epoch. On a miss the payload is read as a frame that tells whether more follows, and a reader that lost
step (a peer sent a frame too many or too few) finds the next message again by the epochs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import msgspec
import zmq

from . import messages as m
from .access import UNREAD
from .broker import Broker
from .carried import BEGINNINGS
from .delivery import FULL, GONE, SENT
from .port import Port
from .sockets import NOBLOCK, SNDMORE

MAX_ENVELOPE = 16
"""Routing ids before a client's payload: each proxy on the way adds one."""
MAX_ROUTING_ID = 255
"""Bytes of a routing id: libzmq's own limit."""
TURN_S = 0.02
"""After so long the other socket has its turn, however much waits at this one: some messages cost more than others."""
GATHERED = 32
"""Messages read before what they gave rise to is sent."""
GATHERED_BYTES = 2**20
"""Of clients' messages, the same: reading large ones takes long."""
MOST_FRAMES = 64
"""Of what was read out of step: what is behind them cannot be a message of two frames that somebody sent."""


def user_of(frame: zmq.Frame) -> str | None:
    """The key that the frame's sender has shown, as text; None: it is of this process, which libzmq asks for none.

    It hangs on every frame of a connection, so nothing has to be remembered that another peer might inherit: routing ids may be chosen.
    """
    try:
        user = frame.get("User-Id")
    except zmq.ZMQError:
        return None
    return str(user)


def key_of(frame: zmq.Frame) -> str:
    """The same where there is no way in from this process: whoever has shown no key is nobody that is known."""
    return user_of(frame) or UNREAD


def _nobody(_frame: zmq.Frame) -> None:
    """There are no keys."""


class Relay:
    """Moves messages between two ports and a broker. `user_of` tells the broker whose each message is; None: there are no keys."""

    def __init__(self, broker: Broker, clients: Port, workers: Port, user_of: Callable[[zmq.Frame], str | None] | None = None) -> None:
        self.broker = broker
        self.clients, self.workers = clients, workers
        self.clock = time.monotonic
        self._user_of = user_of or _nobody
        self._heads = msgspec.msgpack.Decoder(m.WorkerHead)
        self._unsure: tuple[bytes, bytes] | None = None
        broker.flights.delivery.drop_outbox = clients.drop
        broker.members.drop_outbox = workers.drop

    def __repr__(self) -> str:
        return f"Relay({self.clients!r}, {self.workers!r})"

    def from_workers(self, now: float, most: int) -> None:
        """Read up to `most` messages of workers, as long as there are any."""
        self._in_turns(self.workers, self._read_workers, now, most)

    def from_clients(self, now: float, most: int) -> None:
        """Read up to `most` messages of clients, as long as there are any."""
        self._in_turns(self.clients, self._read_clients, now, most)

    def _in_turns(self, port: Port, read: Callable[[float, int], bool], now: float, most: int) -> None:
        """What the first message gives rise to is sent at once: it may be the only one. The rest is sent in turns of GATHERED, since
        a message for an idle connection wakes libzmq's thread, which costs more than the message."""
        clients, workers = self.clients, self.workers
        left = most - 1
        ends_s = self.clock() + TURN_S
        more = read(now, 1) and port.readable()
        while more and left > 0 and self.clock() < ends_s:
            clients.gathering = workers.gathering = True
            try:
                more = read(now, min(left, GATHERED))
            finally:
                clients.gathering = workers.gathering = False
            left -= GATHERED
            if clients.outboxes or workers.outboxes:
                self.flush(now)

    def _read_workers(self, now: float, most: int) -> bool:
        """Whether there may be more."""
        if self.workers.skipping and not self.workers.skip():
            return True
        recv, send, noblock, sndmore = self.workers.recv, self.clients.send_frame, NOBLOCK, SNDMORE
        outboxes, post = self.clients.outboxes, self.clients.post
        delivery = self.broker.flights.delivery
        route_of, take = self.broker.flights.routes.get, self.broker.pieces
        unsure = self._unsure  # routing id and payload of the last message that was read without asking for its end
        for _ in range(most):
            try:
                identity = recv(noblock)
            except zmq.Again:
                self._unsure = unsure
                return False
            head = None
            try:
                head = recv(noblock)
                route = route_of(head)
                if route is None or route.identity != identity:
                    frame = recv(noblock, False)
                    route = None
                else:
                    payload = recv(noblock)
            except zmq.Again:
                self._resynchronise(now, unsure, [identity] if head is None else [identity, head])
                unsure = None
                continue
            if route is None:
                self._slow(now, unsure, identity, head, frame)
                unsure = None
                if self.workers.skipping:
                    break
                continue
            unsure = (identity, payload)
            route.worker.lease.heard_s = now
            client = route.client
            if client.gone:
                continue
            if payload[:2] not in BEGINNINGS:
                take(now, route, payload)
                continue
            envelope = client.envelope
            if len(envelope) > 1:
                delivery.chunks(client, payload, now)
                self._relieve(now)
                continue
            if outboxes and envelope[0] in outboxes:
                if (status := post(envelope[0], payload)) != SENT:
                    delivery.connection_failed(envelope[0], status, now)
                self._relieve(now)
                continue
            try:
                send(envelope[0], sndmore)
                send(payload, noblock)
            except zmq.ZMQError:
                delivery.chunks(client, payload, now)
        self._unsure = unsure
        return True

    def _slow(self, now: float, unsure: tuple[bytes, bytes] | None, identity: bytes, head: bytes, frame: zmq.Frame) -> None:
        """A message that is no plain MORE, or a reader out of step."""
        if frame.more:
            self._resynchronise(now, unsure, [identity, head, frame.bytes])
        else:
            self.broker.from_worker(now, identity, head, frame.bytes, certain=unsure is None, user=self._user_of(frame))
        if self.clients.waiting_bytes > self.clients.total_bytes:
            self._relieve(now)

    def _resynchronise(self, now: float, unsure: tuple[bytes, bytes] | None, frames: list[bytes]) -> None:
        """Read on to a message's end, then pick out what is a message by its sender's epoch.

        Who sent a frame too many or too few is fenced where that is certain. Nobody else may lose anything by it: peers may choose
        their routing ids, so frames that fit nowhere may be a stranger's as well as more of the last message.
        """
        broker = self.broker
        broker.counters["resynchronised"] += 1
        while len(frames) < MOST_FRAMES and self.workers.socket.getsockopt(zmq.RCVMORE):
            frames.append(self.workers.recv(NOBLOCK))
        if len(frames) >= MOST_FRAMES and self.workers.socket.getsockopt(zmq.RCVMORE):
            self.workers.skip()
        guilty: bytes | None = None
        if unsure is None or (len(frames) > 1 and self._is_head_of(frames[0], frames[1])):
            guilty = frames[0]  # in step where this message begins: who sent it sent its frames
        elif unsure[1] in broker.registry.workers:
            guilty = unsure[0]  # what was taken for its payload is the next message's routing id
            frames.insert(0, unsure[1])
        else:
            self._suspect(unsure[0])
        for message in self._messages_in(frames):
            broker.from_worker(now, *message, user=UNREAD)
        if guilty is not None:
            broker.members.violation(now, guilty, "its message had not exactly two frames")

    def _suspect(self, identity: bytes) -> None:
        """Ask where this worker's messages end from here on: if it sends a frame too many again, that is certain."""
        for route in self.broker.flights.routes.values():
            if route.identity == identity:
                route.identity = b""

    def _messages_in(self, frames: list[bytes]) -> Iterator[tuple[bytes, bytes, bytes]]:
        place = 0
        while place + 3 <= len(frames):
            identity, head, payload = frames[place : place + 3]
            if self._is_head_of(identity, head):
                if place + 3 < len(frames) and self._is_head_of(payload, frames[place + 3]):
                    place += 2  # cut short: what would be its payload is the next message's routing id
                    continue
                yield identity, head, payload
                place += 3
            else:
                place += 1

    def _is_head_of(self, identity: bytes, head: bytes) -> bool:
        worker = self.broker.registry.workers.get(identity)
        try:
            return worker is not None and self._heads.decode(head).epoch == worker.epoch
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return False

    def _read_clients(self, now: float, most: int) -> bool:
        """Whether there may be more."""
        clients, take, user_of = self.clients, self.broker.from_client, self._user_of
        recv, left_bytes = clients.recv, GATHERED_BYTES
        if clients.skipping and not clients.skip():
            return True
        for _ in range(most):
            try:
                identity = recv(NOBLOCK)
            except zmq.Again:
                return False
            frame = recv(NOBLOCK, copy=False)
            envelope: tuple[bytes, ...] = (identity,)
            while frame.more and len(envelope) < MAX_ENVELOPE and len(frame) <= MAX_ROUTING_ID:
                envelope = (*envelope, frame.bytes)
                frame = recv(NOBLOCK, copy=False)
            if frame.more:
                self.broker.counters["dropped: envelope too large"] += 1
                if not clients.skip():
                    return True
                continue
            take(now, envelope, frame.bytes, user_of(frame))
            if clients.waiting_bytes > clients.total_bytes:
                self._relieve(now)
            left_bytes -= len(frame)
            if left_bytes < 0:
                break
        return True

    def _relieve(self, now: float) -> None:
        """While more waits for all clients than may, the one for whom the most waits is treated as one that does not read."""
        if self.clients.largest is None:
            return
        self._send_again(now)  # what was only gathered is nobody's fault
        while (identity := self.clients.largest) is not None:
            self.broker.counters["outboxes over their total"] += 1
            self.broker.flights.delivery.connection_failed(identity, FULL, now)

    def flush(self, now: float) -> None:
        """Try again what waits in outboxes, and tell the broker who is gone."""
        self._send_again(now)
        self._relieve(now)
        while (identity := self.workers.largest) is not None:
            self._drop_worker(identity, now)

    def _send_again(self, now: float) -> None:
        for identity in self.clients.flush(now) if self.clients.outboxes else ():
            self.broker.flights.delivery.connection_failed(identity, GONE, now)
        for identity in self.workers.flush(now) if self.workers.outboxes else ():
            worker = self.broker.registry.workers.get(identity)
            if worker is not None:
                self.broker.members.lose(worker, "connection lost", now)

    def _drop_worker(self, identity: bytes, now: float) -> None:
        """The peer at the worker socket for whom the most waits, while more waits for all than may: it does not read."""
        self.broker.counters["outboxes over their total"] += 1
        self.workers.drop(identity)
        worker = self.broker.registry.workers.get(identity)
        if worker is not None:
            self.broker.members.fence(worker, "does not read", now)

    def next_s(self) -> float | None:
        """When `flush` is due."""
        times = [when_s for port in (self.clients, self.workers) if (when_s := port.next_s()) is not None]
        return min(times, default=None)
