"""The loop of a bridge: takes jobs while there is room, and lets go of results as the pipeline takes them."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import suppress
from math import ceil, inf
from time import monotonic
from typing import Any

import zmq

from .bridge_end import PipelineEnd
from .bridge_jobs import Job, read
from .bridge_outlet import Outlet
from .bridge_runs import Runs
from .logs import Logger
from .polled import PolledClient
from .sockets import NOBLOCK

log = Logger("zmqserve.bridge")
POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)
TURN_JOBS = 64
"""Jobs taken in one turn."""
QUIET_S = 0.1
"""A bridge that is told to stop takes what still arrives until there was nothing for so long."""


class BridgeLoop:
    """`run` returns when it was told to stop and all is done, or when `hurry` says so; see Bridge for what it is given.

    `held`: jobs taken whose results libzmq has not taken. `until_s`: when it gives up what is held, on the clock of time.monotonic.
    """

    def __init__(
        self,
        client: PolledClient,
        pull: PipelineEnd,
        push: PipelineEnd,
        counters: Counter[str],
        *,
        model: str | None,
        timeout_s: float | None,
        concurrency: int,
        window: int,
        ordered: bool,
        drain_s: float,
        job_bytes: int,
    ) -> None:
        self.client, self.pull, self.push = client, pull, push
        self.held = self._taken = 0
        self.until_s = inf
        self._counters = counters
        self._model, self._job_bytes = model, job_bytes
        self._concurrency, self._window = concurrency, window
        self._drain_s = drain_s
        self._outlet = Outlet(ordered=ordered)
        self._runs = Runs(client, self._outlet.put, counters, model=model, timeout_s=timeout_s)
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._told = self._tells = False
        self._taking = True
        self._stopped_s = inf
        self._heard_s = 0.0

    def __repr__(self) -> str:
        return f"BridgeLoop(held={self.held}, {self._runs!r}, {self._outlet!r})"

    # --- from other threads and signal handlers: no locks ----------------------------------------

    def stop(self) -> None:
        """Take what still arrives, finish, return."""
        self._told = True
        self.wake()

    def tell(self) -> None:
        """Log the counters."""
        self._tells = True
        self.wake()

    def wake(self) -> None:
        """Look at what was said."""
        with suppress(OSError):
            self._rope.send(b"\0")

    # --- the loop ---------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until stopped."""
        while True:
            now = monotonic()
            self._listen(now)
            self._runs.process(now)
            if self._taking:
                self._take(now)
            left = self._outlet.flush(self._send)
            self.held -= left
            self._counters["results"] += left
            if now >= self.until_s or not (self._taking or self.held):
                return
            self._sleep()

    def close(self, linger_ms: int) -> None:
        """Let go of all sockets; what libzmq holds has `linger_ms` to leave."""
        self.client.close()
        self.pull.close(0)
        self.push.close(linger_ms)
        self._bell.close()
        self._rope.close()

    def _listen(self, now: float) -> None:
        with suppress(BlockingIOError):
            self._bell.recv(4096)
        if self._tells:
            self._tells = False
            log.info("bridge counters", held=self.held, running=len(self._runs), **self._counters)
        if self._told and self._stopped_s == inf:
            log.info("bridge stops", held=self.held, running=len(self._runs))
            self._stopped_s = self._heard_s = now
            self._runs.end_patience()
            self.pull.retire()

    @property
    def _room(self) -> bool:
        return self.held < self._window and len(self._runs) < self._concurrency

    def _take(self, now: float) -> None:
        """Take jobs, and see when there will be none any more."""
        over = now - self._stopped_s >= self._drain_s
        arrives = bool(self.pull.socket.poll(0)) if over else True
        for _ in range(0 if over else TURN_JOBS):
            # Told to stop just now: the next turn sees whether any more are to be taken.
            if not self._room or (self._told and self._stopped_s == inf):
                break
            try:
                frames = self.pull.socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                arrives = False
                break
            self._heard_s = now
            self._begin(now, frames)
        if arrives:
            self._heard_s = now  # or there may be more, which nobody has looked for
        if over or (self._stopped_s < inf and now - self._heard_s >= QUIET_S):
            if arrives:
                log.warning("jobs may still arrive: those on their way here are lost", drain_s=self._drain_s)
            self._taking = False
            self.pull.close(0)

    def _begin(self, now: float, frames: list[bytes]) -> None:
        number = self._taken
        self._taken += 1
        self.held += 1
        self._counters["jobs"] += 1
        envelope, job = read(frames, self._model, self._job_bytes)
        if isinstance(job, Job):
            self._runs.begin(now, number, envelope, job)
        else:
            self._runs.refuse(number, envelope, job)

    def _send(self, result: bytes) -> bool:
        try:
            self.push.socket.send(result, NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _sleep(self) -> None:
        if self.client.fileno() < 0:
            raise zmq.ContextTerminated  # the client was the first to see it
        now = monotonic()
        polled: list[tuple[Any, int]] = [(self.client.fileno(), POLLIN), (self._bell.fileno(), POLLIN)]
        wait_s = min(self._runs.wait_s(), self.until_s - now)
        if self._taking and self._room:
            polled.append((self.pull.socket, POLLIN))
        if self._outlet:
            polled.append((self.push.socket, POLLOUT))
        if self._taking and self._stopped_s < inf:
            wait_s = min(wait_s, self._heard_s + QUIET_S - now, self._stopped_s + self._drain_s - now)
        zmq.zmq_poll(polled, -1 if wait_s == inf else max(0, ceil(wait_s * 1000)))
