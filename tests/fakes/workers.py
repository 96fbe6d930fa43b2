"""Workers for tests: one whose backend the test writes, and what is said to it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from zmqserve import messages as m
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.params import SamplingParams
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .controller import FakeController

WAIT_S = 10.0


class ScriptWorker(BaseModelWorker):
    """A worker whose `generate` and `load` the test gives."""

    backend = "script"
    honours = frozenset({"n"})

    def __init__(
        self,
        config: WorkerConfig,
        generate: Callable[[GenerateJob], AsyncIterator[Delta]] | None = None,
        *,
        load: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._generate, self._load_hook = generate, load
        self.closed = threading.Event()

    def load(self) -> list[m.ModelCard]:
        self._load_hook()
        return [m.ModelCard(self.model_name, context_length=100)]

    def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        if self._generate is None:
            return super().generate(job)
        return self._generate(job)

    def close(self) -> None:
        self.closed.set()


def config(*controllers: FakeController, **settings: Any) -> WorkerConfig:
    return WorkerConfig(**{"model": "m", "controllers": tuple(fake.endpoint for fake in controllers), **settings})


@contextmanager
def serving(worker: BaseModelWorker, *controllers: FakeController) -> Iterator[BaseModelWorker]:
    """The worker, registered as ready with each controller; stopped at the end."""
    worker.start()
    try:
        for controller in controllers:
            controller.register()
        yield worker
    finally:
        worker.stop()


def generate(rid: int, prompt: str = "a b c", *, stream: bool = True, **params: Any) -> m.Generate:
    return m.Generate(rid, "m", stream=stream, prompt=prompt, params=SamplingParams(**params))


async def endless(job: GenerateJob) -> AsyncIterator[Delta]:
    yield Delta("first", (0,))
    await asyncio.Event().wait()


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that sends no message."""
    ends_s = time.monotonic() + WAIT_S
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < ends_s, "it never became true"
        pause.wait(0.005)
