"""A ROUTER socket of a controller: sends that never block, and what waits for peers that do not read, in order and bounded."""

from __future__ import annotations

import errno
import sys
from collections import deque
from collections.abc import Iterable

import zmq

from .delivery import FULL, GONE, SENT
from .sockets import NOBLOCK, SNDMORE, raw_calls

FIRST_RETRY_S, LAST_RETRY_S = 0.001, 0.05
EVENTS, POLLIN = int(zmq.EVENTS), int(zmq.POLLIN)
MOST_SKIPPED = 2048
"""Frames of a message that is dropped, read in one go: about 3 ms."""
GATHERED_BYTES = 64 * 2**10
"""What waits for that, for one peer, at most."""


class Outbox:
    """Messages for one peer that wait, in order: because its pipe is `full`, or to be sent together at the end of a turn."""

    __slots__ = ("bytes", "full", "messages", "retry_after_s", "retry_s")

    def __init__(self) -> None:
        self.messages: deque[tuple[bytes, ...]] = deque()
        self.bytes = 0
        self.full = False
        self.retry_s = 0.0
        self.retry_after_s = FIRST_RETRY_S

    def __repr__(self) -> str:
        return f"Outbox({len(self.messages)} messages, {self.bytes} bytes)"


class Port:
    """A ROUTER socket whose sends never block and never drop in silence.

    `outbox_bytes` bounds what waits for one peer, `total_bytes` what waits for all; `waiting_bytes` is what does. While `gathering`, what
    is posted waits for `flush`.
    """

    def __init__(self, socket: zmq.Socket[bytes], outbox_bytes: int, compiled: bool = True, total_bytes: int | None = None) -> None:
        self.socket = socket
        self.recv, self.send_frame = raw_calls(socket, compiled)
        self.outboxes: dict[bytes, Outbox] = {}
        self.waiting_bytes = 0
        self.dropped = 0
        self.gathering = self.skipping = False
        self._limit = outbox_bytes
        self.total_bytes = total_bytes if total_bytes is not None else sys.maxsize
        self._most_gathered = min(GATHERED_BYTES, outbox_bytes // 2)

    def __repr__(self) -> str:
        return f"Port({len(self.outboxes)} outboxes, {self.dropped} dropped)"

    def readable(self) -> bool:
        """Whether a message has come. A read that finds none raises, which costs three times as much."""
        return int(self.socket.getsockopt(EVENTS)) & POLLIN != 0

    def skip(self) -> bool:
        """Read on to the end of a message that is none of ours, MOST_SKIPPED frames at a time; whether that end has come. `skipping`
        says that it is still to come: nothing else may be read before."""
        recv = self.recv
        self.skipping = True
        for _ in range(MOST_SKIPPED):
            if not recv(NOBLOCK, copy=False).more:
                self.skipping = False
                return True
        return False

    @property
    def largest(self) -> bytes | None:
        """The peer for whom the most waits, while more than `total_bytes` wait for all."""
        if self.waiting_bytes <= self.total_bytes:
            return None
        return max(self.outboxes, key=lambda identity: self.outboxes[identity].bytes)

    def drop(self, identity: bytes) -> list[tuple[bytes, ...]]:
        """Let go of what waits for a peer; returns it."""
        box = self.outboxes.pop(identity, None)
        if box is None:
            return []
        self.waiting_bytes -= box.bytes
        if box.full:
            self.dropped += len(box.messages)
        return list(box.messages)

    def post(self, *frames: bytes) -> int:
        """As `send`; while `gathering` it is SENT with what else waits for the peer, and `flush` says if that is gone."""
        if not self.gathering:
            return self.send(*frames)
        size = sum(map(len, frames))
        box = self.outboxes.get(frames[0])
        if box is None:
            if size > self._most_gathered:
                return self.send(*frames)
            box = self.outboxes[frames[0]] = Outbox()
        elif box.full:
            return self._keep(box, frames, size)
        elif box.bytes + size > self._most_gathered:
            return self.send(*frames)
        box.messages.append(frames)
        box.bytes += size
        self.waiting_bytes += size
        return SENT

    def send(self, *frames: bytes) -> int:
        """Send a message whose first frame is the peer's routing id: SENT (or kept in order for later), GONE, or FULL."""
        box = self.outboxes.get(frames[0]) if self.outboxes else None
        if box is not None and not box.full:
            if self._empty(frames[0], box) == GONE:
                return GONE
            box = self.outboxes.get(frames[0])
        if box is None:
            _, status = self._try((frames,))
            if status != FULL:
                return status
            box = self.outboxes[frames[0]] = Outbox()
            box.full = True
        return self._keep(box, frames, sum(map(len, frames)))

    def _keep(self, box: Outbox, frames: tuple[bytes, ...], size: int) -> int:
        if box.bytes > 2 * self._limit:
            self.dropped += 1
            return FULL
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
            before = len(box.messages)
            status = self._empty(identity, box)
            if status == GONE:
                gone.append(identity)
            elif status == FULL:
                moved = len(box.messages) < before
                box.retry_after_s = FIRST_RETRY_S if moved else min(LAST_RETRY_S, box.retry_after_s * 2)
                box.retry_s = now + box.retry_after_s
        return gone

    def _empty(self, identity: bytes, box: Outbox) -> int:
        """Send what waits for a peer as far as its pipe takes it: SENT when that was all, GONE when it was for nobody, or FULL."""
        sent, status = self._try(box.messages)
        if status == FULL:
            box.full = True
            for _ in range(sent):
                size = sum(map(len, box.messages.popleft()))
                box.bytes -= size
                self.waiting_bytes -= size
            return FULL
        self.waiting_bytes -= box.bytes
        del self.outboxes[identity]
        return status

    def next_s(self) -> float | None:
        """When `flush` has something to do; None when nothing waits."""
        return min((box.retry_s for box in self.outboxes.values()), default=None)

    def _try(self, messages: Iterable[tuple[bytes, ...]]) -> tuple[int, int]:
        """Send these: how many have gone, and SENT when all have; else FULL, or GONE when there is nobody."""
        send, sent = self.send_frame, 0
        try:
            for frames in messages:
                for frame in frames[:-1]:
                    send(frame, SNDMORE)
                send(frames[-1], NOBLOCK)
                sent += 1
        except zmq.Again:
            return sent, FULL
        except zmq.ZMQError as error:
            if error.errno == errno.EHOSTUNREACH:
                return sent, GONE
            raise
        return sent, SENT
