"""gRPC's asyncio server and client, without a broker: one streaming call for each request, messages as bytes (no protobuf to encode)."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from typing import Any

from bench.ports import free_port
from zmqserve import messages as m

from .loads import ONE, Scale, Work, asked, chunk, stamp, streamed
from .running import Running

METHODS = ("Stream", "One")


def absent() -> str | None:
    """Why it cannot be started."""
    return None if importlib.util.find_spec("grpc") else "grpcio not installed: pip install grpcio"


def start(running: Running) -> None:
    """The server and its client."""
    port = free_port()
    running.spawn("broker", serve, port)
    running.open_client(Client, port)


def serve(ready: Connection, port: int) -> None:
    """The server, until it is killed."""
    asyncio.run(_serve(ready, port))


async def _serve(ready: Connection, port: int) -> None:
    import grpc

    requests = m.decoder(m.Generate)
    answer = m.encode(chunk(1, 0))

    async def stream(payload: bytes, _context: Any) -> AsyncIterator[bytes]:
        request = requests.decode(payload)
        work = Work.parse(request.prompt or "")
        began_s = time.monotonic()
        for k in range(work.tokens):
            if work.rate and k:
                await asyncio.sleep(began_s + k / work.rate - time.monotonic())
            yield m.encode(chunk(request.rid, k, stamp())) if work.rate else answer

    async def one(payload: bytes, _context: Any) -> bytes:
        requests.decode(payload)
        return answer

    server = grpc.aio.server()
    handlers = {METHODS[0]: grpc.unary_stream_rpc_method_handler(stream), METHODS[1]: grpc.unary_unary_rpc_method_handler(one)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("Bench", handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    ready.send("ready")
    await server.wait_for_termination()


class Client:
    """Reads each stream in a task of its own, and decodes every token."""

    def __init__(self, port: int) -> None:
        self._runner = asyncio.Runner()
        self._stream, self._one = self._runner.run(_connected(port))

    def tokens(self, scale: Scale, _step: bool, _decode: bool) -> tuple[int, float]:
        """Tokens, and seconds from the first request to the last end."""
        work = streamed(scale, step=False)
        began_s = time.monotonic()
        came = self._runner.run(self._streamed(work))
        assert len(came) == work.streams * work.tokens, len(came)
        return len(came), came[-1][0] - began_s

    def paced(self, scale: Scale, _step: bool) -> list[float]:
        """Seconds from send to hand of each token after the first of its stream."""
        came = self._runner.run(self._streamed(streamed(scale, step=False, paced=True)))
        return [now - float(each.text) for now, each in came if each.seq]

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""
        return self._runner.run(self._requests(scale))

    async def _streamed(self, work: Work) -> list[tuple[float, m.Chunk]]:
        came: list[tuple[float, m.Chunk]] = []
        decode, prompt = m.decoder(m.Chunk).decode, work.text

        async def read(rid: int) -> None:
            async for payload in self._stream(asked(rid, prompt)):
                came.append((time.monotonic(), decode(payload)))  # noqa: PERF401 - when each came is the point

        await asyncio.gather(*[read(rid) for rid in range(1, work.streams + 1)])
        return came

    async def _requests(self, scale: Scale) -> tuple[int, float]:
        decode = m.decoder(m.Chunk).decode
        began_s = time.perf_counter()
        end_s = began_s + scale.run_s

        async def loop(rid: int) -> int:
            made = 0
            while time.perf_counter() < end_s:
                decode(await self._one(asked(rid, ONE)))
                made += 1
            return made

        made = sum(await asyncio.gather(*[loop(rid) for rid in range(1, scale.in_flight + 1)]))
        return made, time.perf_counter() - began_s


async def _connected(port: int) -> tuple[Any, Any]:
    import grpc

    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    await channel.channel_ready()
    return channel.unary_stream(f"/Bench/{METHODS[0]}"), channel.unary_unary(f"/Bench/{METHODS[1]}")
