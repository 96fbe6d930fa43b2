"""What a worker's event loop gives to a Desk, in simulated time: tasks that sleep and can be cancelled, and timers."""

from __future__ import annotations

import types
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Generator
from typing import Any

Soon = Callable[..., None]
"""Runs ``(delay_s, function)`` on the engine's thread."""


@types.coroutine
def sleep(seconds: float) -> Generator[float, None, None]:
    yield seconds


class Task:
    """A coroutine of the engine: each yield is a sleep. As in asyncio, `cancel` before its first step means that it never runs."""

    def __init__(self, soon: Soon, coroutine: Coroutine[Any, Any, None]) -> None:
        self._soon = soon
        self._coroutine = coroutine
        self._begun = self._over = self._cancelled = False
        soon(0.0, self._step)

    def cancel(self) -> None:
        if not self._over and not self._cancelled:
            self._cancelled = True
            self._soon(0.0, self._step)

    def __del__(self) -> None:
        # The process was killed before it ran.
        self._coroutine.close()

    def _step(self) -> None:
        if self._over:
            return
        try:
            if self._cancelled and not self._begun:
                self._over = True
                self._coroutine.close()
                return
            self._begun = True
            sleep_s = self._coroutine.throw(CancelledError()) if self._cancelled else self._coroutine.send(None)
        except (StopIteration, CancelledError):
            self._over = True
        else:
            self._soon(sleep_s, self._step)


class Timer:
    """What Desk.call_at gives back."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action: Callable[[], object] | None = action

    def cancel(self) -> None:
        self.action = None

    def __call__(self) -> None:
        if self.action is not None:
            self.action()
