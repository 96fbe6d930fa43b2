"""StepLoop: many sequences on one thread, one a step."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from zmqserve.backends.sampling import Sampler
from zmqserve.backends.sequences import Token, TokenSequence
from zmqserve.backends.step_loop import StepLoop
from zmqserve.errors import BackendError
from zmqserve.params import SamplingParams


class Script:
    """Steps that wait for a permit each, so that a test decides when they happen. `log` gets its name at each."""

    def __init__(
        self, steps: int, fails_at: int | None = None, *, permits: int = 1000, name: str = "", log: list[str] | None = None
    ) -> None:
        self.count = 0
        self.permits = threading.Semaphore(permits)
        self.steps = steps
        self._fails_at = fails_at
        self._name = name
        self._log = [] if log is None else log

    def step(self) -> Token | None:
        assert self.permits.acquire(timeout=10)
        self.count += 1
        self._log.append(self._name)
        if self.count == self._fails_at:
            raise ValueError("this one is broken")
        return Token(self.count)


class Loop:
    """A StepLoop whose sequences are scripted. While it is `broken`, its probe says that the model runs no more."""

    def __init__(self) -> None:
        self.scripts: dict[TokenSequence, Script] = {}
        self.broken: Exception | None = None
        self.engine = StepLoop("test steps", lambda sequence: self.scripts[sequence], self.probe)
        self.engine.start()

    def probe(self) -> None:
        if self.broken is not None:
            raise self.broken

    def open(self, script: Script, request: object = None) -> Opened:
        opened = Opened(script, self.engine, request)
        self.scripts[opened.sequence] = script
        self.engine.open(opened.sequence)
        return opened


class Opened:
    """One sequence, and what was received of it."""

    def __init__(self, script: Script, engine: StepLoop, request: object) -> None:
        self._received: asyncio.Queue[Token | Exception] = asyncio.Queue()
        self._engine = engine
        sampler = Sampler(SamplingParams(), 0, (), torch.device("cpu"))
        self.sequence = TokenSequence((), (), sampler, self._received.put_nowait, max_tokens=script.steps, request=request)

    async def next(self) -> int:
        made = await self._received.get()
        if isinstance(made, Exception):
            raise made
        return int(made.token_id)

    @property
    def silent(self) -> bool:
        """Whether nothing more was received."""
        return self._received.empty()

    async def take(self, count: int) -> list[int]:
        return [await self.next() for _ in range(count)]

    def cancel(self) -> None:
        self._engine.cancel(self.sequence)


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.engine.close()


def test_a_cancelled_sequence_gets_no_step_after_the_present_one(loop: Loop) -> None:
    async def scene() -> int:
        script = Script(100, permits=2)
        opened = loop.open(script)
        assert await opened.take(2) == [1, 2]
        opened.cancel()
        script.permits.release(50)
        assert await loop.open(Script(3)).take(3) == [1, 2, 3]
        return script.count

    assert asyncio.run(scene()) <= 3


def test_sequences_take_turns(loop: Loop) -> None:
    """None waits for another's whole answer."""
    log: list[str] = []

    async def scene() -> None:
        gate = Script(1, permits=0)
        loop.open(gate)
        long = loop.open(Script(9, name="long", log=log))
        loop.open(Script(3, name="short", log=log))
        gate.permits.release()
        await long.take(9)

    asyncio.run(scene())
    assert log == ["long", "short"] * 3 + ["long"] * 6


def test_the_choices_of_one_request_have_one_turn_together(loop: Loop) -> None:
    """Or a request for many would take all of the time of one for one."""
    log: list[str] = []

    async def scene() -> None:
        gate = Script(1, permits=0)
        loop.open(gate)
        for name in ("a", "b", "c"):
            last = loop.open(Script(2, name=name, log=log), request="three choices")
        loop.open(Script(3, name="one", log=log))
        gate.permits.release()
        await last.take(2)

    asyncio.run(scene())
    assert log == ["a", "one", "b", "one", "c", "one", "a", "b", "c"]


