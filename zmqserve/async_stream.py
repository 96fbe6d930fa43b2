"""An answer while it is generated, for asyncio."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Generator
from types import TracebackType
from typing import Any, Self

from .answering import Answering
from .asking import Ask
from .async_connection import AsyncConnection
from .call import Call
from .results import StreamChunk


class AsyncStream(Answering, AsyncIterator[StreamChunk]):
    """Iterate it with ``async for`` for chunks as they come; made by AsyncClient.generate and AsyncClient.chat, for one task at a time.

    It is sent when it is first awaited, entered (``async with``) or iterated. Leaving its ``async with`` block, `close`, forgetting it
    and cancelling the task that waits for its next chunk cancel what is still being generated. Iteration raises the typed error that
    ended the answer, after the chunks that had come before it. After the last chunk `completion` is the whole.
    """

    def __init__(self, connection: AsyncConnection, ask: Ask) -> None:
        super().__init__(None, ask.request.rid)
        self._connection = connection
        self._ask = ask
        self._in_use = False

    def __await__(self) -> Generator[Any, None, Self]:
        return self._sent().__await__()

    async def __aenter__(self) -> Self:
        return await self._sent()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self._over:
            call = self._call
            if call is None:
                call = self._begun()
            chunk = self._next(call)
            if chunk is not None:
                return chunk
            if not self._over:
                self._check_alone()
                self._in_use = True
                try:
                    await self._connection.wait(call)
                except BaseException:
                    self.close()  # whoever is cancelled meanwhile wants no more of the answer
                    raise
                finally:
                    self._in_use = False
        raise StopAsyncIteration

    def __del__(self) -> None:
        if self._call is not None and self._call.end is None and not sys.is_finalizing():
            self._connection.abandon(self._call)

    def close(self) -> None:
        """Cancel the generation if it is still going on; what has not been read is dropped."""
        self._over = True
        if self._call is not None:
            self._connection.cancel(self._call)

    async def aclose(self) -> None:
        """The same as `close`, for ``contextlib.aclosing``."""
        self.close()

    async def text(self) -> str:
        """Read to the end and return the whole text (of the first choice), with what was read before."""
        async for _ in self:
            pass
        return self.completion.text

    async def _sent(self) -> Self:
        if self._call is None and not self._over:
            self._check_alone()
            self._in_use = True
            try:
                self._call = await self._connection.open(self._ask, collect=False)
            except BaseException:
                self.close()
                raise
            finally:
                self._in_use = False
        return self

    def _begun(self) -> Call:
        self._check_alone()
        try:
            self._call = call = self._connection.begin(self._ask, collect=False, later=True)
        except BaseException:
            self.close()
            raise
        return call

    def _check_alone(self) -> None:
        """Raise RuntimeError where another task waits for this stream, and on another loop."""
        self._connection.check_loop()
        if self._in_use:
            raise RuntimeError("another task waits for this stream: a stream is for one task at a time")
