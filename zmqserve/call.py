"""One open request as its client sees it: what has come, what was read, how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

from .errors import ZmqserveError
from .liveness import Timer
from .messages import (
    Cancel,
    Chunk,
    CountTokens,
    Details,
    Done,
    Drain,
    DrainReply,
    Embed,
    Embedding,
    Generate,
    ListModels,
    ModelDetails,
    Models,
    Status,
    StatusReply,
    TokenLogprob,
    Tokens,
)

ClientRequest: TypeAlias = Generate | Embed | CountTokens | ModelDetails | ListModels | Status | Drain
Answer: TypeAlias = Done | Embedding | Tokens | Details | Models | StatusReply | DrainReply
End: TypeAlias = Answer | Cancel | ZmqserveError

ANSWERS: dict[type[ClientRequest], type[Answer]] = {
    Generate: Done,
    Embed: Embedding,
    CountTokens: Tokens,
    ModelDetails: Details,
    ListModels: Models,
    Status: StatusReply,
    Drain: DrainReply,
}
"""What ends each request when all goes well. An SDK never sends ``stream=false``, so a Generate ends with Done."""

CHUNK_BYTES = 128
"""What an unread chunk weighs beside its text and ids, about: an endless stream of empty ones is bounded, too."""
LOGPROB_BYTES = 128
"""What one reported token weighs, about."""


class Received:
    """One choice of an answer, as far as it has come. `token_ids` are packed u32."""

    __slots__ = ("logprobs", "texts", "token_ids")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids = bytearray()
        self.logprobs: list[TokenLogprob] | None = None

    def __repr__(self) -> str:
        return f"Received({sum(map(len, self.texts))} characters, {len(self.token_ids) // 4} ids)"


class Call:
    """An open request. The session writes it (under its owner's lock); one reader takes `chunks`, without any.

    `received`: the answer so far, per choice. Together with `next_seq` it is all that a resume needs.
    `chunks`: what the reader has not taken yet; None when it only wants the whole.
    `waiter`: called once when the request has left, when there is something to read, or the end; whoever waits sets it anew.
    `end`: how it ended: the answer, an error, or Cancel when the caller gave it up. Set after the last chunk was put into `chunks`,
    so a reader that saw an end and then no chunk has read all.
    """

    __slots__ = (
        "chunks",
        "end",
        "next_seq",
        "pinged",
        "read_bytes",
        "received",
        "received_bytes",
        "request",
        "rid",
        "sent",
        "timer",
        "waiter",
    )

    def __init__(self, request: ClientRequest, *, collect: bool) -> None:
        self.request = request
        self.rid = request.rid
        self.sent = False
        self.pinged = False
        self.next_seq = 0
        choices = request.params.n if isinstance(request, Generate) else 0
        self.received = [Received() for _ in range(choices)]
        self.chunks: deque[Chunk] | None = None if collect else deque()
        # Two counters with one writer each: the session adds to the one and the reader to the other, so neither needs a lock.
        self.received_bytes = 0
        self.read_bytes = 0
        self.end: End | None = None
        self.timer: Timer | None = None
        self.waiter: Callable[[], object] | None = None

    def __repr__(self) -> str:
        way = "sent" if self.sent else "held"
        state = way if self.end is None else f"ended by {type(self.end).__name__}"
        return f"Call({type(self.request).__name__}, rid={self.rid}, {state}, next_seq={self.next_seq})"

    @property
    def ready(self) -> bool:
        """Whether the reader has something to take."""
        return bool(self.chunks) or self.end is not None

    @property
    def unread_bytes(self) -> int:
        """About how much memory the unread chunks hold."""
        return self.received_bytes - self.read_bytes

    def take(self) -> Chunk | None:
        """The next unread chunk; None when there is none. For the one reader."""
        if not self.chunks:
            return None
        chunk = self.chunks.popleft()
        self.read_bytes += weight(chunk)
        return chunk

    def put(self, chunk: Chunk) -> None:
        """Record a chunk that is in order, and wake the reader if it reads chunks."""
        self.next_seq = chunk.seq + 1
        received = self.received[chunk.index]
        received.texts.append(chunk.text)
        received.token_ids += chunk.token_ids
        if chunk.logprobs is not None:
            if received.logprobs is None:
                received.logprobs = []
            received.logprobs += chunk.logprobs
        if self.chunks is not None:
            self.received_bytes += weight(chunk)
            self.chunks.append(chunk)
            self.wake()

    def finish(self, end: End) -> None:
        """Nothing more will come; wake the reader."""
        if self.timer is not None:
            self.timer.cancel()
        self.end = end
        self.wake()

    def wake(self) -> None:
        """Call the waiter, once."""
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            waiter()


def weight(chunk: Chunk) -> int:
    """About how many bytes an unread chunk holds."""
    size = CHUNK_BYTES + len(chunk.text) + len(chunk.token_ids)
    if chunk.logprobs is not None:
        size += LOGPROB_BYTES * sum(1 + len(entry.top) for entry in chunk.logprobs)
    return size
