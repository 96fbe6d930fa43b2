"""The hot path: frames in, frames out, by raw calls of pyzmq's compiled base class.

`socket.recv_multipart` costs 3.7 us for three frames, three raw calls 0.4 us; asking for RCVMORE after each message costs
another 0.7 us. So a worker's MORE, two frames behind its routing id, is read without asking where it ends: its head (kind,
epoch, client number) is looked up whole in `Flights.routes`, and a hit proves that the reader is in step, since nobody
else knows that epoch. On a miss RCVMORE is asked, and a reader that lost step (a peer sent a frame too many or too few)
finds the next message again by the epochs.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator

import msgspec
import zmq

from . import messages as m
from .broker import Broker
from .delivery import FULL, GONE, SENT
from .sockets import NOBLOCK, SNDMORE, raw_calls

MAX_ENVELOPE = 16
"""Routing ids before a client's payload: each proxy on the way adds one."""
MAX_ROUTING_ID = 255
"""Bytes of a routing id: libzmq's own limit."""
FIRST_RETRY_S, LAST_RETRY_S = 0.001, 0.05


class Outbox:
    """Messages for one peer whose pipe is full, in order."""

    __slots__ = ("bytes", "messages", "retry_after_s", "retry_s")

    def __init__(self) -> None:
        self.messages: deque[tuple[bytes, ...]] = deque()
        self.bytes = 0
        self.retry_s = 0.0
        self.retry_after_s = FIRST_RETRY_S

    def __repr__(self) -> str:
        return f"Outbox({len(self.messages)} messages, {self.bytes} bytes)"


class Port:
    """A ROUTER socket whose sends never block and never drop in silence.

    `outbox_bytes` bounds what waits for one peer, `total_bytes` what waits for all; `waiting_bytes` is what does.
    """

    def __init__(self, socket: zmq.Socket[bytes], outbox_bytes: int, compiled: bool = True, total_bytes: int | None = None) -> None:
        self.socket = socket
        self.recv, self.send_frame = raw_calls(socket, compiled)
        self.outboxes: dict[bytes, Outbox] = {}
        self.waiting_bytes = 0
        self.dropped = 0
        self._limit = outbox_bytes
        self._total = total_bytes

    def __repr__(self) -> str:
        return f"Port({len(self.outboxes)} outboxes, {self.dropped} dropped)"

    @property
    def largest(self) -> bytes | None:
        """The peer for whom the most waits, while more than `total_bytes` wait for all."""
        if self._total is None or self.waiting_bytes <= self._total:
            return None
        return max(self.outboxes, key=lambda identity: self.outboxes[identity].bytes)

    def drop(self, identity: bytes) -> list[tuple[bytes, ...]]:
        """Let go of what waits for a peer; returns it."""
        box = self.outboxes.pop(identity, None)
        if box is None:
            return []
        self.waiting_bytes -= box.bytes
        self.dropped += len(box.messages)
        return list(box.messages)

    def send(self, *frames: bytes) -> int:
        """Send a message whose first frame is the peer's routing id: SENT (or kept in order for later), GONE, or FULL."""
        box = self.outboxes.get(frames[0])
        if box is None:
            status = self._try(frames)
            if status != FULL:
                return status
            box = self.outboxes[frames[0]] = Outbox()
        elif box.bytes > 2 * self._limit:
            self.dropped += 1
            return FULL
        size = sum(map(len, frames))
        box.messages.append(frames)
        box.bytes += size
        self.waiting_bytes += size
        return FULL if box.bytes > self._limit else SENT

    def flush(self, now: float) -> list[bytes]:
        """Try again what waits and is due; returns the routing ids of peers that are gone."""
        gone = []
        for identity, box in list(self.outboxes.items()):
            if box.retry_s > now:
                continue
            moved = False
            while box.messages:
                status = self._try(box.messages[0])
                if status == FULL:
                    box.retry_after_s = FIRST_RETRY_S if moved else min(LAST_RETRY_S, box.retry_after_s * 2)
                    box.retry_s = now + box.retry_after_s
                    break
                if status == GONE:
                    gone.append(identity)
                    box.messages.clear()
                    self.waiting_bytes -= box.bytes
                    break
                moved = True
                size = sum(map(len, box.messages.popleft()))
                box.bytes -= size
                self.waiting_bytes -= size
            if not box.messages:
                del self.outboxes[identity]
        return gone

    def next_s(self) -> float | None:
        """When `flush` has something to do; None when nothing waits."""
        return min((box.retry_s for box in self.outboxes.values()), default=None)

    def _try(self, frames: tuple[bytes, ...]) -> int:
        send = self.send_frame
        try:
            for frame in frames[:-1]:
                send(frame, SNDMORE)
            send(frames[-1], NOBLOCK)
        except zmq.Again:
            return FULL
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return GONE
            raise
        return SENT


