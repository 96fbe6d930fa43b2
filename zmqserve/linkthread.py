"""The thread that owns a worker's sockets: one DEALER and one ControllerLink per controller, and their heartbeats.

No backend code runs here, so a compile, a tokenizer or a hung engine cannot silence the worker.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import ceil, inf
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec
import zmq

from .answers import Answer
from .errors import Refused
from .lane import Lane
from .link import ControllerLink
from .logs import Logger
from .messages import ControllerHead, Load, Peek, Ready
from .sockets import NOBLOCK, SNDMORE, dealer, raw_calls

if TYPE_CHECKING:
    from .engine import Engine
    from .worker import BaseModelWorker

log = Logger("zmqserve.worker")
BATCH = 64
"""Messages read from one socket before the others have their turn."""
FRAMES = 128
"""The engine's messages that may wait for this thread, and that it sends before it reads its sockets again. Each send lets go
of the interpreter lock, which a busy engine gives back only once per turn of its loop: beyond so many it pauses. With more,
tokens made at full speed would arrive 100 ms late."""
LINGER_MS = 500
"""How long the last frames may take to leave when the worker ends."""
SLOT_TAGS = (2, 3)
"""Generate and Embed take a slot; what else is asked is quick."""

_peek = msgspec.msgpack.Decoder(Peek)


class _Port:
    """One controller's socket and link."""

    def __init__(self, thread: LinkThread, endpoint: str, now: float) -> None:
        self.endpoint = endpoint
        self.lane: Lane | None = None
        self.polled = 0
        self._thread = thread
        self.open()
        self.link = ControllerLink(endpoint, thread, self._try_send, ttl_s=thread.worker.config.ttl_s, random=Random(), now=now)

    def open(self) -> None:
        self.socket = dealer(self._thread.context, self.endpoint, self._thread.worker.config.limits, immediate=True)
        self._send = raw_calls(self.socket)[1]

    def _try_send(self, head: bytes, payload: bytes) -> bool:
        # When the connection breaks between the two, the second says so; libzmq has forgotten the first.
        try:
            self._send(head, SNDMORE)
            self._send(payload, NOBLOCK)
        except zmq.Again:
            return False
        return True


