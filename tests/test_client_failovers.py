"""AsyncClient and PolledClient when workers and controllers die: real processes, killed. What Client does then: test_failover.py."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.fakes.clients import Driving
from tests.processes import CAME, PATIENCE_S, Served, ServedController, network
from zmqserve import AsyncClient, AsyncStream, PolledClient, PolledStream, errors

pytestmark = pytest.mark.heavy

SLOW = ("--delay-per-token", "0.01", "--slots", "16")
PROMPT = "one two three four five six seven"
TOKENS = 120
TEXT = " ".join(PROMPT.split()[place % 7] for place in range(TOKENS))


class Two:
    """Two controllers, and two workers that serve both."""

    def __init__(self, stack: ExitStack) -> None:
        self.controllers = [stack.enter_context(ServedController()) for _ in range(2)]
        first, second = self.controllers
        self.workers: list[Served] = [stack.enter_context(first.echo(name, *SLOW, also=[second])) for name in "ab"]
        for controller in self.controllers:
            for _ in self.workers:
                controller.wait_for(CAME, state="ready")
        self.endpoints = [controller.clients for controller in self.controllers]

    def kill(self, victim: str) -> None:
        (self.controllers if victim == "controller" else self.workers)[0].end(signal.SIGKILL)


@pytest.fixture
def two() -> Iterator[Two]:
    with ExitStack() as stack:
        yield Two(stack)


@pytest.mark.parametrize("victim", ["controller", "worker"])
def test_tasks_read_on(two: Two, victim: str) -> None:
    async def main() -> list[int]:
        async with AsyncClient(two.endpoints) as client:
            streams = [client.generate("m", PROMPT, max_tokens=TOKENS) for _ in range(20)]
            begun = asyncio.Semaphore(0)

            async def read(stream: AsyncStream) -> str:
                texts = [(await anext(stream)).text]
                begun.release()
                texts += [piece.text async for piece in stream]
                return "".join(texts)

            readers = [asyncio.ensure_future(read(stream)) for stream in streams]
            whole = asyncio.ensure_future(client.generate("m", PROMPT, stream=False, max_tokens=TOKENS))
            for _ in streams:
                await begun.acquire()
            two.kill(victim)
            assert await asyncio.gather(*readers) == [TEXT] * 20
            assert (await whole).text == TEXT
            assert (await client.generate("m", PROMPT, stream=False, max_tokens=2)).text == "one two"
            return [stream.resumed for stream in streams]

    resumed = asyncio.run(asyncio.wait_for(main(), PATIENCE_S))
    assert set(resumed) == {1} if victim == "controller" else 1 in resumed


@pytest.mark.parametrize("victim", ["controller", "worker"])
def test_a_polled_program_reads_on(two: Two, victim: str) -> None:
    with Driving(two.endpoints) as driving:
        client: PolledClient = driving.raw
        texts: dict[PolledStream, list[str]] = {client.generate("m", PROMPT, max_tokens=TOKENS): [] for _ in range(10)}

        def take() -> None:
            for stream, taken in texts.items():
                taken += [piece.text for piece in stream.take()]

        def begun() -> bool:
            take()
            return all(texts.values())

        def over() -> bool:
            take()
            return all(stream.done for stream in texts)

        driving.until(begun)
        two.kill(victim)
        driving.until(over)
        assert {"".join(taken) for taken in texts.values()} == {TEXT}
        resumed = [stream.resumed for stream in texts]
        assert set(resumed) == {1} if victim == "controller" else 1 in resumed
        assert driving.ask("generate", "m", PROMPT, stream=False, max_tokens=2).text == "one two"


def test_without_any_controller_tasks_get_the_typed_error() -> None:
    async def main(controller: ServedController) -> None:
        async with AsyncClient(controller.clients, failover_s=0.5) as client:
            stream = await client.generate("m", PROMPT, max_tokens=TOKENS)
            short = await client.generate("m", PROMPT, max_tokens=TOKENS, timeout_s=0.6, resume=False)
            await anext(stream)
            await anext(short)
            controller.end(signal.SIGKILL)
            for each in (stream, short):
                with pytest.raises(errors.ControllerLost):
                    await each.text()
            with pytest.raises(errors.ControllerUnreachable):
                await client.models()
            assert await _refused(client)

    with network("w", worker_arguments=SLOW) as (controller, _):
        asyncio.run(asyncio.wait_for(main(controller), PATIENCE_S))


async def _refused(client: AsyncClient) -> Any:
    with pytest.raises(errors.ControllerUnreachable) as caught:
        async for _ in client.map("m", ["a"]):
            pass
    return caught.value
