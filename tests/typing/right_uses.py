"""A user's program with every verb, for type checkers. It is never run."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import AsyncIterator

import numpy as np
import zmq
from numpy.typing import NDArray

from zmqserve import (
    AsyncClient,
    AsyncStream,
    BaseModelWorker,
    Client,
    Completion,
    Controller,
    ControllerConfig,
    Delta,
    EmbedParams,
    GenerateJob,
    Guided,
    MapResult,
    ModelCard,
    Overloaded,
    Pending,
    PolledClient,
    PolledStream,
    SamplingParams,
    ServedModel,
    Stream,
    StreamChunk,
    WorkerConfig,
    WorkerLost,
    ZmqserveError,
)

TURNS = [{"role": "user", "content": "Hi"}]


def blocking() -> None:
    params = SamplingParams(max_tokens=5, guided=Guided(choice=["yes", "no"]))
    with Client(["tcp://127.0.0.1:5570", "ipc:///run/zmqserve"], timeout_s=5, retries=2, resume=False) as client:
        stream: Stream = client.generate("m", "Hello", params=params, temperature=0, stop="\n", seed=1, priority=-5)
        with stream:
            chunk: StreamChunk = next(stream)
            ids: list[int] = chunk.token_ids
            text: str = stream.text()
        whole: Completion = client.generate("m", [1, 2, 3], stream=False, n=2, logprobs=3, retries=1, resume=None)
        tokens: int = whole.usage.completion_tokens
        reason: str = whole.choices[1].finish_reason
        worker: str = whole.timings.worker
        said: Completion = client.chat("m", TURNS, stream=False, affinity="user 7")
        vectors: NDArray[np.float32] = client.embed("e", ["a", "b"], dimensions=64, params=EmbedParams(normalize=True))
        count: int = client.count_tokens("m", TURNS, timeout_s=1.5)
        card: ModelCard = client.model_details("m")
        models: list[ServedModel] = client.models()
        names: list[str] = [each.name for each in client.status().workers]
        running: int = client.drain_worker("w", grace_s=3)
        for result in client.map("m", (f"prompt {n}" for n in range(10)), concurrency=4, ordered=False, progress=print, max_tokens=3):
            each: MapResult = result
            error: ZmqserveError | None = each.error
            print(each.index, each.text, error)
        done: bool = client.drain(timeout_s=2)
    print(ids, text, tokens, reason, worker, said.text, vectors.shape, count, card.name, models, names, running, done)


def failing(client: Client) -> str:
    try:
        return client.generate("m", "x", stream=False).text
    except Overloaded as error:
        later_ms: int | None = error.retry_after_ms
        return f"{error.code} {later_ms}"
    except WorkerLost as error:
        return f"{error.message} {error.retryable} {error.data}"


async def awaiting() -> None:
    async with AsyncClient(context=zmq.Context()) as client:
        stream: AsyncStream = await client.generate("m", "Hello", max_tokens=5)
        async with stream:
            first: StreamChunk = await anext(stream)
        async for chunk in client.chat("m", TURNS):
            print(chunk.text, first.seq)
        answers: list[Completion] = await asyncio.gather(*[client.generate("m", f"{n}", stream=False) for n in range(10)])
        vectors: NDArray[np.float32] = await client.embed("e", ["a"])
        count: int = await client.count_tokens("m", "x")
        models: list[ServedModel] = await client.models()
        running: int = await client.drain_worker("w")
        async for result in client.map("m", prompts(), concurrency=4):
            print(result.completion.usage.prompt_tokens)
        done: bool = await client.drain()
        print((await client.status()).controller, (await client.model_details("m")).verbs)
    print(answers, vectors, count, models, running, done)


async def prompts() -> AsyncIterator[str]:
    yield "a"


def polling() -> None:
    poller = zmq.Poller()
    with PolledClient() as client:
        poller.register(client, zmq.POLLIN)
        stream: PolledStream = client.generate("m", "x")
        answer: Pending[Completion] = client.chat("m", TURNS, stream=False)
        vectors: Pending[NDArray[np.float32]] = client.embed("e", ["a"])
        while not (stream.done and answer.done and vectors.done):
            poller.poll(client.wait_ms())
            for asked in client.process():
                print(asked.rid)
            chunks: list[StreamChunk] = stream.take()
            print(len(chunks))
        print(answer.result().text, vectors.result().shape, stream.completion.usage)


class Shout(BaseModelWorker):
    """A backend of one's own."""

    backend = "shout"
    honours = frozenset({"max_tokens"})

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Shout:
        return cls(config)

    def load(self) -> list[ModelCard]:
        return [ModelCard(self.model_name)]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        for word in (job.request.prompt or "").upper().split():
            yield Delta(word + " ", finish_reason=None)


def serving() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    controller = Controller(ControllerConfig(clients=["inproc://c"], workers=["inproc://w"]), context=context)
    controller.start()
    with Shout(WorkerConfig(model="m", controllers=("inproc://w",), context=context)) as worker:
        worker.wait_ready(5)
    controller.stop()
