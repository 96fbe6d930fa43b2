"""How texts of many requests become batches: with an encoder that has no model and stops where the test wants it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from zmqserve.backends.embedding_loop import GROW_BATCHES, EmbeddingLoop
from zmqserve.errors import BackendError
from zmqserve.jobs import Vectors

PATIENCE_S = 20.0


class Row:
    """A text of so many tokens; its vector is its number."""

    def __init__(self, number: int, length: int) -> None:
        self.number = number
        self.length = length
        self.columns: dict[str, list[int]] = {}


PROBE: Any = Row(-2, 1)
"""What a model that runs makes a vector of."""


class Gate:
    """An encoder that keeps what it is asked, and computes a batch when it is let to."""

    def __init__(self, *, bad: Sequence[int] = (), most: int = 10**9, error: type[Exception] = RuntimeError) -> None:
        self.batches: list[list[int]] = []
        self.sizes: list[int] = []
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self._bad = set(bad)
        self.most = most
        self._error = error

    def vectors(self, rows: Sequence[Any]) -> Any:
        self.batches.append([row.number for row in rows])
        self.sizes.append(len(rows) * max(row.length for row in rows))
        self.entered.release()
        assert self.permits.acquire(timeout=PATIENCE_S)
        if self._bad & {row.number for row in rows} or self.sizes[-1] > self.most:
            raise self._error(f"cannot compute {self.batches[-1]}")
        return np.array([[row.number] for row in rows], dtype=np.float32)

    def open(self) -> None:
        """Compute all that comes."""
        self.permits.release(10_000)

    async def wait_entered(self) -> None:
        """Until it was asked for one more batch."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE_S)


@contextmanager
def running(gate: Gate, batch_tokens: int = 100, padding_tokens: int = 100, gather_share: float = 0.0) -> Iterator[EmbeddingLoop]:
    loop = EmbeddingLoop(
        "test embeddings", gate, [PROBE], batch_tokens=batch_tokens, padding_tokens=padding_tokens, gather_share=gather_share
    )
    loop.start()
    try:
        yield loop
    finally:
        gate.open()
        loop.close(PATIENCE_S)
        assert not loop.is_alive()


def finish(vectors: Any) -> Vectors:
    return Vectors(vectors.tobytes(), vectors.shape, 0)


def rows_of(*lengths: int, start: int = 0) -> list[Any]:
    return [Row(start + i, length) for i, length in enumerate(lengths)]


def numbers(answer: Any) -> list[int]:
    assert isinstance(answer, Vectors)
    return [int(number) for number in np.frombuffer(answer.data, dtype=np.float32)]


async def queued(loop: EmbeddingLoop, gate: Gate, *requests: Sequence[Any]) -> list[asyncio.Task[Vectors]]:
    """Requests that all wait together, behind a text of another one (number -1) that is in the encoder."""
    tasks = [asyncio.create_task(loop.embed([Row(-1, 1)], finish))]
    await gate.wait_entered()
    for rows in requests:
        tasks.append(asyncio.create_task(loop.embed(rows, finish)))
        await asyncio.sleep(0)
    return tasks


def test_texts_of_several_requests_share_a_batch_and_each_gets_its_own_rows_in_order() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(5, 9, 5), rows_of(9, 5, start=10), rows_of(7, start=20))
        gate.open()
        answers = await asyncio.gather(*tasks)
        assert [numbers(answer) for answer in answers] == [[-1], [0, 1, 2], [10, 11], [20]]
        assert [sorted(batch) for batch in gate.batches] == [[-1], [0, 1, 2, 10, 11, 20]]

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_a_batch_is_bounded_with_its_padding_and_takes_the_nearest_in_length() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(10, 40, 11, 39, 12, 38, 200))
        gate.open()
        await asyncio.gather(*tasks)

    with running(gate, batch_tokens=90) as loop:
        asyncio.run(scene(loop))
    assert [sorted(batch) for batch in gate.batches[1:]] == [[0, 2, 4], [1, 3], [5], [6]]
    assert all(size <= 90 for size in gate.sizes[:-1])


