"""Many threads, or tasks, do everything at once with one client, at random: what is answered is exact, and the rest ends as it was told."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from tests.processes import ServedController, network
from zmqserve import AsyncClient, Client, errors

pytestmark = pytest.mark.heavy

THREADS = 32
ROUNDS = 30
WORDS = [f"w{number}" for number in range(60)]
PROMPT = " ".join(WORDS)


@pytest.fixture(scope="module")
def controller() -> Iterator[ServedController]:
    with network("a", "b", worker_arguments=("--slots", "64", "--delay-per-token", "0.001")) as (controller, _):
        yield controller


def wanted(count: int) -> str:
    return " ".join(WORDS[:count])


class Draws:
    """What one thread does next, and how much of it; and the sum of what was done."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.done: Counter[str] = Counter()

    def next(self) -> tuple[str, int]:
        what = self.random.choices(["stream", "whole", "cut", "forget", "map", "half a map", "tokens", "fails"], [6, 4, 4, 2, 1, 1, 3, 1])[
            0
        ]
        self.done[what] += 1
        return what, self.random.randint(1, 60)


def act(client: Client, draws: Draws) -> None:
    """One thing, and what must come of it."""
    what, count = draws.next()
    if what == "stream":
        assert "".join(piece.text for piece in client.generate("m", PROMPT, max_tokens=count)) == wanted(count)
    elif what == "whole":
        assert client.generate("m", PROMPT, max_tokens=count, stream=False).text == wanted(count)
    elif what in {"cut", "forget"}:
        stream = client.generate("m", PROMPT, max_tokens=60)
        begun = "".join(piece.text for piece, _ in zip(stream, range(count // 3), strict=False))
        assert wanted(60).startswith(begun)
        if what == "cut":
            stream.close()
            assert list(stream) == []
    elif what in {"map", "half a map"}:
        prompts = [f"{number} {PROMPT}" for number in range(20)]
        results = client.map("m", prompts, concurrency=1 + count % 7, max_tokens=3, ordered=count % 2 == 0)
        texts = [result.text for result, _ in zip(results, range(20 if what == "map" else 5), strict=False)]
        assert set(texts) <= {f"{number} w0 w1" for number in range(20)}
        assert len(set(texts)) == len(texts) == (20 if what == "map" else 5)
    elif what == "tokens":
        assert client.count_tokens("m", wanted(count)) == count
    else:
        with pytest.raises(errors.UnknownModel):
            client.generate("nobody", "x", stream=False)


@pytest.mark.parametrize("end", ["drain", "short drain", "close"])
def test_threads(controller: ServedController, end: str) -> None:
    """In the middle of it all one of the threads ends the client."""
    client = Client(controller.clients)
    acted = threading.Semaphore(0)

    def work(number: int) -> Counter[str]:
        draws = Draws(number)

        def on_and_on() -> None:
            while True:
                act(client, draws)
                acted.release()

        with pytest.raises(errors.ConnectionFailed, match="closed"):
            on_and_on()
        return draws.done

    with ThreadPoolExecutor(THREADS) as pool:
        working = [pool.submit(work, number) for number in range(THREADS)]
        for _ in range(THREADS * ROUNDS):
            acted.acquire()
        if end == "close":
            client.close()
        else:
            whole = client.drain(None if end == "drain" else 0.002)
            assert whole or end == "short drain"
        done = sum((each.result(30) for each in working), Counter[str]())
    assert len(done) == 8
    assert client._connection._pump.session.calls == {}
    assert client._connection._pump.session.malformed == 0


def test_tasks(controller: ServedController) -> None:
    async def act_async(client: AsyncClient, draws: Draws) -> None:
        what, count = draws.next()
        if what in {"stream", "cut", "forget"}:
            texts: list[str] = []
            async for piece in client.generate("m", PROMPT, max_tokens=60):
                texts.append(piece.text)
                if what != "stream" and len(texts) >= count // 3:
                    break
            assert "".join(texts) == wanted(60) if what == "stream" else wanted(60).startswith("".join(texts))
        elif what == "whole":
            asked = asyncio.ensure_future(client.generate("m", PROMPT, max_tokens=count, stream=False))
            if count % 3:
                assert (await asked).text == wanted(count)
            else:
                await asyncio.sleep(0)
                asked.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asked
        elif what in {"map", "half a map"}:
            results = client.map("m", [f"{number} {PROMPT}" for number in range(20)], concurrency=1 + count % 7, max_tokens=3)
            async for result in results:
                assert result.text == f"{result.index} w0 w1"
                if what == "half a map" and result.index == 5:
                    break
            await results.aclose()
        elif what == "tokens":
            assert await client.count_tokens("m", wanted(count)) == count
        else:
            with pytest.raises(errors.UnknownModel):
                await client.generate("nobody", "x", stream=False)

    async def work(client: AsyncClient, number: int) -> None:
        draws = Draws(number)
        for _ in range(ROUNDS // 4):
            await act_async(client, draws)

    async def main() -> None:
        async with AsyncClient(controller.clients) as client:
            await asyncio.gather(*(work(client, number) for number in range(200)))
            assert await client.drain(5)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert client._connection._driven.pump.session.calls == {}

    asyncio.run(main())
