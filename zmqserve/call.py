"""One open request as its client sees it: what has come, what was read, how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from .errors import MalformedMessage, SlowConsumer, StreamGap, ZmqserveError
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

if TYPE_CHECKING:
    from .recovery import Recovery

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

    `received`: the answer so far, per choice. Together with `next_seq` and `fingerprint` (the model's) it is all that a resume needs.
    `resumed`: how often the answer went on after its worker or controller was lost. `resume`, `retries`, `patient`: what the caller allows.
    `chunks`: what the reader has not taken yet; None when it only wants the whole.
    `sent`: it has left, if only to a controller that was lost; `there`: the present controller has it. `pinged`: the first Ping that
    told it to that one, by number.
    `payload`: its bytes, while it waits to be sent. `round_ends`: how many endpoints have not answered when it is given up.
    `waiter`: called once when the request has left, when there is something to read, or the end; whoever waits sets it anew.
    `end`: how it ended: the answer, an error, or Cancel when the caller gave it up. Set after the last chunk was put into `chunks`,
    so a reader that saw an end and then no chunk has read all.
    """

    __slots__ = (
        "_joining",
        "chunks",
        "deadline_s",
        "end",
        "fingerprint",
        "next_seq",
        "patient",
        "pause",
        "payload",
        "pinged",
        "read_bytes",
        "received",
        "received_bytes",
        "recovery",
        "request",
        "resume",
        "resumed",
        "retries",
        "rid",
        "round_ends",
        "sent",
        "there",
        "timer",
        "waiter",
    )

    def __init__(
        self, request: ClientRequest, payload: bytes, *, collect: bool, resume: bool = True, retries: int = 0, patient: bool = False
    ) -> None:
        self.request = request
        self.payload = payload
        self.rid = request.rid
        self.resume = resume
        self.retries = retries
        self.patient = patient
        self.sent = self.there = False
        self.pinged = 0
        self.round_ends = 0
        self.next_seq = 0
        self.fingerprint: str | None = None
        self.resumed = 0
        self._joining = False
        choices = request.params.n if isinstance(request, Generate) else 0
        self.received = [Received() for _ in range(choices)]
        self.chunks: deque[Chunk] | None = None if collect else deque()
        # Two counters with one writer each: the session adds to the one and the reader to the other, so neither needs a lock.
        self.received_bytes = 0
        self.read_bytes = 0
        self.end: End | None = None
        self.deadline_s: float | None = None
        self.timer: Timer | None = None
        self.pause: Timer | None = None
        self.recovery: Recovery | None = None
        self.waiter: Callable[[], object] | None = None

    def __repr__(self) -> str:
        way = "sent" if self.there else "held"
        state = way if self.end is None else f"ended by {type(self.end).__name__}"
        return f"Call({type(self.request).__name__}, rid={self.rid}, {state}, next_seq={self.next_seq}, resumed={self.resumed})"

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

    def left(self) -> None:
        """The controller will get it: what of the answer is missing is to come."""
        self.there = True
        self.pinged = 0
        self.payload = b""
        self._joining = self.next_seq > 0
        if not self.sent:
            self.sent = True
            self.wake()

    def begin(self, now: float, fingerprint: str | None) -> bool:
        """The first word of a worker has come. False when it is not of the model that began the answer."""
        if self.recovery is not None:
            self.recovery.going_on(now)
        if self._joining:
            self._joining = False
            self.resumed += 1
        if self.fingerprint is None:
            self.fingerprint = fingerprint
        return fingerprint is None or fingerprint == self.fingerprint

    def put(self, chunk: Chunk, buffer_bytes: int) -> ZmqserveError | None:
        """Record a chunk, and wake the reader if it reads chunks. Returns what is wrong with it instead: it is not the next one, not one
        at all, or more than may lie unread."""
        if chunk.seq != self.next_seq:
            return gap(self.next_seq, chunk.seq)
        if not 0 <= chunk.index < len(self.received) or len(chunk.token_ids) & 3:
            return MalformedMessage(f"chunk {chunk.seq} is of no such choice ({chunk.index}), or its token ids are cut")
        if self.chunks and self.unread_bytes + weight(chunk) > buffer_bytes:
            unread = f"{len(self.chunks)} chunks ({self.unread_bytes} bytes) of this stream wait to be read"
            return SlowConsumer(f"{unread}, the limit is {buffer_bytes}", data={"limit_bytes": buffer_bytes})
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
        return None

    def finish(self, end: End) -> None:
        """Nothing more will come; wake the reader."""
        for timer in (self.timer, self.pause):
            if timer is not None:
                timer.cancel()
        self.end = end
        self.wake()

    def wake(self) -> None:
        """Call the waiter, once."""
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            waiter()


def gap(expected: int, got: int) -> StreamGap:
    """The error for a chunk, or an end, that is not the next."""
    what = "a chunk came twice" if got < expected else "a chunk is missing"
    return StreamGap(f"{what}: expected seq {expected}, got {got}", data={"expected": expected, "got": got})


def weight(chunk: Chunk) -> int:
    """About how many bytes an unread chunk holds."""
    size = CHUNK_BYTES + len(chunk.text) + len(chunk.token_ids)
    if chunk.logprobs is not None:
        size += LOGPROB_BYTES * sum(1 + len(entry.top) for entry in chunk.logprobs)
    return size
