"""AsyncClient on its event loop: tasks, cancelling, loops that end, what is left behind. What clients share: test_three_clients.py."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.fakes.broker import PATIENCE_S, Broker, chunk, done, echo
from tests.processes import eventually
from zmqserve import AsyncClient, AsyncStream, Client, errors
from zmqserve import messages as m


async def expect(broker: Broker, kind: Any) -> Any:
    return await asyncio.to_thread(broker.expect, kind)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it on a loop, which must have no other task at its end."""

    async def alone() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await test()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(alone(), debug=True)


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# --- streams -----------------------------------------------------------------------------------


def test_a_stream_may_be_iterated_entered_or_awaited_at_once() -> None:
    async def test() -> None:
        with Broker(echo) as broker:
            async with AsyncClient(broker.endpoint) as client:
                assert [piece.seq async for piece in client.generate("m", "x")] == [0, 1, 2]
                async with client.generate("m", "x") as entered:
                    assert await entered.text() == "t0 t1 t2 "
                awaited = await client.chat("m", [{"role": "user", "content": "x"}])
                assert isinstance(awaited, AsyncStream)
                assert await awaited is awaited
                assert await awaited.text() == "t0 t1 t2 "
                assert await client.generate("m", "x").text() == "t0 t1 t2 "

    run(test)


def test_nothing_is_sent_before_it_is_awaited() -> None:
    async def test() -> None:
        with Broker(echo) as broker:
            async with AsyncClient(broker.endpoint) as client:
                stream = client.generate("m", "x")
                with pytest.raises(RuntimeError, match="has not been sent"):
                    _ = stream.completion
                await client.generate("m", "y", stream=False)
                assert broker.expect(m.Generate).prompt == "y"
                stream.close()
                assert [piece async for piece in stream] == []
                assert broker.nothing_arrived()

    run(test)


def test_many_streams_share_one_socket_and_each_is_exact() -> None:
    async def test() -> None:
        with Broker(echo) as broker:
            async with AsyncClient(broker.endpoint) as client:

                async def one(count: int) -> list[int]:
                    return [piece.seq async for piece in client.generate("m", "x", max_tokens=count)]

                counts = [1 + number % 50 for number in range(1000)]
                assert await asyncio.gather(*map(one, counts)) == [list(range(count)) for count in counts]

    run(test)


def test_a_stream_is_for_one_task_at_a_time() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                stream = await client.generate("m", "x")
                first = asyncio.ensure_future(stream.text())
                await turns()
                with pytest.raises(RuntimeError, match="one task at a time"):
                    await stream.text()
                rid = broker.expect(m.Generate).rid
                broker.send(done(rid, 0, last=chunk(rid, 0, "fine")))
                assert await first == "fine"

    run(test)


def test_an_awaited_stream_has_left_though_the_loop_is_held_from_then_on() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                for prompt in ("x", "y", "z"):
                    await client.generate("m", prompt)
                    assert broker.expect(m.Generate).prompt == prompt  # blocks the loop

    run(test)


def test_requests_that_are_begun_in_one_turn_all_leave() -> None:
    async def test() -> None:
        with Broker(echo) as broker:
            async with AsyncClient(broker.endpoint) as client:
                for _ in range(3):
                    streams = [client.generate("m", "x").text() for _ in range(20)]
                    wholes = [client.generate("m", "x", stream=False) for _ in range(20)]
                    texts, completions = await asyncio.gather(asyncio.gather(*streams), asyncio.gather(*wholes))
                    assert texts == [each.text for each in completions] == ["t0 t1 t2 "] * 20

    run(test)


def test_a_flood_leaves_the_loop_its_turns() -> None:
    """Messages of a thousand chunks each: it is not their number that bounds how much is read in one turn."""

    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint, buffer_bytes=2**30) as client:
                stream = await client.generate("m", "x")
                rid = broker.expect(m.Generate).rid
                pieces = [m.Chunks([chunk(rid, seq) for seq in range(start, start + 1000)]) for start in range(0, 200_000, 1000)]
                for piece in pieces:
                    broker.send(piece)
                broker.send(done(rid, 200_000))
                most = read = 0
                call = client._connection._driven.pump.session.calls[rid]
                while call.end is None:
                    await asyncio.sleep(0)
                    most, read = max(most, call.next_seq - read), call.next_seq
                assert read == 200_000
                assert most < 50_000
                assert sum([len(piece.token_ids) async for piece in stream]) == 200_000

    run(test)


# --- cancelling --------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["next", "with", "whole", "tokens", "map"])
def test_cancelling_a_task_cancels_its_request_once(what: str) -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:

                async def entered() -> None:
                    async with client.generate("m", "x"):
                        await asyncio.Event().wait()

                async def mapped() -> None:
                    async for _ in client.map("m", ["x"]):
                        pass

                ways: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
                    "next": lambda: client.generate("m", "x").text(),
                    "with": entered,
                    "whole": lambda: client.generate("m", "x", stream=False),
                    "tokens": lambda: client.count_tokens("m", "x"),
                    "map": mapped,
                }
                task = asyncio.ensure_future(ways[what]())
                rid = (await expect(broker, object)).rid
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert (await expect(broker, m.Cancel)).rid == rid
                assert broker.nothing_arrived()
                assert not client._connection._driven.pump.session.calls

    run(test)


