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
    `waiter`: called once when there is something to read, or the end; `on_left`: once when the request has left, or ended. Whoever waits
    sets them anew.
    `end`: how it ended: the answer, an error, or Cancel when the caller gave it up. Set after the last chunk was put into `chunks`,
    so a reader that saw an end and then no chunk has read all.
    """

    __slots__ = (
        "_joining",
        "_room_bytes",
        "chunks",
        "deadline_s",
        "end",
        "fingerprint",
        "next_seq",
        "on_left",
        "patient",
        "pause",
        "payload",
        "pinged",
        "received",
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
        self._room_bytes = 0
        self.end: End | None = None
        self.deadline_s: float | None = None
        self.timer: Timer | None = None
        self.pause: Timer | None = None
        self.recovery: Recovery | None = None
        self.waiter: Callable[[], object] | None = None
        self.on_left: Callable[[], object] | None = None

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
        return sum(map(_weight, list(self.chunks or ())))

    def take(self) -> Chunk | None:
        """The next unread chunk; None when there is none. For the one reader."""
        return self.chunks.popleft() if self.chunks else None

    def left(self) -> None:
        """The controller will get it: what of the answer is missing is to come."""
        self.there = True
        self.pinged = 0
        self.payload = b""
        self._joining = self.next_seq > 0
        if not self.sent:
            self.sent = True
            self._tell_left()

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
        seq, index, ids, chunks = chunk.seq, chunk.index, chunk.token_ids, self.chunks
        ids_bytes = len(ids)
        if seq != self.next_seq:
            return gap(self.next_seq, seq)
        if not 0 <= index < len(self.received) or ids_bytes & 3:
            return MalformedMessage(f"chunk {seq} is of no such choice ({index}), or its token ids are cut")
        if chunks is not None:
            size = CHUNK_BYTES + len(chunk.text) + ids_bytes if chunk.logprobs is None else _weight(chunk)
            # At least so much may still lie unread. Where it runs out it is counted anew, since the reader takes without a word.
            room = (self._room_bytes if chunks else buffer_bytes) - size
            if room < 0 and chunks:
                unread = self.unread_bytes
                room = buffer_bytes - unread - size
                if room < 0 and unread:
                    waits = f"{len(chunks)} chunks ({unread} bytes) of this stream wait to be read"
                    return SlowConsumer(f"{waits}, the limit is {buffer_bytes}", data={"limit_bytes": buffer_bytes})
            self._room_bytes = room
        self.next_seq = seq + 1
        received = self.received[index]
        received.texts.append(chunk.text)
        received.token_ids += ids
        if chunk.logprobs is not None:
            if received.logprobs is None:
                received.logprobs = []
            received.logprobs += chunk.logprobs
        if chunks is not None:
            chunks.append(chunk)
            if self.waiter is not None:
                self.wake()
        return None

    def finish(self, end: End) -> None:
        """Nothing more will come; wake the reader."""
        if self.timer is not None:
            self.timer.cancel()
        if self.pause is not None:
            self.pause.cancel()
        self.end = end
        self.wake()
        self._tell_left()

    def wake(self) -> None:
        """Call the waiter, once."""
        waiter = self.waiter
        if waiter is not None:
            self.waiter = None
            waiter()

    def _tell_left(self) -> None:
        on_left = self.on_left
        if on_left is not None:
            self.on_left = None
            on_left()


class Leaving:
    """The wait until a call has left, or has ended; to be waited for like a call."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call

    def __repr__(self) -> str:
        return f"Leaving({self._call!r})"

    @property
    def ready(self) -> bool:
        """Whether it is over."""
        return self._call.sent or self._call.end is not None

    @property
    def waiter(self) -> Callable[[], object] | None:
        """What is called then, once."""
        return self._call.on_left

    @waiter.setter
    def waiter(self, waiter: Callable[[], object] | None) -> None:
        self._call.on_left = waiter


def gap(expected: int, got: int) -> StreamGap:
    """The error for a chunk, or an end, that is not the next."""
    what = "a chunk came twice" if got < expected else "a chunk is missing"
    return StreamGap(f"{what}: expected seq {expected}, got {got}", data={"expected": expected, "got": got})


def _weight(chunk: Chunk) -> int:
    """About how many bytes an unread chunk holds."""
    size = CHUNK_BYTES + len(chunk.text) + len(chunk.token_ids)
    if chunk.logprobs is not None:
        size += LOGPROB_BYTES * sum(1 + len(entry.top) for entry in chunk.logprobs)
    return size
