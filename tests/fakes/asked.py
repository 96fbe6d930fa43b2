"""A request as a backend with an engine of its own gets it from the desk, and its answer as a test reads it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.messages import Generate


class AskedJob(GenerateJob):
    """A Job that keeps what comes: deltas, then None or what it failed with. Its controller takes nothing while it is `congested`."""

    def __init__(self, request: Generate) -> None:
        super().__init__(request)
        self.congested = False
        self.made: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    def emit(self, delta: Delta) -> None:
        self.made.put_nowait(delta)

    def finish(self) -> None:
        self.made.put_nowait(None)

    def fail(self, error: Exception) -> None:
        self.made.put_nowait(error)


async def answer_of(worker: ModelWorker, job: AskedJob) -> AsyncGenerator[Delta]:
    """Its deltas; raises what it failed with. Whoever closes this before the end gives the request up, as a cancelled one is."""
    worker.begin(job)
    try:
        while (made := await job.made.get()) is not None:
            if isinstance(made, Exception):
                raise made
            yield made
    finally:
        worker.abandon(job)
