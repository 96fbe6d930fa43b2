"""What every kind of stream knows of its answer."""

from __future__ import annotations

from .call import Call
from .errors import ZmqserveError
from .forks import OneProcess
from .messages import Done, Timings, Usage, unpack_ids
from .results import Completion, CompletionChoice, StreamChunk


class Answering(OneProcess):
    """An answer that is generated for a request. `completion` and what belongs to it are there when all has been received."""

    def __init__(self, call: Call | None, rid: int) -> None:
        self._call = call
        self._rid = rid
        self._over = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({f'rid={self._rid}, not sent' if self._call is None else self._call!r})"

    @property
    def rid(self) -> int:
        """The request's id, as it stands in the controller's log."""
        return self._rid

    @property
    def resumed(self) -> int:
        """How often the answer went on elsewhere so far, after its worker or controller was lost."""
        return 0 if self._call is None else self._call.resumed

    @property
    def completion(self) -> Completion:
        """The whole answer. Raises what ended it otherwise, and RuntimeError before the end and after `close`."""
        if self._call is None:
            raise RuntimeError("the stream has not been sent: await or iterate it first")
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

    def _next(self, call: Call) -> StreamChunk | None:
        """What can be read now. None: nothing; then it is `_over`, or more is to come. Raises the error that ended the answer."""
        # In this order: what came before the end is then seen, too.
        end = call.end
        chunks = call.chunks
        if chunks:
            chunk = chunks.popleft()
            return StreamChunk(chunk.text, unpack_ids(chunk.token_ids), chunk.seq, chunk.index, chunk.logprobs)
        if end is not None:
            self._over = True
            if isinstance(end, ZmqserveError):
                raise end
        return None


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
