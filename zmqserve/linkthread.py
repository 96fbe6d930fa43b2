"""The thread that owns a worker's sockets: a LinkPort per controller, and the heartbeats.

No backend code runs here, so a compile, a tokenizer or a hung engine cannot silence the worker.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Any

import zmq

from .answers import Answer
from .credentials import credentials
from .lane import Lane
from .link import ControllerLink
from .linkport import POLLIN, LinkPort
from .logs import Logger
from .sockets import plain
from .workload import Workload

if TYPE_CHECKING:
    from .engine import Engine
    from .worker import BaseModelWorker

log = Logger("zmqserve.worker")
BATCH = 64
"""Messages read from one socket before the others have their turn."""
PASSED = 128
"""The engine's messages that are sent before the sockets are read again. Each send lets go of the interpreter lock, which a busy
engine may keep for 5 ms: more of them would make heartbeats late."""
FRAMES = 1024
"""The engine's messages that may wait for this thread: beyond so many generation pauses. With fewer an engine as fast as the sockets
pauses all the time; with more its tokens come late."""
LINGER_MS = 500
"""How long the last frames may take to leave when the worker ends; after a drain as long as its grace lasts."""
MOST_LINGER_S = 1e6
"""libzmq takes no more than 2**31 ms."""
LOOK_S = 0.05
"""How soon one that waits for that heeds that it is to end now."""


class LinkThread(threading.Thread):
    """Passes requests to the engine and what it answers to the controllers, as its `workload` decides."""

    def __init__(self, worker: BaseModelWorker) -> None:
        super().__init__(name=f"{worker.name} links", daemon=True)
        config = worker.config
        self._worker = worker
        self._outbox_bytes = config.outbox_bytes
        self._engine: Engine
        self._calls: deque[Callable[[], None]] = deque()
        self._frames: deque[tuple[Lane, bytes, bytes, Answer | None]] = deque()
        self._for_engine: list[tuple[Any, ...]] = []
        self._own_context = config.context is None
        self._zmq_context: zmq.Context[zmq.Socket[bytes]] = zmq.Context() if config.context is None else plain(config.context)
        self._bell, self._ring = socket.socketpair()
        self._bell.setblocking(False)
        self._ring.setblocking(False)
        self._rung = False
        self.workload = Workload(
            worker,
            self,
            grace_s=config.grace_s,
            message_bytes=config.limits.message_bytes,
            now=time.monotonic,
            hand=self._hand,
            fresh_socket=lambda link: self._ports[link].fresh_socket(),
        )
        self._ports: dict[ControllerLink, LinkPort] = {}
        now = time.monotonic()
        try:
            keys = credentials(config.key, config.controller_key, config.controllers)
            for endpoint in config.controllers:
                port = LinkPort(
                    self._zmq_context,
                    endpoint,
                    config.limits,
                    self.workload,
                    credentials=keys,
                    ttl_s=config.ttl_s,
                    random=Random(),
                    now=now,
                    report=self._report,
                )
                self._ports[port.link] = port
                self.workload.add(port.link)
        except BaseException:
            self._close()
            raise

    def start_with(self, engine: Engine) -> None:
        """Start, and hand requests to this engine."""
        self._engine = engine
        self.workload.desk = engine.desk
        self.start()

    # --- from other threads and signal handlers: no locks ----------------------------------------

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        """As Outbound says."""
        self._frames.append((lane, head, payload, ended))

    def behind(self, lane: Lane) -> bool:
        """As Outbound says."""
        return len(self._frames) > FRAMES or lane.posted_bytes - lane.gone_bytes > self._outbox_bytes

    def pauses(self, lane: Lane) -> bool:
        """As Outbound says."""
        waiting_bytes = lane.posted_bytes - lane.gone_bytes
        return lane.congested and (2 * len(self._frames) > FRAMES or 2 * waiting_bytes > self._outbox_bytes)

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

    def _report(self, event: str, level: str = "info", **fields: object) -> None:
        getattr(log, level)(event, worker=self._worker.name, **fields)

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """The thread."""
        try:
            self._serve()
        except zmq.ContextTerminated:
            log.info("context terminated", worker=self._worker.name)
        except BaseException as error:
            self.workload.end(error)
            log.exception("worker crashed", worker=self._worker.name)
        finally:
            self._engine.halt()
            self._close()

    def _serve(self) -> None:
        bell = self._bell.fileno()
        workload, ports = self.workload, self._ports.values()
        wait_s = 0.0
        while True:
            polled: list[tuple[Any, int]] = [(bell, POLLIN)]
            for port in ports:
                polled += port.polled()
            events = dict(zmq.zmq_poll(polled, ceil(wait_s * 1000)))
            now = time.monotonic()
            if bell in events:
                with suppress(BlockingIOError):
                    self._bell.recv(4096)
            self._rung = False
            while self._calls:
                self._calls.popleft()()
            self._pass_on()
            for port in ports:
                if port.serve(now, events, BATCH):
                    log.warning("connection broke", worker=self._worker.name, controller=port.link.controller, endpoint=port.endpoint)
            if workload.finished(now, len(self._frames)):
                return
            due_s = workload.tick(now)
            self._relieve()
            idle = not self._frames and not workload.finished(now, 0)
            wait_s = max(0.0, due_s - time.monotonic()) if idle else 0.0
            if self._for_engine:
                calls, self._for_engine = self._for_engine, []
                self._engine.call(calls)

    def _hand(self, *call: Any) -> None:
        """Let the engine do it, after this turn."""
        self._for_engine.append(call)

    def _pass_on(self) -> None:
        frames = self._frames
        for _ in range(min(PASSED, len(frames))):
            self.workload.pass_on(*frames.popleft())

    def _relieve(self) -> None:
        """Let the engine make more for controllers that take again what it makes."""
        for lane in self.workload.links.values():
            if lane is not None and lane.congested and not self.pauses(lane):
                self._hand(lane.relieved)

    def _close(self) -> None:
        lingers_ms = [self._linger_ms(port.link) for port in self._ports.values()]
        for port, linger_ms in zip(self._ports.values(), lingers_ms, strict=True):
            port.close(linger_ms)
        if self._own_context and max(lingers_ms, default=0) > LINGER_MS:
            self._let_leave()
        elif self._own_context:
            self._zmq_context.term()
        self._bell.close()
        self._ring.close()

    def _linger_ms(self, link: ControllerLink) -> int:
        """What is finished should reach whoever waits for it, however slow the link."""
        workload = self.workload
        if workload.ending or workload.state != "draining" or link.state != "registered" or link.silent:
            return LINGER_MS
        left_s = workload.drain_ends_s - time.monotonic()
        return max(LINGER_MS, ceil(1000 * min(left_s, MOST_LINGER_S)))

    def _let_leave(self) -> None:
        """Wait until all has left, or its time is up; not if it is to end now."""
        leaving = threading.Thread(target=self._zmq_context.term, name=f"{self._worker.name} leaves", daemon=True)
        leaving.start()
        while leaving.is_alive() and not self.workload.ending:
            leaving.join(LOOK_S)
            while self._calls:
                self._calls.popleft()()
