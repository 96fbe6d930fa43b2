"""Requests on their way to a vLLM engine. Those that have come together go there together, so that one step takes their prompts.

An engine's first step takes what it has got by then, and those who are late wait for its end: in a burst the time from the first request
to the last is what most of them wait for. So there is one hand-over to the tokenizer's thread for many requests, none for those that
bring ids, and no task for each.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

from zmqserve.answers import Job

PREPARE_S = 0.001
"""Requests are prepared for so long before what is ready goes to the engine: a long prompt keeps none of those before it."""

T = TypeVar("T")


class Admission(Generic[T]):
    """Prepares jobs and hands them on, in the order in which they came. On the event loop, except for `prepare`.

    ``prepare(job)`` runs on the `tokenizing` thread, or here when nothing has to be tokenized. ``hand_on(job, prepared)`` gets what
    it has returned or raised, and must not raise. A job that was stopped before goes no further.
    """

    def __init__(self, tokenizing: Executor, prepare: Callable[[Job], T], hand_on: Callable[[Job, T | Exception], Awaitable[None]]) -> None:
        self._tokenizing = tokenizing
        self._prepare = prepare
        self._hand_on = hand_on
        self._arrived: deque[Job] = deque()
        self._task: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Admission({len(self._arrived)} requests)"

    def add(self, job: Job) -> None:
        """One more."""
        self._arrived.append(job)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._admit())

    async def _admit(self) -> None:
        """All that have arrived, and those that arrive meanwhile. The thread prepares the next while the last ones are handed on."""
        ready: list[tuple[Job, T | Exception]] = []
        while ready or self._arrived:
            tokenized = None
            if not self._bring_ids():
                tokenized = asyncio.get_running_loop().run_in_executor(self._tokenizing, self._prepare_some)
            for job, prepared in ready:
                await self._hand_on(job, prepared)
            if tokenized is not None:
                ready = await tokenized
            else:
                ready = self._prepare_some() if self._bring_ids() else []
        self._task = None

    def _bring_ids(self) -> bool:
        """Whether nothing has to be tokenized of what has arrived."""
        return all(job.request.token_ids is not None for job in self._arrived)

    def _prepare_some(self) -> list[tuple[Job, T | Exception]]:
        until_s = time.monotonic() + PREPARE_S
        ready: list[tuple[Job, T | Exception]] = []
        while self._arrived and (not ready or time.monotonic() < until_s):
            job = self._arrived.popleft()
            if job.stopped:
                continue
            try:
                ready.append((job, self._prepare(job)))
            except Exception as error:  # noqa: BLE001 - it belongs to this request
                ready.append((job, error))
        return ready
