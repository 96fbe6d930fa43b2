"""A `map` over 5,000 prompts whose workers are killed on the way: all results, in order, once."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.processes import CAME, Served, ServedController
from zmqserve import AsyncClient, Client, MapResult

pytestmark = pytest.mark.heavy

PROMPTS = [f"prompt {number} of many" for number in range(5000)]
TOKENS = 6
KILL_EVERY = 450
"""One worker is killed after so many answers, and another takes its place; as soon as the one before has."""
WORKERS = ("--slots", "32", "--delay-per-token", "0.01")


class Killer:
    """Kills the oldest of three workers each time that enough answers have come, and all that replaced others are there."""

    def __init__(self, stack: ExitStack, controller: ServedController) -> None:
        self.killed = 0
        self.seen: list[int] = []
        self._stack = stack
        self._controller = controller
        self._due = KILL_EVERY
        self._lines_read = 0
        self._coming: set[str] = set()
        self._workers: list[Served] = []
        for _ in range(3):
            self._start()

    def progress(self, ended: int, total: int | None) -> None:
        assert total == len(PROMPTS)
        self.seen.append(ended)
        if ended >= self._due and self._all_are_there():
            self._due = ended + KILL_EVERY
            self._workers.pop(0).end(signal.SIGKILL)
            self.killed += 1
            self._start()

    def _start(self) -> None:
        name = f"w{self.killed + len(self._workers)}"
        self._coming.add(name)
        self._workers.append(self._stack.enter_context(self._controller.echo(name, *WORKERS)))

    def _all_are_there(self) -> bool:
        """As the controller's log says. To wait for it would let those that are to be killed finish what they have."""
        lines = self._controller.output
        for line in lines[self._lines_read :]:
            told = json.loads(line)
            if told["event"] in CAME and told.get("state") == "ready":
                self._coming.discard(told["worker"])
            self._lines_read += 1
        return not self._coming


def blocking(endpoint: str, progress: Callable[[int, int | None], None]) -> list[MapResult]:
    with Client(endpoint) as client:
        return list(client.map("m", PROMPTS, concurrency=64, progress=progress, max_tokens=TOKENS))


def awaiting(endpoint: str, progress: Callable[[int, int | None], None]) -> list[MapResult]:
    async def run() -> list[MapResult]:
        async with AsyncClient(endpoint) as client:
            return [result async for result in client.map("m", PROMPTS, concurrency=64, progress=progress, max_tokens=TOKENS)]

    return asyncio.run(run())


@pytest.mark.parametrize("run", [blocking, awaiting])
def test_all_results_come_in_order_and_once(run: Callable[..., list[MapResult]]) -> None:
    with ExitStack() as stack:
        controller = stack.enter_context(ServedController())
        killer = Killer(stack, controller)
        controller.wait_ready("w2")
        results = run(controller.clients, killer.progress)
    assert 3 <= killer.killed <= len(PROMPTS) // KILL_EVERY
    assert killer.seen == [*range(1, len(PROMPTS) + 1)]
    assert [result.index for result in results] == [*range(len(PROMPTS))]
    assert [result.prompt for result in results] == PROMPTS
    wanted = [(prompt.split() * 2)[:TOKENS] for prompt in PROMPTS]
    assert [result.text.split() for result in results] == wanted
    assert sum(result.completion.resumed for result in results) > 0
