"""`drain`: what is open may end, nothing new is taken, and then the client is closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest

from tests.fakes.broker import PATIENCE_S, Broker, chunk, done, echo
from tests.fakes.clients import KINDS, Asker, Driving
from zmqserve import AsyncClient, Client, errors
from zmqserve import messages as m

Start = Callable[..., tuple[Broker, Client]]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def make(script: Any = None, **options: Any) -> tuple[Broker, Client]:
            made = stack.enter_context(Broker(script))
            return made, stack.enter_context(Client(made.endpoint, **options))

        yield make


def closed(client: Client) -> bool:
    return client._connection._pump.closed


def test_with_nothing_open_it_is_over_at_once(start: Start) -> None:
    _, client = start(echo)
    assert client.drain() is True
    assert client.drain(1) is True
    with pytest.raises(errors.ConnectionFailed, match="closed, or was told to drain"):
        client.models()
    with Client("tcp://127.0.0.1:1") as unused:
        assert unused.drain()


@pytest.mark.parametrize("read", ["meanwhile", "before", "after"])
def test_what_is_open_ends_by_itself_and_is_whole(start: Start, read: str) -> None:
    broker, client = start()
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    broker.send(chunk(rid, 0))
    assert next(stream).seq == 0
    with ThreadPoolExecutor(3) as pool:
        reader = pool.submit(stream.text) if read == "before" else None
        draining = [pool.submit(client.drain, timeout_s) for timeout_s in (None, 60.0)]
        while not client._connection._pump.session._drainings:
            pass
        if read == "meanwhile":
            reader = pool.submit(stream.text)
        with pytest.raises(errors.ConnectionFailed, match="drain"):
            client.generate("m", "y")
        assert not any(each.done() for each in draining)
        broker.send(done(rid, 1, last=chunk(rid, 1)))
        assert [each.result(PATIENCE_S) for each in draining] == [True, True]
        assert (stream.text() if reader is None else reader.result(PATIENCE_S)) == "t0 t1 "
    assert closed(client)
    assert broker.nothing_arrived()


def test_what_is_open_at_the_timeout_is_cancelled(start: Start) -> None:
    broker, client = start()
    streams = [client.generate("m", "x") for _ in range(3)]
    rids = [broker.expect(m.Generate).rid for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        reader = pool.submit(streams[0].text)
        longer = pool.submit(client.drain, None)
        began_s = monotonic()
        assert client.drain(0.2) is False
        assert 0.2 <= monotonic() - began_s < PATIENCE_S
        assert longer.result(PATIENCE_S) is False
        with pytest.raises(errors.ConnectionFailed, match="drain"):
            reader.result(PATIENCE_S)
    assert {broker.expect(m.Cancel).rid for _ in range(3)} == set(rids)
    assert closed(client)


def test_close_ends_a_drain(start: Start) -> None:
    broker, client = start()
    with ThreadPoolExecutor(1) as pool:
        stream = client.generate("m", "x")
        broker.expect(m.Generate)
        draining = pool.submit(client.drain)
        while not client._connection._pump.session._drainings:
            pass
        client.close()
        draining.result(PATIENCE_S)
    with pytest.raises(errors.ConnectionFailed):
        stream.text()


def test_a_request_that_moves_is_waited_for(start: Start) -> None:
    """A lost controller does not make a drain forget what it held."""
    broker, _ = start()
    other, _ = start(echo)
    with Client([broker.endpoint, other.endpoint]) as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate("m", "x")
        broker.expect(m.Generate)
        draining = pool.submit(client.drain)
        while not client._connection._pump.session._drainings:
            pass
        broker.close()
        assert draining.result(PATIENCE_S) is True
        assert stream.text() == "t0 t1 t2 "


def test_a_map_under_way_ends_with_what_it_has_asked(start: Start) -> None:
    broker, client = start()
    results = client.map("m", ["a", "b", "c"], concurrency=2)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(next, results)
        asked = [broker.expect(m.Generate) for _ in range(2)]
        draining = pool.submit(client.drain)
        while not client._connection._pump.session._drainings:
            pass
        for each in asked:
            broker.send(done(each.rid, 0, last=chunk(each.rid, 0, each.prompt)))
        assert first.result(PATIENCE_S).text == "a"
        assert next(results).text == "b"
        with pytest.raises(errors.ConnectionFailed, match="drain"):
            next(results)
        assert draining.result(PATIENCE_S) is True


def test_a_drain_that_close_cuts_short_says_so(start: Start) -> None:
    broker, client = start()
    stream = client.generate("m", "x")
    broker.expect(m.Generate)
    with ThreadPoolExecutor(1) as pool:
        draining = pool.submit(client.drain)
        while not client._connection._pump.session._drainings:
            pass
        client.close()
        assert draining.result(PATIENCE_S) is False
    with pytest.raises(errors.ConnectionFailed):
        stream.text()


@pytest.mark.parametrize("timeout_s", [-1, "1", True, float("nan")])
def test_a_wrong_timeout_is_said_and_nothing_is_drained(start: Start, timeout_s: Any) -> None:
    _, client = start(echo)
    with pytest.raises(errors.InvalidParameter, match="a number of seconds from 0") as caught:
        client.drain(timeout_s)
    assert caught.value.parameter == "timeout_s"
    assert client.generate("m", "x", stream=False, max_tokens=1).text == "t0 "
    assert client.drain(0) is True


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("timeout_s", [-1, "1", True, float("nan")])
def test_a_wrong_timeout_is_said_by_one_that_is_closed_too(kind: Callable[..., Asker], timeout_s: Any) -> None:
    with Broker(echo) as broker, kind(broker.endpoint) as client:
        client.close()
        with pytest.raises(errors.InvalidParameter, match="a number of seconds from 0"):
            wait(client, timeout_s)


def wait(client: Asker, timeout_s: Any) -> None:
    if isinstance(client, Driving):
        client.raw.drain(timeout_s)
    else:
        client.ask("drain", timeout_s)


# --- the other clients -------------------------------------------------------------------------


def test_tasks_drain() -> None:
    async def main(broker: Broker) -> None:
        async with AsyncClient(broker.endpoint) as client:
            stream = await client.generate("m", "x")
            reader = asyncio.ensure_future(stream.text())
            draining = [asyncio.ensure_future(client.drain(timeout_s)) for timeout_s in (None, 60)]
            await asyncio.sleep(0)
            with pytest.raises(errors.ConnectionFailed, match="drain"):
                await client.models()
            rid = broker.expect(m.Generate).rid
            broker.send(done(rid, 0, last=chunk(rid, 0)))
            assert await asyncio.gather(reader, *draining) == ["t0 ", True, True]
            assert await client.drain() is True
        async with AsyncClient(broker.endpoint) as client:
            stream = await client.generate("m", "x")
            assert await client.drain(0.1) is False
            with pytest.raises(errors.ConnectionFailed, match="drain"):
                await stream.text()
            assert asyncio.all_tasks() == {asyncio.current_task()}
        async with AsyncClient(broker.endpoint) as client:
            stream = await client.generate("m", "x")
            waiting = asyncio.ensure_future(client.drain())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    with Broker() as broker:
        asyncio.run(main(broker), debug=True)


def test_a_later_timeout_of_a_driven_client_counts_if_it_ends_sooner() -> None:
    with Broker() as broker, Driving(broker.endpoint) as driving:
        client = driving.raw
        pending = client.generate("m", "x", stream=False)
        driving.until(lambda: pending._open.sent)
        rid = broker.expect(m.Generate).rid
        assert client.drain() is False
        for wrong in (-1, "1", float("nan")):
            with pytest.raises(errors.InvalidParameter, match="a number of seconds from 0"):
                client.drain(wrong)
        for timeout_s in (3600, 60, 600, None):
            assert client.drain(timeout_s) is False
        assert client.drain(0) is False
        driving.until(lambda: pending.done)
        assert client.drain() is True
        with pytest.raises(errors.ConnectionFailed, match="drain"):
            pending.result()
        assert broker.expect(m.Cancel).rid == rid


@pytest.mark.parametrize("whole", [True, False])
def test_a_driven_client_drains(whole: bool) -> None:
    with Broker() as broker, Driving(broker.endpoint) as driving:
        client = driving.raw
        pending = client.generate("m", "x", stream=False)
        assert client.drain(None if whole else 0.1) is False
        with pytest.raises(errors.ConnectionFailed, match="drain"):
            client.models()
        driving.until(lambda: pending._open.sent)
        rid = broker.expect(m.Generate).rid
        if whole:
            broker.send(done(rid, 0, last=chunk(rid, 0)))
        driving.until(client.drain)
        assert pending.done
        if whole:
            assert pending.result().text == "t0 "
        else:
            with pytest.raises(errors.ConnectionFailed, match="drain"):
                pending.result()
            assert broker.expect(m.Cancel).rid == rid
