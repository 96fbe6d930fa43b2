"""One thread that makes tokens for all requests, a step at a time; the event loop only takes what comes out."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Protocol

from zmqserve.errors import BackendError
from zmqserve.jobs import Delta


class Steps(Protocol):
    """Something that is made step by step."""

    def step(self) -> Delta | None:
        """Make the next piece; None if this step gave none. The one with a finish_reason is the last."""


class Stream:
    """What a StepLoop makes for one request, on an event loop. `cancel` it when no more is wanted, and in any case at the end."""

    def __init__(self, steps: Steps) -> None:
        self.steps: Steps | None = steps
        self._loop = asyncio.get_running_loop()
        self._made: asyncio.Queue[Delta | Exception] = asyncio.Queue()

    def __repr__(self) -> str:
        return f"Stream({self.steps!r}, {self._made.qsize()} deltas waiting)"

    async def next(self) -> Delta:
        """Wait for the next delta. Raises what its step raised."""
        made = await self._made.get()
        if isinstance(made, Exception):
            raise made
        return made

    def cancel(self) -> None:
        """No further step, and the memory is free as soon as the present one is over."""
        self.steps = None

    def put(self, made: Delta | Exception) -> None:
        """From the loop's thread: hand it over."""
        try:
            self._loop.call_soon_threadsafe(self._made.put_nowait, made)
        except RuntimeError:  # the event loop is closed: nobody waits
            self.steps = None


class StepLoop(threading.Thread):
    """Steps each open stream in turn, so that no request waits for another's whole answer; one that fails, fails alone.

    A step is one token or one piece of a prompt. To batch is to step several sequences in one go: here and nowhere else.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._changed = threading.Condition()
        self._opened: list[Stream] = []
        self._closing = False
        self._busy = False
        self._stepped_s = 0.0

    def open(self, steps: Steps) -> Stream:
        """Begin to make `steps`. From an event loop; its deltas arrive there."""
        stream = Stream(steps)
        with self._changed:
            if self._closing:
                raise BackendError("the worker is stopping")
            self._opened.append(stream)
            self._changed.notify()
        return stream

    def age_s(self) -> float:
        """Seconds since the last step ended; 0 when there is nothing to do."""
        return max(0.0, time.monotonic() - self._stepped_s) if self._busy else 0.0

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread after its present step; what is still open fails."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        """The thread."""
        active: list[Stream] = []
        while True:
            active += self._wait(idle=not active)
            if self._closing:
                for stream in active:
                    stream.put(BackendError("the worker stopped before the answer was complete"))
                return
            active = [stream for stream in active if self._step(stream)]

    def _wait(self, *, idle: bool) -> list[Stream]:
        with self._changed:
            if idle:
                self._busy = False
                self._changed.wait_for(lambda: self._opened or self._closing)
                self._stepped_s = time.monotonic()
                self._busy = True
            opened, self._opened = self._opened, []
        return opened

    def _step(self, stream: Stream) -> bool:
        """Whether the stream goes on."""
        steps = stream.steps
        if steps is None:
            return False
        made: Delta | Exception | None
        try:
            made = steps.step()
        except Exception as error:  # noqa: BLE001
            made = error  # whatever it is, it belongs to this request
        self._stepped_s = time.monotonic()
        if made is None:
            return stream.steps is not None
        stream.put(made)
        if isinstance(made, Exception) or made.finish_reason is not None:
            stream.cancel()
        return stream.steps is not None