class Relay:
    """Moves messages between two ports and a broker."""

    def __init__(self, broker: Broker, clients: Port, workers: Port) -> None:
        self.broker = broker
        self.clients, self.workers = clients, workers
        self._heads = msgspec.msgpack.Decoder(m.WorkerHead)
        self._unsure: tuple[bytes, bytes] | None = None
        broker.flights.delivery.drop_outbox = clients.drop

    def __repr__(self) -> str:
        return f"Relay({self.clients!r}, {self.workers!r})"

    def from_workers(self, now: float, most: int) -> None:
        """Read up to `most` messages of workers, as long as there are any."""
        recv, send = self.workers.recv, self.clients.send_frame
        outboxes = self.clients.outboxes
        flights = self.broker.flights
        routes = flights.routes
        unsure = self._unsure  # routing id and payload of the last message that was read without asking for its end
        for _ in range(most):
            frames = []
            try:
                frames.append(identity := recv(NOBLOCK))
                frames.append(head := recv(NOBLOCK))
                frames.append(payload := recv(NOBLOCK))
            except zmq.Again:
                if not frames:
                    break
                self._resynchronise(now, unsure, frames)
                unsure = None
                continue
            route = routes.get(head)
            if route is None or route.identity != identity:
                self._slow(now, unsure, frames)
                self._relieve(now)
                unsure = None
                continue
            unsure = (identity, payload)
            route.worker.lease.heard_s = now
            client = route.client
            if client.gone:
                continue
            envelope = client.envelope
            if outboxes or len(envelope) > 1:
                flights.delivery.chunks(client, payload, now)
                self._relieve(now)
                continue
            try:
                send(envelope[0], SNDMORE)
                send(payload, NOBLOCK)
            except zmq.ZMQError:
                flights.delivery.chunks(client, payload, now)
        self._unsure = unsure

    def _slow(self, now: float, unsure: tuple[bytes, bytes] | None, frames: list[bytes]) -> None:
        """A message that is no plain MORE, or a reader out of step."""
        if self.workers.socket.getsockopt(zmq.RCVMORE):
            self._resynchronise(now, unsure, frames)
        else:
            self.broker.from_worker(now, frames[0], frames[1], frames[2], certain=unsure is None)

    def _resynchronise(self, now: float, unsure: tuple[bytes, bytes] | None, frames: list[bytes]) -> None:
        """Read on to a message's end, then pick out what is a message by its sender's epoch.

        Who sent a frame too many or too few is fenced where that is certain. Nobody else may lose anything by it: peers may choose
        their routing ids, so frames that fit nowhere may be a stranger's as well as more of the last message.
        """
        broker = self.broker
        broker.counters["resynchronised"] += 1
        while self.workers.socket.getsockopt(zmq.RCVMORE):
            frames.append(self.workers.recv(NOBLOCK))
        guilty: bytes | None = None
        if unsure is None or (len(frames) > 1 and self._is_head_of(frames[0], frames[1])):
            guilty = frames[0]  # in step where this message begins: who sent it sent its frames
        elif unsure[1] in broker.registry.workers:
            guilty = unsure[0]  # what was taken for its payload is the next message's routing id
            frames.insert(0, unsure[1])
        else:
            self._suspect(unsure[0])
        for message in self._messages_in(frames):
            broker.from_worker(now, *message)
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

    def from_clients(self, now: float, most: int) -> None:
        """Read up to `most` messages of clients, as long as there are any."""
        recv, take = self.clients.recv, self.broker.from_client
        for _ in range(most):
            try:
                identity = recv(NOBLOCK)
            except zmq.Again:
                break
            frame = recv(NOBLOCK, copy=False)
            if not frame.more:
                take(now, (identity,), frame.bytes)
                self._relieve(now)
                continue
            envelope: list[bytes] = [identity]
            fits = True
            while frame.more:
                fits = fits and len(envelope) < MAX_ENVELOPE and len(frame) <= MAX_ROUTING_ID
                if fits:
                    envelope.append(frame.bytes)
                frame = recv(NOBLOCK, copy=False)
            if fits:
                take(now, tuple(envelope), frame.bytes)
            else:
                self.broker.counters["dropped: envelope too large"] += 1

    def _relieve(self, now: float) -> None:
        """While more waits for all clients than may, the one for whom the most waits is treated as one that does not read."""
        while (identity := self.clients.largest) is not None:
            self.broker.counters["outboxes over their total"] += 1
            self.broker.flights.delivery.connection_failed(identity, FULL, now)

    def flush(self, now: float) -> None:
        """Try again what waits in outboxes, and tell the broker who is gone."""
        self._relieve(now)
        for identity in self.clients.flush(now) if self.clients.outboxes else ():
            self.broker.flights.delivery.connection_failed(identity, GONE, now)
        for identity in self.workers.flush(now) if self.workers.outboxes else ():
            worker = self.broker.registry.workers.get(identity)
            if worker is not None:
                self.broker.members.lose(worker, "connection lost", now)

    def next_s(self) -> float | None:
        """When `flush` is due."""
        times = [when_s for port in (self.clients, self.workers) if (when_s := port.next_s()) is not None]
        return min(times, default=None)
