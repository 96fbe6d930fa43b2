"""Requests on their way to an engine: in order, many by one hand-over, each failing alone. In one thread but for the tokenizer's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from zmqserve.backends import vllm_admission
from zmqserve.backends.vllm_admission import Admission
from zmqserve.messages import Generate, pack_ids


class Asking:
    """As much of a Job as an admission sees."""

    def __init__(self, number: int, *, ids: bool = False, stopped: bool = False) -> None:
        given: dict[str, Any] = {"token_ids": pack_ids([1])} if ids else {"prompt": "x"}
        self.request = Generate(number, "m", **given)
        self.stopped = stopped


class Scene:
    """What was prepared, and where; what was handed on. The tokenizer's thread does nothing until `free` is set."""

    def __init__(self, tokenizing: ThreadPoolExecutor) -> None:
        self.prepared: list[tuple[int, threading.Thread]] = []
        self.handed: list[tuple[int, str | type[Exception]]] = []
        self.free = threading.Event()
        self.free.set()
        self.hand_overs = 0
        self._changed = asyncio.Event()
        self.admission: Admission[str] = Admission(self, self.prepare, self.hand_on)
        self._tokenizing = tokenizing

    def submit(self, *work: Any) -> Any:
        self.hand_overs += 1
        self._changed.set()
        return self._tokenizing.submit(*work)

    def prepare(self, job: Any) -> str:
        number = job.request.rid
        if job.request.prompt is not None:
            self.free.wait()
        self.prepared.append((number, threading.current_thread()))
        if number == 13:
            raise ValueError("no such prompt")
        return f"prepared {number}"

    async def hand_on(self, job: Any, prepared: str | Exception) -> None:
        self._changed.set()
        self.handed.append((job.request.rid, type(prepared) if isinstance(prepared, Exception) else prepared))

    async def until(self, true: Callable[[], bool]) -> None:
        while not true():
            self._changed.clear()
            await self._changed.wait()

    async def ended(self, number: int) -> None:
        await self.until(lambda: len(self.handed) >= number)


def run(play: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        with ThreadPoolExecutor(1) as tokenizing:
            await play(Scene(tokenizing))

    asyncio.run(main())


def test_those_that_come_while_one_is_tokenized_are_handed_over_together() -> None:
    async def play(scene: Scene) -> None:
        scene.free.clear()
        scene.admission.add(Asking(1))
        await scene.until(lambda: scene.hand_overs == 1)
        for number in range(2, 10):
            scene.admission.add(Asking(number))
        scene.free.set()
        await scene.ended(9)
        assert scene.handed == [(number, f"prepared {number}") for number in range(1, 10)]
        assert scene.hand_overs < 9
        assert threading.current_thread() not in {thread for _, thread in scene.prepared}

    run(play)


def test_requests_that_bring_ids_wait_for_no_thread() -> None:
    async def play(scene: Scene) -> None:
        for number in range(1, 4):
            scene.admission.add(Asking(number, ids=True))
        await scene.ended(3)
        assert scene.handed == [(number, f"prepared {number}") for number in range(1, 4)]
        assert {thread for _, thread in scene.prepared} == {threading.current_thread()}
        assert not scene.hand_overs

    run(play)


def test_one_that_cannot_be_prepared_fails_alone() -> None:
    async def play(scene: Scene) -> None:
        for number in (12, 13, 14):
            scene.admission.add(Asking(number))
        await scene.ended(3)
        assert scene.handed == [(12, "prepared 12"), (13, ValueError), (14, "prepared 14")]

    run(play)


def test_one_that_was_cancelled_meanwhile_costs_nothing_more() -> None:
    async def play(scene: Scene) -> None:
        for job in (Asking(1), Asking(2, stopped=True), Asking(3)):
            scene.admission.add(job)
        await scene.ended(2)
        assert [number for number, _ in scene.prepared] == [1, 3]
        scene.admission.add(Asking(4, stopped=True))
        scene.admission.add(Asking(5))
        await scene.ended(3)
        assert [number for number, _ in scene.handed] == [1, 3, 5]

    run(play)


def test_a_slow_prompt_keeps_none_of_those_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_admission, "PREPARE_S", 0.0)

    async def play(scene: Scene) -> None:
        reached = threading.Event()

        def prepare(job: Any) -> str:
            if job.request.rid == 2:
                reached.set()
                scene.free.wait()
            return f"prepared {job.request.rid}"

        admission: Admission[str] = Admission(scene, prepare, scene.hand_on)
        scene.free.clear()
        for number in (1, 2):
            admission.add(Asking(number))
        await scene.ended(1)
        assert scene.handed == [(1, "prepared 1")]
        await asyncio.to_thread(reached.wait)
        scene.free.set()
        await scene.ended(2)

    run(play)
