"""A lean HTTP client for the peers that speak it: asyncio's streams, one kept connection for each stream, no HTTP library.

Of a streamed body it takes the JSON objects between two separators, without undoing the chunked encoding first: less work than any
general client does. Every object is decoded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgspec

from .loads import BATCH, EMBED_IN_FLIGHT, FLOATS, Scale, Work, streamed

LAST_CHUNK = b"\r\n0\r\n\r\n"


class Piece(msgspec.Struct):
    """One token, as JSON."""

    text: str


class Connection:
    """One kept-alive connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> Connection:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        return self

    def close(self) -> None:
        """Close it."""
        self._writer.close()

    def send(self, path: str, body: bytes) -> None:
        """POST it."""
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        self._writer.write(head.encode() + body)

    async def body(self) -> bytes:
        """All of a response that has a length, or the chunks of one that has none."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lower = head.lower()
        assert head.startswith(b"HTTP/1.1 200"), head
        place = lower.find(b"content-length:")
        if place >= 0:
            return await self._reader.readexactly(int(lower[place + 15 : lower.index(b"\r\n", place)]))
        whole = b"\r\n"
        while not whole.endswith(LAST_CHUNK):
            whole += await self._more()
        return whole

    async def objects(self, separator: bytes, take: Callable[[bytes], None]) -> None:
        """Give `take` each JSON object of a streamed response, as it comes."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        rest = b"\r\n"
        while not rest.endswith(LAST_CHUNK):
            *parts, rest = (rest + await self._more()).split(separator)
            for part in parts:
                place = part.find(b"{")
                if place >= 0:
                    take(part[place:])

    async def _more(self) -> bytes:
        data = await self._reader.read(2**18)
        if not data:
            raise ConnectionError("the server closed the connection")
        return data


class HttpClient:
    """The workloads over HTTP. A subclass says what each request is."""

    separator = b"\n\n"
    decode: Callable[[bytes], Any] = msgspec.json.Decoder(Piece).decode

    def __init__(self, port: int) -> None:
        self._runner = asyncio.Runner()
        self._port = port
        self._connections: list[Connection] = []

    def request(self, work: Work) -> tuple[str, bytes]:
        """Path and body for one stream of this work."""
        raise NotImplementedError

    async def one(self, connection: Connection) -> None:
        """A request with an answer of one chunk."""
        connection.send(*self.request(Work("one")))
        self.decode(await connection.body())

    async def opened(self, connection: Connection) -> None:
        """What belongs to a new connection."""

    async def prepare(self, connection: Connection) -> None:
        """What comes before each stream."""

    async def embed(self, connection: Connection, fast: bool) -> int:
        """Vectors of one batch, as an array. `fast`: by msgspec's JSON, else the standard library's."""
        raise NotImplementedError

    def tokens(self, scale: Scale, _step: bool, _decode: bool) -> tuple[int, float]:
        """Tokens, and seconds from the first request to the last end. All are decoded; one token a message is all that HTTP has."""
        work = streamed(scale, step=False)
        came, spent_s = self._runner.run(self._streamed(work))
        assert len(came) == work.streams * work.tokens, len(came)
        return len(came), spent_s

    def paced(self, scale: Scale, _step: bool) -> list[float]:
        """Seconds from send to hand of each token after the first of its stream."""
        came, _ = self._runner.run(self._streamed(streamed(scale, step=False, paced=True)))
        return [now - float(text) for now, text in came if text[0] != "x"]

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""
        return self._runner.run(self._closed_loop(scale.in_flight, scale.run_s, self._one))

    def embedded(self, scale: Scale, fast: bool) -> tuple[int, float]:
        """Vectors, and seconds."""

        async def batch(connection: Connection) -> int:
            return await self.embed(connection, fast)

        return self._runner.run(self._closed_loop(EMBED_IN_FLIGHT, scale.run_s, batch))

    async def _streamed(self, work: Work) -> tuple[list[tuple[float, str]], float]:
        connections = await self._opened(work.streams)
        came: list[tuple[float, str]] = []
        decode, clock = self.decode, time.monotonic

        def take(data: bytes) -> None:
            came.append((clock(), decode(data).text))

        path, body = self.request(work)

        async def read(connection: Connection) -> None:
            await self.prepare(connection)
            connection.send(path, body)
            await connection.objects(self.separator, take)

        began_s = clock()
        await asyncio.gather(*[read(connection) for connection in connections])
        return came, time.monotonic() - began_s

    async def _closed_loop(self, in_flight: int, run_s: float, ask: Callable[[Connection], Any]) -> tuple[int, float]:
        connections = await self._opened(in_flight)
        began_s = time.perf_counter()
        end_s = began_s + run_s

        async def loop(connection: Connection) -> int:
            made = 0
            while time.perf_counter() < end_s:
                made += await ask(connection)
            return made

        made = sum(await asyncio.gather(*[loop(connection) for connection in connections]))
        return made, time.perf_counter() - began_s

    async def _one(self, connection: Connection) -> int:
        await self.one(connection)
        return 1

    async def _opened(self, count: int) -> list[Connection]:
        """New ones each time: servers close those that are idle for some seconds."""
        for connection in self._connections:
            connection.close()
        self._connections = [await Connection(self._port).open() for _ in range(count)]
        for connection in self._connections:
            await self.opened(connection)
        return self._connections


def checked(vectors: Any) -> int:
    """How many there are. `vectors`: an array."""
    assert vectors.shape == (BATCH, FLOATS), vectors.shape
    return BATCH
