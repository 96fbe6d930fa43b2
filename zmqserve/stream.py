"""An answer while it is generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from .call import Call
from .connection import Connection
from .errors import ZmqserveError
from .messages import Done, Timings, Usage, unpack_ids
from .results import Completion, CompletionChoice, StreamChunk


class Stream(Iterator[StreamChunk]):
    """Iterate it for chunks as they come; made by Client.generate and Client.chat, for one thread.

    Leaving its ``with`` block, `close` and forgetting it cancel what is still being generated. Iteration raises the
    typed error that ended the answer, after the chunks that had come before it. After the last chunk `completion` is the whole.
    """

    def __init__(self, connection: Connection, call: Call) -> None:
        self._connection = connection
        self._call = call
        self._over = False

    def __repr__(self) -> str:
        return f"Stream({self._call!r})"

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamChunk:
        call = self._call
        while not self._over:
            # In this order: what came before the end is then seen, too.
            end = call.end
            chunk = call.take()
            if chunk is not None:
                return StreamChunk(chunk.text, unpack_ids(chunk.token_ids), chunk.seq, chunk.index, chunk.logprobs)
            if end is None:
                self._connection.wait(call)
                continue
            self._over = True
            if isinstance(end, ZmqserveError):
                raise end
        raise StopIteration

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._call.end is None and not sys.is_finalizing():
            self._connection.abandon(self._call)

    @property
    def rid(self) -> int:
        """The request's id, as it stands in the controller's log."""
        return self._call.rid

    def close(self) -> None:
        """Cancel the generation if it is still going on; what has not been read is dropped."""
        self._over = True
        self._connection.cancel(self._call)

    def text(self) -> str:
        """Read to the end and return the whole text (of the first choice), with what was read before."""
        for _ in self:
            pass
        return self.completion.text

    @property
    def resumed(self) -> int:
        """How often the answer went on elsewhere so far, after its worker or controller was lost."""
        return self._call.resumed

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises what ended it otherwise, and RuntimeError before the end and after `close`."""
        return completed(self._call)

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended; see `completion` for when."""
        return self.completion.finish_reason

    @property
    def usage(self) -> Usage:
        """Tokens; see `completion` for when."""
        return self.completion.usage

    @property
    def timings(self) -> Timings:
        """Where the time went, and which worker answered; see `completion` for when."""
        return self.completion.timings


def completed(call: Call) -> Completion:
    """The whole answer of a call that ended with Done."""
    end = call.end
    if isinstance(end, ZmqserveError):
        raise end
    if not isinstance(end, Done):
        state = "has not ended yet: read it first" if end is None else "was closed before its end"
        raise RuntimeError(f"the stream {state}")  # noqa: TRY004
    reasons = end.finish_reasons
    choices = [
        CompletionChoice(
            "".join(received.texts),
            unpack_ids(bytes(received.token_ids)),
            # One that was cancelled while it waited may not know how many choices it had.
            reasons[min(index, len(reasons) - 1)],
            received.logprobs,
        )
        for index, received in enumerate(call.received)
    ]
    return Completion(choices, end.usage, end.timings, call.resumed)
