"""StepLoop: many requests on one thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from zmqserve.backends.step_loop import StepLoop
from zmqserve.errors import BackendError
from zmqserve.jobs import Delta


class Script:
    """Steps that wait for a permit each, so that a test decides when they happen. `log` gets its name at each."""

    def __init__(
        self, steps: int, fails_at: int | None = None, *, permits: int = 1000, name: str = "", log: list[str] | None = None
    ) -> None:
        self.count = 0
        self.permits = threading.Semaphore(permits)
        self._steps = steps
        self._fails_at = fails_at
        self._name = name
        self._log = [] if log is None else log

    def step(self) -> Delta | None:
        assert self.permits.acquire(timeout=10)
        self.count += 1
        self._log.append(self._name)
        if self.count == self._fails_at:
            raise ValueError("this one is broken")
        return Delta(str(self.count), finish_reason="stop" if self.count == self._steps else None)


@pytest.fixture
def loop_of_steps() -> Iterator[StepLoop]:
    loop = StepLoop("test steps")
    loop.start()
    yield loop
    loop.close()


def test_a_cancelled_stream_gets_no_step_after_the_present_one(loop_of_steps: StepLoop) -> None:
    async def scene() -> int:
        script = Script(100, permits=2)
        stream = loop_of_steps.open(script)
        assert [(await stream.next()).text for _ in range(2)] == ["1", "2"]
        stream.cancel()
        script.permits.release(50)
        other = loop_of_steps.open(Script(3))
        assert [(await other.next()).text for _ in range(3)] == ["1", "2", "3"]
        return script.count

    assert asyncio.run(scene()) <= 3


def test_streams_take_turns(loop_of_steps: StepLoop) -> None:
    """No request waits for another's whole answer."""
    log: list[str] = []

    async def scene() -> None:
        gate = Script(1, permits=0)
        loop_of_steps.open(gate)
        long = loop_of_steps.open(Script(9, name="long", log=log))
        loop_of_steps.open(Script(3, name="short", log=log))
        gate.permits.release()
        while (await long.next()).finish_reason is None:
            pass

    asyncio.run(scene())
    assert log == ["long", "short"] * 3 + ["long"] * 6


def test_a_stream_that_fails_fails_alone(loop_of_steps: StepLoop) -> None:
    async def scene() -> str:
        broken, good = loop_of_steps.open(Script(9, fails_at=2)), loop_of_steps.open(Script(4))
        assert (await broken.next()).text == "1"
        with pytest.raises(ValueError, match="this one is broken"):
            await broken.next()
        return "".join([(await good.next()).text for _ in range(4)])

    assert asyncio.run(scene()) == "1234"


def test_the_age_of_the_last_step_is_told_while_there_is_work(loop_of_steps: StepLoop) -> None:
    async def scene() -> None:
        script = Script(2, permits=1)
        stream = loop_of_steps.open(script)
        await stream.next()
        assert loop_of_steps.age_s() > 0
        script.permits.release()
        await stream.next()

    assert loop_of_steps.age_s() == 0
    asyncio.run(scene())


def test_an_event_loop_that_is_gone_does_not_stop_the_others(loop_of_steps: StepLoop) -> None:
    async def leave() -> Script:
        script = Script(100, permits=0)
        loop_of_steps.open(script)
        return script

    async def stay() -> str:
        stream = loop_of_steps.open(Script(2))
        return "".join([(await stream.next()).text for _ in range(2)])

    asyncio.run(leave()).permits.release(100)
    assert asyncio.run(stay()) == "12"


def test_closing_fails_what_is_open() -> None:
    loop = StepLoop("test steps")
    loop.start()

    async def scene() -> None:
        script = Script(100, permits=1)
        stream = loop.open(script)
        await stream.next()
        closing = threading.Thread(target=loop.close)
        closing.start()
        script.permits.release()

        async def rest() -> None:
            while True:
                await stream.next()
                script.permits.release()

        with pytest.raises(BackendError, match="stopped before the answer was complete"):
            await rest()
        closing.join()
        with pytest.raises(BackendError, match="is stopping"):
            loop.open(Script(1))

    asyncio.run(scene())
