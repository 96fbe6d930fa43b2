"""`map` of Client and AsyncClient: many prompts, some of them at once, against a scripted controller and real networks."""

from __future__ import annotations

import asyncio
import gc
import signal
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest

from tests.fakes.broker import PATIENCE_S, Broker, chunk, done
from tests.processes import ServedController, eventually, network
from zmqserve import AsyncClient, Client, MapResult, errors
from zmqserve import messages as m

Start = Callable[..., tuple[Broker, "Bulk"]]


class Bulk:
    """`map` of either client, to be iterated and closed."""

    def __init__(self, kind: str, endpoint: str, **options: Any) -> None:
        self.runner = asyncio.Runner() if kind == "AsyncClient" else None
        self.client: Any = Client(endpoint, **options) if self.runner is None else AsyncClient(endpoint, **options)

    def map(self, *args: Any, **options: Any) -> Iterator[MapResult]:
        results = self.client.map(*args, **options)
        if self.runner is None:
            yield from results
            return
        try:
            while (result := self.runner.run(self._next(results))) is not None:
                yield result
        finally:
            self.runner.run(results.aclose())

    @staticmethod
    async def _next(results: Any) -> MapResult | None:
        async with asyncio.timeout(PATIENCE_S):
            result: MapResult | None = await anext(results, None)
            return result

    def close(self) -> None:
        if self.runner is None:
            self.client.close()
        else:
            self.runner.run(self.client.close())
            self.runner.close()


@pytest.fixture(params=["Client", "AsyncClient"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(kind: str) -> Iterator[Start]:
    with ExitStack() as stack:

        def make(script: Any = None, **options: Any) -> tuple[Broker, Bulk]:
            made = stack.enter_context(Broker(script))
            return made, stack.enter_context(closing(Bulk(kind, made.endpoint, **options)))

        yield make


def word(asked: Any) -> list[Any]:
    """A script: the prompt itself."""
    return [done(asked.rid, 0, last=chunk(asked.rid, 0, asked.prompt))] if isinstance(asked, m.Generate) else []


def test_results_come_in_order_with_their_prompts(start: Start) -> None:
    _, bulk = start(word)
    prompts = [f"p{number}" for number in range(300)]
    told: list[tuple[int, int | None]] = []
    results = list(bulk.map("m", prompts, concurrency=7, progress=lambda *how: told.append(how), max_tokens=1))
    assert [(result.index, result.prompt, result.text) for result in results] == [(n, p, p) for n, p in enumerate(prompts)]
    assert told == [(count, 300) for count in range(1, 301)]
    assert list(bulk.map("m", iter(prompts[:2]), progress=lambda *how: told.append(how)))
    assert told[300:] == [(1, None), (2, None)]
    assert list(bulk.map("m", [])) == []


def test_no_more_are_asked_at_once_than_said_and_none_while_nobody_takes(start: Start) -> None:
    broker, bulk = start()
    taken: list[int] = []

    def prompts() -> Iterator[str]:
        for number in range(100):
            taken.append(number)
            yield str(number)

    results = bulk.map("m", prompts(), concurrency=3, ordered=False)
    with ThreadPoolExecutor(1) as pool:
        asked: list[Any] = []
        for turn in range(5):
            result = pool.submit(next, results)
            while len(asked) < 3 + turn:
                asked.append(broker.expect(m.Generate))
            broker.send(done(asked[-1].rid, 0, last=chunk(asked[-1].rid, 0, "x")))
            assert result.result(PATIENCE_S).prompt == asked[-1].prompt
    asked.append(broker.expect(m.Generate))
    assert ([each.prompt for each in asked], taken) == ([str(number) for number in range(8)], list(range(8)))
    results.close()  # type: ignore[attr-defined]
    assert {broker.expect(m.Cancel).rid for _ in range(3)} <= {each.rid for each in asked}
    assert broker.nothing_arrived()


def test_as_completed_does_not_wait_for_a_slow_one_and_order_does(start: Start) -> None:
    def script(asked: Any) -> list[Any]:
        return [] if asked.prompt == "slow" else word(asked)

    broker, bulk = start(script)
    prompts = ["slow", *"abcdefgh"]
    results = bulk.map("m", prompts, concurrency=2, ordered=False)
    assert {next(results).text for _ in range(8)} == set("abcdefgh")
    slow = next(asked for asked in [broker.expect(m.Generate) for _ in range(9)] if asked.prompt == "slow")
    broker.send(done(slow.rid, 0, last=chunk(slow.rid, 0, "at last")))
    assert [result.text for result in results] == ["at last"]

    ordered = bulk.map("m", ["slow", *["a"] * 200], concurrency=2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, ordered)
        slow = broker.expect(m.Generate)
        for _ in range(31):
            broker.expect(m.Generate)
        assert not first.done()
        broker.send(done(slow.rid, 0, last=chunk(slow.rid, 0, "at last")))
        assert first.result(PATIENCE_S).text == "at last"
    assert [result.index for result in ordered] == list(range(1, 201))


def test_one_that_fails_is_a_result_and_others_go_on(start: Start) -> None:
    def script(asked: Any) -> list[Any]:
        return [m.Error(asked.rid, 40303, "too long")] if asked.prompt == "long" else word(asked)

    broker, bulk = start(script)
    prompts: list[Any] = ["a", "long", "", 5, "b\ud800", [1, -1], "c", "x" * 5000]
    broker.limits = m.Limits(message_bytes=3000)
    results = list(bulk.map("m", prompts, concurrency=2))
    assert [result.prompt for result in results] == prompts
    assert [type(result.error) for result in results] == [
        type(None),
        errors.ContextOverflow,
        *[errors.InvalidParameter] * 4,
        type(None),
        errors.InvalidParameter,
    ]
    assert [result.text for result in results if result.error is None] == ["a", "c"]
    with pytest.raises(errors.ContextOverflow):
        _ = results[1].text


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"concurrency": "8"}, "concurrency"),
        ({"ordered": "yes"}, "ordered"),
        ({"progress": 5}, "progress"),
        ({"params": {"max_tokens": 5}}, "params"),
        ({"max_token": 1}, "max_token"),
        ({"temperature": -1}, "temperature"),
        ({"timeout_s": 0}, "timeout_s"),
    ],
)
def test_wrong_options_are_said_before_anything_is_taken(start: Start, options: Any, parameter: str) -> None:
    broker, bulk = start(word)
    taken: list[str] = []

    def prompts() -> Iterator[str]:
        taken.append("a")
        yield "a"

    with pytest.raises(errors.InvalidParameter) as caught:
        bulk.client.map("m", prompts(), **options)
    assert caught.value.parameter == parameter
    assert (taken, broker.nothing_arrived()) == ([], True)


