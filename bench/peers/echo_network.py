"""zmqserve as its users have it: a controller, EchoWorker and one AsyncClient, every token decoded and delivered to its stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection

from bench import lean
from zmqserve import AsyncClient, Vectors, WorkerConfig
from zmqserve.answers import Job
from zmqserve.backends.echo import EchoWorker
from zmqserve.messages import Embed

from .loads import BATCH, EMBED_IN_FLIGHT, FLOATS, TEXT, Scale
from .running import PATIENCE_S, Running

ONE_TOKEN_BYTES = 300
"""By a worker's own bound one token of this benchmark fits, and two do not."""
STEP, TOKEN = "step", "token"
"""The models of the two workers: all requests' tokens of one step in one message, and one token a message."""


def start(running: Running) -> None:
    """Controller, workers and client."""
    clients, workers = running.spawn("broker", lean.controller, "tcp", str(running.folder))
    for model in (STEP, TOKEN):
        running.spawn("worker", work, workers, model)
    running.open_client(EchoClient, clients)


def work(ready: Connection, endpoint: str, model: str) -> None:
    """A worker, until it is killed."""
    kind = Stepping if model == STEP else OneByOne
    worker = kind(WorkerConfig(model=model, controllers=(endpoint,), slots=1024))
    with worker:
        worker.wait_ready(PATIENCE_S)
        ready.send("ready")
        worker.wait_ended()


class Stepping(EchoWorker):  # type: ignore[misc]
    """Has its vectors ready: making them is not what is measured."""

    _rows = bytes(range(256)) * (BATCH * FLOATS * 4 // 256)

    async def embed(self, request: Embed) -> Vectors:
        return Vectors(self._rows, (len(request.texts), FLOATS), len(request.texts))


class OneByOne(Stepping):
    """Sends each token by itself."""

    def begin(self, job: Job) -> None:
        job.answer.gather.most_bytes = ONE_TOKEN_BYTES
        super().begin(job)


class EchoClient:
    """The workloads through AsyncClient, each stream read by a task of its own."""

    def __init__(self, endpoint: str) -> None:
        self._runner = asyncio.Runner()
        self._client = AsyncClient(endpoint)

    def tokens(self, scale: Scale, step: bool, _decode: bool) -> tuple[int, float]:
        """Tokens, and seconds from the first request to the last end."""
        return self._runner.run(self._tokens(scale, STEP if step else TOKEN))

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""

        async def one() -> int:
            async for _ in self._client.generate(STEP, TEXT, max_tokens=1):
                pass
            return 1

        return self._runner.run(_closed_loop(scale.in_flight, scale.run_s, one))

    def embedded(self, scale: Scale, _fast: bool) -> tuple[int, float]:
        """Vectors, and seconds."""
        texts = [TEXT] * BATCH

        async def batch() -> int:
            vectors = await self._client.embed(STEP, texts)
            assert vectors.shape == (BATCH, FLOATS), vectors.shape
            return BATCH

        return self._runner.run(_closed_loop(EMBED_IN_FLIGHT, scale.run_s, batch))

    async def _tokens(self, scale: Scale, model: str) -> tuple[int, float]:
        async def read() -> int:
            tokens = 0
            async for chunk in self._client.generate(model, TEXT[1:], max_tokens=scale.tokens):
                tokens += len(chunk.token_ids)
            return tokens

        began_s = time.perf_counter()
        tokens = sum(await asyncio.gather(*[read() for _ in range(scale.streams)]))
        spent_s = time.perf_counter() - began_s
        assert tokens == scale.streams * scale.tokens, tokens
        return tokens, spent_s


async def _closed_loop(in_flight: int, run_s: float, ask: Callable[[], Awaitable[int]]) -> tuple[int, float]:
    began_s = time.perf_counter()
    end_s = began_s + run_s

    async def loop() -> int:
        made = 0
        while time.perf_counter() < end_s:
            made += await ask()
        return made

    made = sum(await asyncio.gather(*[loop() for _ in range(in_flight)]))
    return made, time.perf_counter() - began_s