def test_what_would_be_mostly_padding_is_another_batch() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(30, 2, 28))
        gate.open()
        await asyncio.gather(*tasks)

    with running(gate, batch_tokens=1000, padding_tokens=5) as loop:
        asyncio.run(scene(loop))
    assert [sorted(batch) for batch in gate.batches[1:]] == [[0, 2], [1]]


def test_a_request_of_many_texts_does_not_hold_up_one_of_a_single_text() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        many, one = (await queued(loop, gate, rows_of(*[10] * 50), rows_of(60, start=100)))[1:]
        gate.permits.release(3)
        await asyncio.wait_for(one, PATIENCE_S)
        assert not many.done()
        gate.open()
        assert numbers(await many) == list(range(50))

    with running(gate) as loop:
        asyncio.run(scene(loop))
    assert gate.batches[2] == [100]


def test_who_asks_again_is_waited_for_a_moment_so_that_batches_stay_large() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        assert numbers(await loop.embed(rows_of(5, 5, 5), finish)) == [0, 1, 2]
        again = []
        for number in (10, 11, 12):
            again.append(asyncio.create_task(loop.embed(rows_of(5, start=number), finish)))
            await asyncio.to_thread(loop.age_s)  # so that it has come before the next one is made
        await asyncio.gather(*again)
        assert gate.batches == [[0, 1, 2], [10, 11, 12]]

    with running(gate, gather_share=1e9) as loop:
        asyncio.run(scene(loop))


def test_only_the_request_of_a_text_that_fails_fails() -> None:
    gate = Gate(bad=[11])

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(5, 5, 5), rows_of(5, 5, 5, start=10), rows_of(5, 5, start=20))
        gate.open()
        _, first, failed, last = await asyncio.gather(*tasks, return_exceptions=True)
        assert (numbers(first), numbers(last)) == ([0, 1, 2], [20, 21])
        assert isinstance(failed, RuntimeError)
        assert str(failed) == "cannot compute [11]"

    with running(gate) as loop:
        asyncio.run(scene(loop))


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


def test_a_batch_that_is_too_large_for_the_memory_is_halved_and_later_ones_stay_small() -> None:
    gate = Gate(most=25, error=OutOfMemoryError)

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(*[5] * 10))
        gate.open()
        assert numbers((await asyncio.gather(*tasks))[1]) == list(range(10))
        assert max(gate.sizes) == 50
        gate.sizes.clear()
        assert numbers(await loop.embed(rows_of(*[5] * 30), finish)) == list(range(30))
        assert gate.sizes == [25] * 6

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_batches_are_large_again_some_time_after_the_memory_was_full() -> None:
    gate = Gate(most=25, error=OutOfMemoryError)

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        await loop.embed(rows_of(*[5] * 20), finish)
        assert gate.sizes[0] == 100
        gate.most = 10**9
        gate.sizes.clear()
        for _ in range(3 * GROW_BATCHES):
            await loop.embed(rows_of(*[5] * 20), finish)
        assert gate.sizes[:4] == [25] * 4
        assert gate.sizes[-1] == 100
        assert sorted(gate.sizes) == gate.sizes, "it comes back step by step"
        assert len(gate.sizes) < 5 * GROW_BATCHES

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_where_the_memory_stays_full_few_batches_try_for_more() -> None:
    gate = Gate(most=25, error=OutOfMemoryError)

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        for _ in range(50):
            await loop.embed(rows_of(*[5] * 10), finish)
        assert 0 < sum(size > 25 for size in gate.sizes) <= 1 + len(gate.sizes) // GROW_BATCHES

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_a_text_that_does_not_fit_alone_is_the_end_of_its_request_only() -> None:
    gate = Gate(most=25, error=OutOfMemoryError)

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(30, 5, 5), rows_of(5, start=10))
        gate.open()
        _, failed, good = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(failed, OutOfMemoryError)
        assert numbers(good) == [10]

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_texts_that_fail_one_after_the_other_do_not_end_a_model_that_runs() -> None:
    gate = Gate(bad=range(8))
    died: list[Exception] = []

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        for number in range(8):
            with pytest.raises(RuntimeError, match="cannot compute"):
                await loop.embed(rows_of(5, start=number), finish)
        assert numbers(await loop.embed(rows_of(5, start=10), finish)) == [10]

    with running(gate) as loop:
        loop.on_death = died.append
        asyncio.run(scene(loop))
        assert loop.is_alive()
    assert not died