@pytest.mark.parametrize("prompts", ["a text", b"bytes", bytearray(b"b"), memoryview(b"b"), {"role": "user", "content": "x"}, 5, None])
def test_what_is_not_many_prompts_is_refused(start: Start, prompts: Any) -> None:
    """A text is many characters, too: thousands of requests would leave."""
    broker, bulk = start(word)
    with pytest.raises(errors.InvalidParameter) as caught:
        bulk.client.map("m", prompts)
    assert (caught.value.parameter, broker.nothing_arrived()) == ("prompts", True)


def test_prompts_that_are_awaited_are_not_for_who_blocks() -> None:
    async def prompts() -> AsyncIterator[str]:
        yield "a"

    with Client("tcp://127.0.0.1:1") as client, pytest.raises(errors.InvalidParameter, match=r"AsyncClient\.map") as caught:
        client.map("m", prompts())  # type: ignore[arg-type]
    assert caught.value.parameter == "prompts"


def test_texts_of_numpy_are_prompts(start: Start) -> None:
    np = pytest.importorskip("numpy")
    _, bulk = start(word)
    assert [result.text for result in bulk.map("m", np.array(["a", "b"]))] == ["a", "b"]


@pytest.mark.parametrize("ordered", [True, False])
def test_what_progress_raises_is_the_callers_even_if_it_looks_like_an_answers_error(start: Start, ordered: bool) -> None:
    _, bulk = start(word)
    told: list[int] = []

    def progress(ended: int, total: int | None) -> None:
        told.append(ended)
        if len(told) == 1:
            raise errors.Overloaded("the caller's own")

    results: list[MapResult] = []
    with pytest.raises(errors.Overloaded, match="the caller's own"):
        results.extend(bulk.map("m", ["a", "b"], ordered=ordered, progress=progress))
    assert (results, told) == ([], [1])


