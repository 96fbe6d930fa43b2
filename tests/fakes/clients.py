"""The three clients behind one face, for tests of what they have in common: each call returns when it is done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from types import TracebackType
from typing import Any, Protocol, Self

import zmq

from zmqserve import AsyncClient, Client, PolledClient, StreamChunk

from .broker import PATIENCE_S

MOST_MS = int(1000 * PATIENCE_S)


class Stream(Protocol):
    """An answer that is read chunk by chunk. `raw` is itself."""

    @property
    def raw(self) -> Any: ...

    def next(self) -> StreamChunk | None:
        """The next chunk; None at the end."""

    def close(self) -> None:
        """Cancel it."""


class Asker(Protocol):
    """A client of any kind. `raw` is itself."""

    @property
    def raw(self) -> Any: ...

    def __enter__(self) -> Self: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def close(self) -> None: ...

    def ask(self, verb: str, *args: Any, **options: Any) -> Any:
        """The answer in one piece."""

    def stream(self, verb: str, *args: Any, **options: Any) -> Stream:
        """An answer that has been sent."""


class Blocking:
    """A Client."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.raw: Any = Client(*args, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.raw.close()

    def ask(self, verb: str, *args: Any, **options: Any) -> Any:
        return getattr(self.raw, verb)(*args, **options)

    def stream(self, verb: str, *args: Any, **options: Any) -> Stream:
        return _Stream(getattr(self.raw, verb)(*args, **options))


class _Stream:
    def __init__(self, raw: Any) -> None:
        self.raw = raw

    def next(self) -> StreamChunk | None:
        return next(self.raw, None)

    def close(self) -> None:
        self.raw.close()


class OnLoop:
    """An AsyncClient, on an event loop that runs only while something is asked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.raw: Any = AsyncClient(*args, **options)
        self.runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
        self.runner.close()

    def close(self) -> None:
        self.run(self.raw.close)

    def run(self, what: Callable[[], Awaitable[Any]]) -> Any:
        """Await it."""

        async def awaited() -> Any:
            async with asyncio.timeout(PATIENCE_S):
                return await what()

        return self.runner.run(awaited())

    def ask(self, verb: str, *args: Any, **options: Any) -> Any:
        return self.run(lambda: getattr(self.raw, verb)(*args, **options))

    def stream(self, verb: str, *args: Any, **options: Any) -> Stream:
        return _LoopStream(self, self.ask(verb, *args, **options))


class _LoopStream:
    def __init__(self, asker: OnLoop, raw: Any) -> None:
        self.asker, self.raw = asker, raw

    def next(self) -> StreamChunk | None:
        async def taken() -> Any:
            return await anext(self.raw, None)

        chunk: StreamChunk | None = self.asker.run(taken)
        return chunk

    def close(self) -> None:
        self.raw.close()
        self.asker.run(lambda: asyncio.sleep(0))


class Driving:
    """A PolledClient, driven by a zmq.Poller while something is asked."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.raw: Any = PolledClient(*args, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.raw.close()

    def until(self, done: Callable[[], object]) -> list[Any]:
        """Poll until it is so; returns all that had news."""
        poller = zmq.Poller()
        poller.register(self.raw, zmq.POLLIN)
        told: list[Any] = []
        until_s = monotonic() + PATIENCE_S
        while not done():
            assert monotonic() < until_s, "what is awaited did not come"
            poller.poll(min(MOST_MS, MOST_MS if self.raw.wait_ms() is None else self.raw.wait_ms()))
            told += self.raw.process()
        return told

    def ask(self, verb: str, *args: Any, **options: Any) -> Any:
        pending = getattr(self.raw, verb)(*args, **options)
        self.until(lambda: pending.done)
        return pending.result()

    def stream(self, verb: str, *args: Any, **options: Any) -> Stream:
        raw = getattr(self.raw, verb)(*args, **options)
        self.until(lambda: raw._open.sent or raw._open.end is not None)
        return _PolledStream(self, raw)


class _PolledStream:
    def __init__(self, asker: Driving, raw: Any) -> None:
        self.asker, self.raw = asker, raw
        self._taken: list[StreamChunk] = []

    def next(self) -> StreamChunk | None:
        if not self._taken:
            self.asker.until(self._take)
        return self._taken.pop(0) if self._taken else None

    def _take(self) -> bool:
        self._taken = self.raw.take()
        return bool(self._taken) or self.raw.done

    def close(self) -> None:
        self.raw.cancel()


KINDS: dict[str, Callable[..., Asker]] = {"Client": Blocking, "AsyncClient": OnLoop, "PolledClient": Driving}