class LinkThread(threading.Thread):
    """Passes requests to the engine and what it answers to the controllers. `failure` says why it ended, if not as asked.

    It counts slots: a request takes one when it is handed to the engine and gives it back with its DONE or FAILED.
    """

    def __init__(self, worker: BaseModelWorker) -> None:
        super().__init__(name=f"{worker.name} links", daemon=True)
        config = worker.config
        self.worker = worker
        self._outbox_bytes = config.outbox_bytes
        self.state = "loading"
        self.slots = 0
        self.running = 0
        self.failure: BaseException | None = None
        self.engine: Engine
        self._open = 0
        self._stopping = False
        self._drain_ends_s = inf
        self._calls: deque[Callable[[], None]] = deque()
        self._frames: deque[tuple[Lane, bytes, bytes, Answer | None]] = deque()
        self._for_engine: list[tuple[Any, ...]] = []
        self._now = time.monotonic()
        self._own_context = config.context is None
        self.context: zmq.Context[zmq.Socket[bytes]] = config.context or zmq.Context()
        self._bell, self._ring = socket.socketpair()
        self._rung = False
        self._ports: dict[ControllerLink, _Port] = {}
        self._poller = zmq.Poller()
        try:
            for endpoint in config.controllers:
                port = _Port(self, endpoint, self._now)
                self._ports[port.link] = port
        except BaseException:
            self._close()
            raise
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._poller.register(self._bell, zmq.POLLIN)

    # --- from other threads and signal handlers: no locks ----------------------------------------

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        """As Outbound says."""
        self._frames.append((lane, head, payload, ended))

    def behind(self, lane: Lane) -> bool:
        """As Outbound says."""
        return len(self._frames) > FRAMES or lane.posted_bytes - lane.gone_bytes > self._outbox_bytes

    def wake(self) -> None:
        """Look at what was posted."""
        if not self._rung:
            self._rung = True
            with suppress(OSError):
                self._ring.send(b"\0")

    def call(self, function: Callable[[], None]) -> None:
        """Run it on this thread."""
        self._calls.append(function)
        self.wake()

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread."""
        try:
            self._serve()
        except zmq.ContextTerminated:
            log.info("context terminated", worker=self.worker.name)
        except BaseException as error:
            self.failure = self.failure or error
            log.exception("worker crashed", worker=self.worker.name)
        finally:
            self.engine.halt()
            self._close()

    def _serve(self) -> None:
        bell = self._bell.fileno()
        wait_s = 0.0
        while True:
            events = dict(self._poller.poll(ceil(wait_s * 1000)))
            self._now = time.monotonic()
            if bell in events:
                with suppress(BlockingIOError):
                    self._bell.recv(4096)
            self._rung = False
            while self._calls:
                self._calls.popleft()()
            self._send_frames()
            for port in self._ports.values():
                event = events.get(port.socket, 0)
                if event & zmq.POLLIN:
                    self._receive(port)
                if event & zmq.POLLOUT:
                    port.link.writable(self._now)
            if self._finished():
                return
            wait_s = 0.0 if self._frames else max(0.0, min(self._tick(), self._drain_ends_s) - time.monotonic())
            if self._finished():
                wait_s = 0.0
            if self._for_engine:
                calls, self._for_engine = self._for_engine, []
                self.engine.call(calls)

    def _receive(self, port: _Port) -> None:
        for _ in range(BATCH):
            try:
                frames = port.socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            if len(frames) == 2:
                port.link.received(self._now, *frames)
            else:
                port.link.bad_frames += 1

    def _send_frames(self) -> None:
        frames = self._frames
        for _ in range(min(FRAMES, len(frames))):
            lane, head, payload, ended = frames.popleft()
            link = lane.link
            if head:
                link.post(lane.epoch, head, payload)
                lane.taken_bytes += len(head) + len(payload)
            if ended is not None:
                self._open -= 1
                if ended.slot:
                    self.running -= 1
                    lane.yours -= 1
                    self._tell_others(link)

    def _tick(self) -> float:
        due_s = inf
        for port in self._ports.values():
            link = port.link
            due_s = min(due_s, link.tick(self._now))
            lane = port.lane
            if lane is not None:
                lane.gone_bytes = lane.taken_bytes - link.outbox_bytes
                if lane.congested and 2 * len(self._frames) <= FRAMES and 2 * (lane.posted_bytes - lane.gone_bytes) <= self._outbox_bytes:
                    self._for_engine.append((lane.relieved,))
            wanted = zmq.POLLIN | (zmq.POLLOUT if link.blocked else 0)
            if port.polled != wanted:
                port.polled = wanted
                self._poller.register(port.socket, wanted)
        return due_s

    def _finished(self) -> bool:
        if self._stopping or self._now >= self._drain_ends_s:
            return True
        if self.state != "draining" or self._open or self._frames:
            return False
        # Nobody takes what waits for a controller that is not there.
        return not any(port.link.outbox_bytes for port in self._ports.values() if port.link.state == "registered" and not port.link.silent)

    def _close(self) -> None:
        for port in self._ports.values():
            with suppress(zmq.ZMQError):
                port.link.close()
            port.socket.close(linger=LINGER_MS)
        self._bell.close()
        self._ring.close()
        if self._own_context:
            self.context.term()

    # --- what the worker decides, on this thread --------------------------------------------------

    def announce(self, slots: int) -> None:
        """The model is loaded."""
        if self.state == "loading":
            self.state, self.slots = "ready", slots
            for port in self._ports.values():
                port.link.announce()

    def drain(self, grace_s: float | None) -> None:
        """Take nothing new, finish what runs within `grace_s` (None: the worker's own), then end."""
        if self.state != "draining":
            self.state = "draining"
            grace_s = self.worker.config.grace_s if grace_s is None else grace_s
            self._drain_ends_s = self._now + grace_s
            log.info("draining", worker=self.worker.name, running=self._open, grace_s=grace_s)
            for port in self._ports.values():
                port.link.drain()

    def end(self, failure: BaseException | None = None) -> None:
        """End now. What still runs is aborted; its controllers move it."""
        self.failure = self.failure or failure
        self._stopping = True

    # --- LinkHost ---------------------------------------------------------------------------------

    def ready(self) -> Ready:
        """As LinkHost says."""
        return self.worker.registration(self.state, self.slots)

    def load(self, link: ControllerLink) -> Load:
        """As LinkHost says."""
        lane = self._ports[link].lane
        return Load(self.running, 0, lane.yours if lane is not None else 0, 1000 * self.worker.step_age_s())

    def offer(self, link: ControllerLink, head: ControllerHead, payload: bytes) -> bool:
        """As LinkHost says."""
        try:
            slot = _peek.decode(payload).tag in SLOT_TAGS
        except (msgspec.DecodeError, RecursionError):
            slot = False
        if slot and (self.running >= self.slots or self.state != "ready"):
            return False
        port = self._ports[link]
        if port.lane is None:
            own_bytes = self.worker.config.limits.message_bytes
            port.lane = Lane(link, link.epoch, self, min(own_bytes, link.message_bytes or own_bytes))
        self._open += 1
        if slot:
            if not self.running:
                self.engine.rouse()
            self.running += 1
            port.lane.yours += 1
            self._tell_others(link)
        self._for_engine.append((self.engine.request, port.lane, head, payload, slot, self._now))
        return True

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None:
        """As LinkHost says."""
        lane = self._ports[link].lane
        if lane is not None:
            self._for_engine.append((self.engine.cancel, lane, client, rid))

    def abort(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        port = self._ports[link]
        if port.lane is not None:
            port.lane.alive = False
            self._for_engine.append((self.engine.abort, port.lane))
            port.lane = None

    def fresh_socket(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        port = self._ports[link]
        log.info("reconnecting", worker=self.worker.name, controller=link.controller, endpoint=link.endpoint)
        self._poller.unregister(port.socket)
        port.socket.close()
        port.open()
        port.polled = 0

    def changed(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        note = log.bind(worker=self.worker.name, controller=link.controller, endpoint=link.endpoint)
        refusal = link.refusal
        if link.silent:
            if self.state != "draining" and not self._stopping:
                note.warning("controller silent")
        elif link.state == "registered":
            note.info("registered", state=self.state)
            if self.state == "ready":
                self.worker.taken()
        elif refusal is not None and link.state == "registering":
            note.warning("registration refused, trying again", why=refusal.why, retry_after_ms=refusal.retry_after_ms)
        elif refusal is not None and link.state == "refused":
            note.error("registration refused", why=refusal.why)
            # With others left the worker still has somebody to serve.
            if all(port.link.state == "refused" for port in self._ports.values()):
                text = f"the controller at {link.endpoint} refused worker {self.worker.name}: {refusal.why}"
                self.end(Refused(text, data={"endpoint": link.endpoint, "code": refusal.code}))

    def _tell_others(self, link: object) -> None:
        for other in self._ports:
            if other is not link:
                other.others_changed(self._now)
