"""An answer while it is generated, for programs that block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from .answering import Answering
from .call import Call
from .connection import Connection
from .results import StreamChunk


class Stream(Answering, Iterator[StreamChunk]):
    """Iterate it for chunks as they come; made by Client.generate and Client.chat, for one thread.

    Leaving its ``with`` block, `close` and forgetting it cancel what is still being generated. Iteration raises the
    typed error that ended the answer, after the chunks that had come before it. After the last chunk `completion` is the whole.
    """

    def __init__(self, connection: Connection, call: Call) -> None:
        super().__init__(call, call.rid)
        self._connection = connection
        self._open = call

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamChunk:
        while not self._over:
            chunk = self._next(self._open)
            if chunk is not None:
                return chunk
            if not self._over:
                self._connection.wait(self._open)
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._open.end is None and not sys.is_finalizing():
            self._connection.abandon(self._open)

    def close(self) -> None:
        """Cancel the generation if it is still going on; what has not been read is dropped."""
        self._over = True
        self._connection.cancel(self._open)

    def text(self) -> str:
        """Read to the end and return the whole text (of the first choice), with what was read before."""
        for _ in self:
            pass
        return self.completion.text
