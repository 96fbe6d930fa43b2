"""NATS with its Python client, nats-py, at both ends."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from zmqserve import messages as m

from . import nats_server
from .loads import ONE, PayloadReader, Scale, Work, asked, begun, chunk, done, payloads, stamp
from .nats_server import INBOX, WORK, start_server
from .running import Running


def absent() -> str | None:
    """Why it cannot be started."""
    if importlib.util.find_spec("nats") is None:
        return "nats-py not installed: pip install nats-py"
    return nats_server.absent()


def start(running: Running) -> None:
    """nats-server, a generator and a consumer."""
    port = start_server(running)
    running.spawn("worker", generator, port)
    running.open_client(Consumer, port)


def generator(ready: Connection, port: int) -> None:
    """Does the work that requests name, until it is killed."""
    asyncio.run(_generate(ready, port))


async def _generate(ready: Connection, port: int) -> None:
    import nats

    connection = await nats.connect(f"nats://127.0.0.1:{port}")
    requests = m.decoder(m.Generate)
    waiting: list[int] = []
    jobs: list[asyncio.Task[None]] = []

    async def take(message: Any) -> None:
        request = requests.decode(message.data)
        if request.prompt == ONE:
            await connection.publish(INBOX, done(request.rid, chunk(request.rid, 0)))
            return
        work = Work.parse(request.prompt or "")
        waiting.append(request.rid)
        if len(waiting) == work.streams:
            jobs[:] = [asyncio.create_task(stream(list(waiting), work))]
            waiting.clear()

    async def stream(rids: list[int], work: Work) -> None:
        for payload in begun(rids):
            await connection.publish(INBOX, payload)
        messages = payloads(rids, work)
        began_s = time.monotonic()
        for k in range(1, work.tokens):
            if work.rate:
                await asyncio.sleep(max(0.0, began_s + k / work.rate - time.monotonic()))
                messages = payloads(rids, work, stamp())
            for payload in messages:
                await connection.publish(INBOX, payload)
            # The client's flusher has its turn, or all would wait in memory.
            await asyncio.sleep(0)
        for rid in rids:
            await connection.publish(INBOX, done(rid))

    await connection.subscribe(WORK, cb=take)
    await connection.flush()
    ready.send("ready")
    await asyncio.Event().wait()


class Consumer(PayloadReader):
    """Counts what comes, and decodes it when that is asked, in the callback of a subscription."""

    def __init__(self, port: int) -> None:
        self._runner = asyncio.Runner()
        self._connection: Any = self._runner.run(_connected(port))

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""
        answered, rid, left = 0, scale.in_flight, scale.in_flight
        over = asyncio.Event()
        began_s = time.perf_counter()
        ended_s = 0.0

        async def take(_message: Any) -> None:
            nonlocal answered, rid, left, ended_s
            answered += 1
            now = time.perf_counter()
            if now - began_s < scale.run_s:
                rid += 1
                await self._connection.publish(WORK, asked(rid, ONE))
                return
            ended_s = ended_s or now
            left -= 1
            if not left:
                over.set()

        self._runner.run(self._run(ONE, scale.in_flight, take, over))
        return answered - scale.in_flight + 1, ended_s - began_s

    def _read(self, work: Work, take: Callable[[bytes], bool]) -> None:
        over = asyncio.Event()

        async def receive(message: Any) -> None:
            if take(message.data):
                over.set()

        self._runner.run(self._run(work.text, work.streams, receive, over))

    async def _run(self, prompt: str, requests: int, take: Callable[[Any], Awaitable[None]], over: asyncio.Event) -> None:
        """Ask, and let `take` have all that comes until it is over."""
        inbox = await self._connection.subscribe(INBOX, cb=take)
        for rid in range(1, requests + 1):
            await self._connection.publish(WORK, asked(rid, prompt))
        await asyncio.wait_for(over.wait(), 60)
        await inbox.unsubscribe()


async def _connected(port: int) -> Any:
    import nats

    return await nats.connect(f"nats://127.0.0.1:{port}")