def test_an_error_keeps_nothing_but_itself(start: Start) -> None:
    """Least of all until the garbage collector comes: it may be of millions of prompts."""

    class Prompt(list[int]):
        """One that tells whether it is still there."""

    _, bulk = start(lambda asked: [m.Error(asked.rid, errors.BackendError.code, "bad")])
    kept: list[weakref.ref[Prompt]] = []

    def prompts() -> Iterator[Prompt]:
        for _ in range(3):
            prompt = Prompt([1, 2])
            kept.append(weakref.ref(prompt))
            yield prompt
            del prompt

    gc.collect()
    gc.disable()
    try:
        found = [result.error for result in bulk.map("m", prompts())]
        assert [type(error) for error in found] == [errors.BackendError] * 3
        assert [ref() for ref in kept] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize("where", ["source", "progress", "consumer"])
def test_an_error_of_the_callers_own_ends_it_and_cancels_the_rest(start: Start, where: str) -> None:
    first: list[m.Generate] = []

    def script(asked: Any) -> list[Any]:
        if not isinstance(asked, m.Generate) or asked.model == "again":
            return word(asked)
        first.append(asked)
        return word(first[0]) if asked.prompt == "3" else []  # when all are asked that may be at once

    broker, bulk = start(script)

    def prompts() -> Iterable[str]:
        yield from "0123"
        if where == "source":
            raise ZeroDivisionError
        yield from "4567"

    def progress(ended: int, total: int | None) -> None:
        if where == "progress":
            raise ZeroDivisionError

    def consume() -> None:
        for _ in bulk.map("m", prompts(), concurrency=4, progress=progress):
            if where == "consumer":
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    gc.collect()
    arrived = [broker.expect(object) for _ in range(9 if where == "consumer" else 7)]
    asked = {each.rid for each in arrived if isinstance(each, m.Generate) and each.prompt != "0"}
    assert {each.rid for each in arrived if isinstance(each, m.Cancel)} == asked
    assert broker.nothing_arrived()
    assert [result.text for result in bulk.map("again", ["x", "y"])] == ["x", "y"]


def test_without_a_controller_it_raises(kind: str) -> None:
    with closing(Bulk(kind, "tcp://127.0.0.1:1", connect_timeout_s=0.05)) as bulk, pytest.raises(errors.ControllerUnreachable):
        list(bulk.map("m", ["a", "b"]))


def test_it_goes_on_when_its_controller_is_back(start: Start) -> None:
    """One that has just started does not know its workers yet."""
    first, bulk = start(word, connect_timeout_s=0.05, failover_s=60.0)
    results = bulk.map("m", (str(number) for number in range(60)), concurrency=4)
    texts = [next(results).text for _ in range(10)]
    first.close()
    turned_down: list[int] = []

    def young(asked: Any) -> list[Any]:
        if len(turned_down) < 4 and asked.rid not in turned_down:
            turned_down.append(asked.rid)
            return [m.Error(asked.rid, errors.UnknownModel.code, "nobody serves m")]
        return word(asked)

    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: [result.text for result in results])
        eventually(lambda: peer(bulk).tried >= 4, PATIENCE_S, "nobody answers")
        with Broker(young, endpoint=first.endpoint):
            texts += rest.result(2 * PATIENCE_S)
    assert texts == [str(number) for number in range(60)]
    assert len(turned_down) == 4