def test_a_model_that_runs_no_more_is_given_up_and_nobody_is_answered() -> None:
    """Whoever waits goes on elsewhere, with the end of the worker."""
    gate = Gate(bad=[*range(8), PROBE.number])
    died: Future[Exception] = Future()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(5, 5), rows_of(5, start=10))
        gate.open()
        assert numbers(await tasks[0]) == [-1]
        failure = await asyncio.wait_for(asyncio.wrap_future(died), PATIENCE_S)
        assert str(failure) == "the model cannot run any more, the worker ends: RuntimeError: cannot compute [-2]"
        await asyncio.to_thread(loop.join, PATIENCE_S)
        assert not any(task.done() for task in tasks[1:])
        for task in tasks[1:]:
            task.cancel()

    with running(gate) as loop:
        loop.on_death = died.set_result
        asyncio.run(scene(loop))


def test_a_memory_that_is_full_is_no_death() -> None:
    gate = Gate(bad=[1, PROBE.number], error=OutOfMemoryError)
    died: list[Exception] = []

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        with pytest.raises(OutOfMemoryError):
            await loop.embed(rows_of(5, start=1), finish)
        assert numbers(await loop.embed(rows_of(5, start=10), finish)) == [10]

    with running(gate) as loop:
        loop.on_death = died.append
        asyncio.run(scene(loop))
    assert not died


def test_requests_that_no_batch_has_had_are_told() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        assert loop.waiting() == 0
        tasks = await queued(loop, gate, rows_of(5, 5), rows_of(40, start=10))
        assert loop.waiting() == 2
        gate.permits.release()
        await gate.wait_entered()
        assert loop.waiting() == 1
        gate.open()
        await asyncio.gather(*tasks)
        assert loop.waiting() == 0

    with running(gate, padding_tokens=5) as loop:
        asyncio.run(scene(loop))


def test_texts_of_a_cancelled_request_are_not_computed() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(*[10] * 20), rows_of(10, 10, start=100))
        gate.permits.release()
        await gate.wait_entered()
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        gate.open()
        assert numbers(await tasks[2]) == [100, 101]
        assert tasks[1].cancelled()

    with running(gate, batch_tokens=40) as loop:
        asyncio.run(scene(loop))
    assert gate.batches[1:] == [[0, 1, 2, 3], [100, 101]]


def test_an_answer_that_cannot_be_made_of_the_vectors_fails_alone() -> None:
    gate = Gate()

    def refuse(_: Any) -> Vectors:
        raise BackendError("not finite")

    async def scene(loop: EmbeddingLoop) -> None:
        gate.open()
        bad = loop.embed(rows_of(5), refuse)
        answers = await asyncio.gather(bad, loop.embed(rows_of(5, start=1), finish), return_exceptions=True)
        assert isinstance(answers[0], BackendError)
        assert numbers(answers[1]) == [1]

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_who_waits_when_it_closes_gets_an_error() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        tasks = await queued(loop, gate, rows_of(5))
        loop.close(timeout_s=0)
        gate.open()
        first, waiting = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(first, Vectors)
        assert isinstance(waiting, BackendError)
        with pytest.raises(BackendError, match="is stopping"):
            await loop.embed(rows_of(5), finish)

    with running(gate) as loop:
        asyncio.run(scene(loop))


def test_its_age_is_0_without_work_and_grows_with_a_batch_that_does_not_end() -> None:
    gate = Gate()

    async def scene(loop: EmbeddingLoop) -> None:
        assert loop.age_s() == 0
        (task,) = await queued(loop, gate)
        before = loop.age_s()
        while loop.age_s() <= before:
            pass
        gate.open()
        await task

    with running(gate) as loop:
        asyncio.run(scene(loop))