def test_what_has_not_begun_is_told(loop: Loop) -> None:
    async def scene() -> None:
        script = Script(2, permits=1)
        first = loop.open(script)
        await first.next()
        second = loop.open(Script(1))
        assert (first.sequence.cached_tokens, second.sequence.cached_tokens) == (0, -1)
        script.permits.release()
        await second.next()
        assert second.sequence.cached_tokens == 0

    asyncio.run(scene())


def test_sequences_that_fail_one_after_the_other_do_not_end_a_model_that_runs(loop: Loop) -> None:
    died: list[Exception] = []
    loop.engine.on_death = died.append

    async def scene() -> list[int]:
        for _ in range(10):
            with pytest.raises(ValueError, match="this one is broken"):
                await loop.open(Script(2, fails_at=1)).next()
        return await loop.open(Script(2)).take(2)

    assert asyncio.run(scene()) == [1, 2]
    assert not died


def test_a_model_that_runs_no_more_is_given_up_and_nobody_is_answered(loop: Loop) -> None:
    """Who was in the making goes on elsewhere, with the end of the worker."""
    died: Future[Exception] = Future()
    loop.engine.on_death = died.set_result
    loop.broken = RuntimeError("device-side assert")

    async def scene() -> None:
        gate = Script(1, permits=0)
        first, failing, other = loop.open(gate), loop.open(Script(3, fails_at=1)), loop.open(Script(9))
        gate.permits.release()
        assert await first.next() == 1
        failure = await asyncio.wait_for(asyncio.wrap_future(died), 10)
        assert str(failure) == "the model cannot run any more, the worker ends: RuntimeError: device-side assert"
        await asyncio.to_thread(loop.engine.join, 10)
        late = loop.open(Script(1))
        await asyncio.sleep(0)  # until what was handed over is received
        assert failing.silent
        assert other.silent
        assert late.silent

    asyncio.run(scene())


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), MemoryError("full")], ids=lambda error: type(error).__name__)
def test_a_memory_that_is_full_is_no_death(loop: Loop, error: Exception) -> None:
    died: list[Exception] = []
    loop.engine.on_death = died.append
    loop.broken = error

    async def scene() -> list[int]:
        with pytest.raises(ValueError, match="this one is broken"):
            await loop.open(Script(3, fails_at=1)).next()
        return await loop.open(Script(2)).take(2)

    assert asyncio.run(scene()) == [1, 2]
    assert not died


def test_one_that_fails_fails_alone(loop: Loop) -> None:
    async def scene() -> list[int]:
        broken, good = loop.open(Script(9, fails_at=2)), loop.open(Script(4))
        assert await broken.next() == 1
        with pytest.raises(ValueError, match="this one is broken"):
            await broken.next()
        return await good.take(4)

    assert asyncio.run(scene()) == [1, 2, 3, 4]


def test_the_age_of_the_last_step_is_told_while_there_is_work(loop: Loop) -> None:
    async def scene() -> None:
        script = Script(2, permits=1)
        opened = loop.open(script)
        await opened.next()
        assert loop.engine.age_s() > 0
        script.permits.release()
        await opened.next()

    assert loop.engine.age_s() == 0
    asyncio.run(scene())


def test_an_event_loop_that_is_gone_does_not_stop_the_others(loop: Loop) -> None:
    async def leave() -> Script:
        script = Script(100, permits=0)
        loop.open(script)
        return script

    async def stay() -> list[int]:
        return await loop.open(Script(2)).take(2)

    asyncio.run(leave()).permits.release(100)
    assert asyncio.run(stay()) == [1, 2]


def test_closing_fails_what_is_open() -> None:
    loop = Loop()

    async def scene() -> None:
        script = Script(100, permits=1)
        opened = loop.open(script)
        await opened.next()
        closing = threading.Thread(target=loop.engine.close)
        closing.start()
        script.permits.release()

        async def rest() -> None:
            while True:
                await opened.next()
                script.permits.release()

        with pytest.raises(BackendError, match="stopped before the answer was complete"):
            await rest()
        closing.join()
        with pytest.raises(BackendError, match="is stopping"):
            loop.open(Script(1))

    asyncio.run(scene())