@pytest.mark.parametrize("ordered", [True, False])
def test_what_has_ended_is_handed_on_when_its_controller_does_not_come_back(start: Start, ordered: bool) -> None:
    def script(asked: Any) -> list[Any]:
        return [] if asked.prompt == "0" else word(asked)

    broker, bulk = start(script, connect_timeout_s=0.05, failover_s=0.4)
    ended: list[int] = []
    asked: list[int] = []

    def progress(count: int, _total: int | None) -> None:
        ended.append(count)
        if count == 20:
            broker.close()

    def prompts() -> Iterator[str]:
        for number in range(100_000):
            asked.append(number)
            yield str(number)

    results: list[MapResult] = []
    with pytest.raises(errors.ControllerUnreachable):
        results.extend(bulk.map("m", prompts(), concurrency=4, ordered=ordered, progress=progress))
    assert len(results) == len(ended) > 20
    indexes = [result.index for result in results]
    assert (indexes if ordered else sorted(indexes)) == list(range(len(results)))
    assert len(asked) <= len(results) + 4
    lost = [result for result in results if result.error is not None]
    assert 0 in [result.index for result in lost]
    assert {type(result.error) for result in lost} == {errors.ControllerLost}
    assert all(result.text == result.prompt for result in results if result.error is None)


def peer(bulk: Bulk) -> Any:
    connection = bulk.client._connection
    pump = connection._pump if isinstance(bulk.client, Client) else connection._driven.pump
    return pump.session._peer


def test_many_maps_in_many_threads_share_one_client() -> None:
    with Broker(word) as broker, Client(broker.endpoint) as client, ThreadPoolExecutor(8) as pool:

        def one(number: int) -> bool:
            prompts = [f"{number}-{place}" for place in range(60)]
            results = client.map("m", prompts, concurrency=1 + number % 5, ordered=number % 2 == 0)
            return sorted(result.text for result in results) == sorted(prompts)

        assert all(pool.map(one, range(24), timeout=30))


def test_many_maps_on_one_loop_and_prompts_that_come_by_themselves() -> None:
    async def source(number: int) -> AsyncIterator[str]:
        for place in range(40):
            await asyncio.sleep(0)
            yield f"{number}-{place}"

    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:

            async def one(number: int) -> None:
                texts = [result.text async for result in client.map("m", source(number), concurrency=1 + number % 5)]
                assert texts == [f"{number}-{place}" for place in range(40)]

            await asyncio.gather(*map(one, range(20)))
            assert asyncio.all_tasks() == {asyncio.current_task()}

    with Broker(word) as broker:
        asyncio.run(main(broker.endpoint), debug=True)


@pytest.mark.parametrize("way", ["close", "cancel", "source fails"])
def test_a_source_that_is_awaited_is_let_go(way: str) -> None:
    async def never() -> AsyncIterator[str]:
        yield "a"
        try:
            await more.wait()
            raise ZeroDivisionError
        finally:
            let_go.append(way)

    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            results = client.map("m", never())
            assert (await anext(results)).text == "a"
            if way == "close":
                await results.aclose()
            else:
                waiting = asyncio.ensure_future(anext(results))
                await asyncio.sleep(0)
                if way == "source fails":
                    more.set()
                else:
                    waiting.cancel()
                with pytest.raises(ZeroDivisionError if way == "source fails" else asyncio.CancelledError):
                    await waiting
            assert let_go == [way]
            assert asyncio.all_tasks() == {asyncio.current_task()}

    let_go: list[str] = []
    more = asyncio.Event()
    with Broker(word) as broker:
        asyncio.run(main(broker.endpoint), debug=True)


def test_all_results_come_once_and_in_order_while_workers_are_killed(kind: str) -> None:
    """What one of two workers held goes on at the other, again and again."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    with network("a", "b", worker_arguments=("--delay-per-token", "0.002", "--slots", "8")) as (controller, workers):
        prompts = [f"{number} {' '.join(words)}" for number in range(400)]
        with closing(Bulk(kind, controller.clients)) as bulk:
            texts: list[str] = []
            victims = _victims(controller, workers)
            for result in bulk.map("m", prompts, concurrency=16, max_tokens=9):
                texts.append(result.text)
                if len(texts) in {60, 160, 260}:
                    next(victims)
    assert texts == prompts


def _victims(controller: ServedController, workers: dict[str, Any]) -> Iterator[None]:
    """Kills the workers in turns, each when the one before is back."""
    for victim in ("a", "b", "a"):
        workers[victim].end(signal.SIGKILL)
        workers[victim] = controller.echo(victim, "--delay-per-token", "0.002", "--slots", "8")
        controller.wait_ready(victim)
        yield
