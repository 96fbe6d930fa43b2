"""A hosted API that does what the test scripts: HTTP/1.1 on loopback, with every fault that such an API can have."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, TypeAlias


class Exchange:
    """One request and the way to answer it."""

    def __init__(self, target: str, headers: dict[str, str], body: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.target, self.headers, self.body = target, headers, body
        self.came_s = time.monotonic()
        self._reader, self._writer = reader, writer

    async def raw(self, data: bytes) -> None:
        """Any bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def respond(self, status: int, body: object = b"", kind: str = "application/json", **headers: str) -> None:
        """A whole answer; `body` is bytes, or is sent as JSON. Underscores in header names stand for hyphens."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} Scripted", f"content-type: {kind}", f"content-length: {len(data)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode() + data)

    async def begin(self, kind: str = "text/event-stream") -> None:
        """The head of a streamed answer."""
        await self.raw(f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode())

    async def chunk(self, data: bytes) -> None:
        """A piece of a streamed answer."""
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, content: object) -> None:
        """One server-sent event, with the characters as they are."""
        await self.chunk(f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode())

    async def end(self) -> None:
        """The regular end of a stream."""
        await self.chunk(b"data: [DONE]\n\n")
        await self.raw(b"0\r\n\r\n")

    async def gone(self) -> None:
        """Wait until the client closes the connection."""
        while await self._reader.read(1024):
            pass

    def cut(self) -> None:
        """Break the connection."""
        self._writer.transport.abort()


Handler: TypeAlias = Callable[[Exchange], Awaitable[None]]


class FakeUpstream:
    """Answers request k with handler k, and all after the last one with that. `seen` are the requests; `url` is its base URL."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers: Sequence[Handler] = handlers
        self.seen: list[Exchange] = []
        self.hung_up = threading.Event()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._up = threading.Event()
        self._ending = asyncio.Event()
        self._thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve()), name="fake upstream")

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        running: set[asyncio.Task[None]] = set()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            running.add(task)
            try:
                while (exchange := await _read(reader, writer)) is not None:
                    handler = self.handlers[min(len(self.seen), len(self.handlers) - 1)]
                    self.seen.append(exchange)
                    await handler(exchange)
            except (ConnectionError, asyncio.IncompleteReadError):
                self.hung_up.set()
            except asyncio.CancelledError:
                pass
            finally:
                running.discard(task)
                writer.transport.abort()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._up.set()
        await self._ending.wait()
        server.close()
        tasks = list(running)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def until_gone(self) -> Handler:
        """A handler's last part: wait for the client to hang up, and note that it did."""

        async def wait(exchange: Exchange) -> None:
            await exchange.gone()
            self.hung_up.set()

        return wait


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except asyncio.IncompleteReadError:
        return None
    _, target, _ = head[0].split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Exchange(target, headers, json.loads(body) if body else None, reader, writer)


# --- what well-behaved servers send ------------------------------------------------------------


def piece(text: str | None = None, *, index: int = 0, finish: str | None = None, logprobs: object = None) -> dict[str, Any]:
    """A chat completion chunk."""
    delta = {} if text is None else {"content": text}
    choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    """The chunk that ends a chat completion when `include_usage` was asked for."""
    counts = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}
    return {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [], "usage": counts}


def chat(*events: dict[str, Any]) -> Handler:
    """A handler that streams these events to their end."""

    async def handle(exchange: Exchange) -> None:
        await exchange.begin()
        for event in events:
            await exchange.event(event)
        await exchange.end()

    return handle


def words(text: str = "one two", prompt_tokens: int = 3) -> Handler:
    """A handler that answers `text`, a word at a time, as a chat completion."""
    parts = text.split(" ")
    pieces = [piece(word if k == 0 else " " + word) for k, word in enumerate(parts)]
    return chat(piece(""), *pieces, piece(finish="stop"), usage(prompt_tokens, len(parts)))


def status(code: int, body: object = None, **headers: str) -> Handler:
    """A handler that refuses."""

    async def handle(exchange: Exchange) -> None:
        await exchange.respond(code, {"error": {"message": f"scripted {code}"}} if body is None else body, **headers)

    return handle


def token(
    text: str, token_id: int, *, special: bool = False, finish: str | None = None, top: object = None, **details: int
) -> dict[str, Any]:
    """A text generation event, as TGI streams them."""
    ended = {"finish_reason": finish, "generated_tokens": 1, "seed": None, **details} if finish else None
    made = {"id": token_id, "text": text, "logprob": -0.5, "special": special}
    return {"index": token_id, "token": made, "generated_text": "all" if finish else None, "details": ended, "top_tokens": top}


async def collect(deltas: AsyncIterator[Any]) -> list[Any]:
    """All of them."""
    return [delta async for delta in deltas]
