"""Prompts of a `map` on an event loop, from an iterable of either kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterable
from typing import Any

from .requests import Prompt


class Prompts:
    """Takes one after the other. From an asynchronous iterable the next one is awaited beside whatever else is going on.

    `taken`: the last one. `over`: there are no more.
    """

    def __init__(self, prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> None:
        self.taken: Prompt = ""
        self.over = False
        self._later = aiter(prompts) if isinstance(prompts, AsyncIterable) else None
        self._now = iter(()) if isinstance(prompts, AsyncIterable) else iter(prompts)
        self._coming: asyncio.Future[Any] | None = None

    def __repr__(self) -> str:
        return f"Prompts({'over' if self.over else 'more'})"

    @property
    def awaited(self) -> bool:
        """Whether the next one is on its way."""
        return self._coming is not None

    def take(self) -> bool:
        """Whether there is one now: it is `taken` then."""
        try:
            if self._later is None:
                self.taken = next(self._now)
                return True
            if self._coming is None:
                self._coming = asyncio.ensure_future(_next(self._later))
            if not self._coming.done():
                return False
            coming, self._coming = self._coming, None
            self.taken = coming.result()
        except (StopIteration, StopAsyncIteration):
            self.over = True
            return False
        return True

    async def wait(self, other: Coroutine[Any, Any, None]) -> None:
        """Until `take` is worth a try, or `other` is done."""
        waiting: asyncio.Future[Any] = asyncio.ensure_future(other)
        both = [waiting] if self._coming is None else [waiting, self._coming]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
            # Nobody else may wait for the same before this one has let go.
            await asyncio.gather(waiting, return_exceptions=True)

    async def close(self) -> None:
        """Wait for no more; what was awaited has let go when this returns."""
        if self._coming is not None:
            self._coming.cancel()
            await asyncio.gather(self._coming, return_exceptions=True)


async def _next(prompts: AsyncIterator[Prompt]) -> Prompt:
    return await anext(prompts)