@pytest.mark.parametrize("greets", [True, False])
def test_cancelling_at_any_await_leaves_no_request(greets: bool) -> None:
    """After each number of turns of the loop, from before the request has left to after its end."""

    async def test() -> None:
        with Broker(echo, greets=greets) as broker:
            for count in range(30):
                async with AsyncClient(broker.endpoint) as client:
                    task = asyncio.ensure_future(client.generate("m", "x").text())
                    await turns(count)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        assert await task == "t0 t1 t2 "
                    assert not client._connection._driven.pump.session.calls
                    if greets:
                        assert await client.generate("m", "x").text() == "t0 t1 t2 "

    run(test)


def test_a_timeout_of_the_caller_cancels() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.1):
                        await client.generate("m", "x", stream=False)
                rid = (await expect(broker, m.Generate)).rid
                assert (await expect(broker, m.Cancel)).rid == rid

    run(test)


@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_a_forgotten_stream_is_cancelled(where: str) -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                streams = [await client.generate("m", "x")]
                rid = (await expect(broker, m.Generate)).rid
                if where == "here":
                    streams.clear()
                else:
                    await asyncio.to_thread(streams.clear)
                assert (await expect(broker, m.Cancel)).rid == rid

    run(test)


# --- loops -------------------------------------------------------------------------------------


def test_another_loop_is_refused_while_the_first_runs() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                stream = await client.generate("m", "x")

                async def elsewhere() -> None:
                    for what in (client.models(), client.generate("m", "y").text(), stream.text(), client.drain(), client.close()):
                        with pytest.raises(RuntimeError, match="another event loop"):
                            await what

                with ThreadPoolExecutor(1) as pool:
                    await asyncio.wrap_future(pool.submit(asyncio.run, elsewhere()))
                stream.close()

    run(test)


def test_one_client_serves_one_loop_after_the_other() -> None:
    with Broker(lambda asked: [m.Tokens(asked.rid, 1)] if isinstance(asked, m.CountTokens) else []) as broker:
        client = AsyncClient(broker.endpoint)
        left: list[AsyncStream] = []

        async def use() -> None:
            assert await client.count_tokens("m", "x") == 1
            left.append(await client.generate("m", "mute"))

        async def read_left() -> None:
            with pytest.raises(errors.ConnectionFailed, match="closed"):
                await left[0].text()

        asyncio.run(use())
        asyncio.run(read_left())
        asyncio.run(use())
        asyncio.run(client.close())
        with pytest.raises(errors.ConnectionFailed):
            asyncio.run(use())


def test_a_loop_may_end_under_open_streams_and_an_open_client() -> None:
    with Broker() as broker:
        before = len(os.listdir("/proc/self/fd"))

        async def leave() -> None:
            client = AsyncClient(broker.endpoint)
            waiting = [asyncio.ensure_future(client.generate("m", "x").text()) for _ in range(3)]
            kept.append(await client.generate("m", "y"))
            await turns()
            assert not any(task.done() for task in waiting)

        kept: list[AsyncStream] = []
        asyncio.run(leave())
        kept.clear()
        gc.collect()
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, PATIENCE_S, "no more descriptors than before")


def test_a_stream_may_be_closed_after_its_loop() -> None:
    with Broker() as broker, contextlib.closing(asyncio.new_event_loop()) as loop:
        client = AsyncClient(broker.endpoint)

        async def begin() -> AsyncStream:
            return await client.generate("m", "x")

        stream = loop.run_until_complete(begin())
        rid = broker.expect(m.Generate).rid
        loop.close()
        stream.close()
        assert broker.expect(m.Cancel).rid == rid
        asyncio.run(client.close())


def test_texts_are_taken_when_they_are_given() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint) as client:
                texts = ["a", "b"]
                vectors = client.embed("m", texts)
                texts.append("c")
                waiting = asyncio.ensure_future(vectors)
                assert (await expect(broker, m.Embed)).texts == ["a", "b"]
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)

    run(test)


def test_a_forgotten_client_lets_go_while_its_loop_goes_on() -> None:
    async def test() -> None:
        with Broker(echo) as broker:
            client: AsyncClient | None = AsyncClient(broker.endpoint)
            assert client is not None
            await client.generate("m", "x", stream=False)
            driven = client._connection._driven
            client = None
            await asyncio.to_thread(eventually, lambda: driven.pump.closed, PATIENCE_S, "closed")

    run(test)


def test_a_blocking_client_works_inside_a_coroutine() -> None:
    async def test() -> None:
        with Broker(echo) as broker, Client(broker.endpoint) as client:
            assert client.generate("m", "x").text() == "t0 t1 t2 "
            assert [result.text for result in client.map("m", ["a", "b"])] == ["t0 t1 t2 "] * 2

    run(test)


def test_pings_go_out_while_nobody_reads_and_a_silent_controller_is_lost() -> None:
    async def test() -> None:
        with Broker() as broker:
            async with AsyncClient(broker.endpoint, ttl_s=1.0) as client:
                stream = await client.generate("m", "x")
                for _ in range(4):
                    ping = await asyncio.to_thread(broker.pings.get, timeout=PATIENCE_S)
                    assert ping == m.Ping(1000, [stream.rid])
                broker.pongs = False
                with pytest.raises(errors.ControllerLost, match="silent"):
                    await stream.text()

    run(test)
