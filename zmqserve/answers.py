"""What goes back for a request: its chunks and exactly one end, in the order FIRST < MORE < DONE. On the engine's event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from struct import Struct
from typing import Protocol

import msgspec

from .errors import BackendError, DeadlineExceeded, GoingAway, OutOfMemory, Unauthenticated, ZmqserveError
from .jobs import Delta, GenerateJob
from .lane import Gather, clean, encoded
from .logs import Logger
from .messages import (
    DONE,
    FAILED,
    FIRST,
    Choice,
    Chunk,
    ControllerHead,
    Done,
    Error,
    FirstChunk,
    Generate,
    Reply,
    Timings,
    TokenLogprob,
    Usage,
    WorkerHead,
    encode,
    pack_ids,
)

log = Logger("zmqserve.worker")
CANCELLED = "cancelled"
MAX_ERROR_CHARACTERS = 500
CHUNK_BYTES = 100
"""More than what a chunk, or a token's logprob, takes in a message besides its text and its ids."""
LOGPROB_BYTES = 4
"""Less than what one takes besides its text, whatever its numbers are."""
_pack_one = Struct("<I").pack
_check_error = msgspec.msgpack.Decoder(Error).decode


class Cancellable(Protocol):
    """A timer or a task."""

    def cancel(self) -> object: ...


class Due:
    """Answers whose time is up in the same `step`. They leave it with their end; `emptied` is told when the last one has."""

    __slots__ = ("_emptied", "answers", "step", "timer")

    def __init__(self, step: int, emptied: Callable[[Due], None]) -> None:
        self.step = step
        self.answers: dict[Answer, None] = {}
        self.timer: Cancellable | None = None
        self._emptied = emptied

    def __repr__(self) -> str:
        return f"Due(step={self.step}, {len(self.answers)} answers)"

    def leave(self, answer: Answer) -> None:
        """It has ended."""
        self.answers.pop(answer, None)
        if not self.answers:
            self._emptied(self)


class Answer:
    """One request in progress: to whom it goes, since when, and how it ends. Just one DONE or FAILED leaves.

    `slot`: whether it holds one; `share`: the model, of whose few slots it is one, or empty.
    `stopped` says why it must end early, once that is so: ``cancelled``, ``deadline`` or ``aborted`` (nobody waits for it).
    `due`: those that have the same deadline; it leaves them with its end.
    """

    __slots__ = ("arrived_s", "due", "ended", "gather", "head", "job", "share", "slot", "started", "stopped", "task", "worker")

    def __init__(self, gather: Gather, head: ControllerHead, *, slot: bool, share: str = "", arrived_s: float, worker: str) -> None:
        self.gather = gather
        self.head = head
        self.slot = slot
        self.share = share
        self.arrived_s = arrived_s
        self.worker = worker
        self.job: Job | None = None
        self.task: Cancellable | None = None
        self.due: Due | None = None
        self.started = False
        self.ended = False
        self.stopped: str | None = None
        lane = gather.lane
        lane.answers[head.client, head.rid] = self
        lane.gathers[head.client] = gather
        gather.users += 1

    def __repr__(self) -> str:
        return f"Answer(rid={self.head.rid}, client={self.head.client}, {'ended' if self.ended else self.stopped or 'running'})"

    def timings(self, first_s: float = 0.0) -> Timings:
        """As they are now; `first_s` is when the first chunk was made."""
        now = self.gather.turn.now()
        first_ms = 1000 * ((first_s or now) - self.arrived_s)
        return Timings(self.worker, self.head.queue_ms, first_ms, 1000 * (now - self.arrived_s))

    def done(self, outcome: str, message: msgspec.Struct, prompt_tokens: int = 0, completion_tokens: int = 0) -> None:
        """End with `message`."""
        payload = encoded(message)
        try:
            self.check_size(len(payload))
        except BackendError as error:
            self.fail(error)
        else:
            self._end(DONE, payload, outcome, 0, prompt_tokens, completion_tokens)

    def check_size(self, size_bytes: int) -> None:
        """Raise BackendError for what is too long for one message: its controller would drop the connection."""
        limit = self.gather.lane.message_bytes
        if size_bytes > limit:
            raise BackendError(f"the answer is {size_bytes} bytes long, over the limit of {limit} bytes a message: ask for less at a time")

    def fail(self, exception: BaseException) -> None:
        """End with an error. One that is not of zmqserve becomes a BackendError that names it, and is logged."""
        job = self.job
        used = (job.prompt_tokens, job.completion_tokens) if job is not None else (0, 0)
        error = _typed(exception)
        if error is not exception:
            log.error("request failed", worker=self.worker, rid=self.head.rid, exc_info=exception)
        message = Error(self.head.rid, error.code, error.message, error.retryable, error.retry_after_ms, dict(error.data))
        plain = Error(self.head.rid, error.code, clean(str(error.message)), bool(error.retryable))
        try:
            payload = encode(message)
            _check_error(payload)
        except (TypeError, UnicodeEncodeError, OverflowError, RecursionError, msgspec.ValidationError):
            payload = encode(plain)  # a backend may have put anything into it, and its client must be able to read it
        if len(payload) > self.gather.lane.message_bytes:
            payload = encode(msgspec.structs.replace(plain, message=_short(plain.message)))
        self._end(FAILED, payload, "", error.code, *used)

    def settle(self) -> None:
        """End as `stopped` says, if it has not ended."""
        if self.ended:
            return
        job = self.job
        if self.stopped == "deadline":
            limit_ms = self.head.deadline_ms
            self.fail(DeadlineExceeded(f"the deadline passed on worker {self.worker}, {limit_ms} ms after it got the request"))
        elif self.stopped == "aborted":
            self._end(0, b"", "", 0, 0, 0)
        elif job is not None:
            job.finish(CANCELLED)
        else:
            self.done(CANCELLED, Done(self.head.rid, 0, [CANCELLED], Usage(0, 0), self.timings()))

    def _end(self, kind: int, payload: bytes, outcome: str, code: int, prompt_tokens: int, completion_tokens: int) -> None:
        if self.ended:
            return
        self.ended = True
        self.job = None  # a job has its answer: a cycle would wait for the garbage collector
        if self.due is not None:
            self.due.leave(self)
        head, gather = self.head, self.gather
        lane = gather.lane
        gather.flush()
        if self.slot and self.stopped is None:  # what it lets go of, or does beside its engine, is not made by that
            gather.turn.stepped_s = gather.turn.now()
        lane.answers.pop((head.client, head.rid), None)
        gather.users -= 1
        if not gather.users:
            lane.gathers.pop(head.client, None)
        if kind and lane.alive:
            used = (max(0, prompt_tokens), max(0, completion_tokens))
            lane.post(encode(WorkerHead(kind, lane.epoch, head.client, head.rid, outcome, code, *used)), payload, self)
        else:
            lane.post(b"", b"", self)
        lane.out.wake()


class Job(GenerateJob):
    """A GenerateJob and the way to answer it: `emit` each delta, then `finish` or `fail`, all on the event loop.

    BaseModelWorker does that for a backend with `generate`. One with a step loop of its own may do it itself, from one
    callback for all jobs: see `BaseModelWorker.begin`.
    """

    __slots__ = (
        "_fingerprint",
        "_first_s",
        "_gather",
        "_last",
        "_parts",
        "_reasons",
        "_rid",
        "_seq",
        "_size_bytes",
        "_unfinished",
        "answer",
    )

    def __init__(self, request: Generate, answer: Answer, deadline_s: float | None, fingerprint: str) -> None:
        super().__init__(request, deadline_s)
        self._fingerprint = fingerprint
        resume = request.resume
        self.answer = answer
        self.completion_tokens = len(resume.token_ids) // 4 if resume is not None else 0
        self._rid = request.rid
        self._seq = resume.next_seq if resume is not None else 0
        self._gather = answer.gather
        self._first_s = 0.0
        self._last: Chunk | None = None
        self._reasons: list[str | None] = [None] * request.params.n
        self._unfinished = request.params.n
        self._size_bytes = 0
        self._parts: list[list[Chunk]] | None = None if request.stream else [[] for _ in range(request.params.n)]
        answer.job = self

    @property
    def stopped(self) -> bool:
        """Whether the answer is no longer wanted: cancelled, out of time, or given up by its controller."""
        return self.answer.stopped is not None

    @property
    def congested(self) -> bool:
        """Whether the controller takes less than is made: better make no more for it until that is over."""
        return self._gather.lane.congested

    def emit(self, delta: Delta) -> None:
        """The next piece. The piece with which the last choice finishes leaves with `finish`. Of an answer that has ended none leaves.

        Raises BackendError for a piece that is too long for a message; the job must fail with it.
        """
        if self.answer.ended:
            return
        ids = delta.token_ids
        seq = self._seq
        self._seq = seq + 1
        self.completion_tokens += len(ids)
        packed = _pack_one(ids[0]) if len(ids) == 1 else pack_ids(ids)
        chunk = Chunk(self._rid, seq, delta.index, delta.text, packed, delta.logprobs)
        if delta.finish_reason is not None and self._finished(delta):
            self._last = chunk
        if not self._first_s or self._last is not None or self._parts is not None:
            self._emit_specially(chunk)
        else:
            bound = CHUNK_BYTES + 4 * len(delta.text) + len(packed)
            if delta.logprobs is not None:
                bound += sum(map(_logprob_bound, delta.logprobs))
            gather = self._gather
            if bound > gather.most_bytes:
                bound = len(encoded(chunk)) + CHUNK_BYTES
                self.answer.check_size(bound - CHUNK_BYTES)
            gather.add(chunk, bound)

    def finish(self, reason: str = "stop") -> None:
        """The end. `reason` stands for choices that have not finished: ``stop``, ``length`` or ``cancelled``."""
        answer = self.answer
        reasons = [reason if known is None else known for known in self._reasons]
        usage = Usage(max(0, self.prompt_tokens), self.completion_tokens, max(0, self.cached_tokens))
        timings = answer.timings(self._first_s)
        message: Done | Reply
        if self._parts is None:
            last = self._last
            message = Done(self._rid, self._seq if last is None else last.seq, reasons, usage, timings, last)
        else:
            choices = [_choice(chunks, why) for chunks, why in zip(self._parts, reasons, strict=True)]
            message = Reply(self._rid, choices, usage, timings)
        answer.done(CANCELLED if CANCELLED in reasons else reasons[0], message, self.prompt_tokens, self.completion_tokens)

    def fail(self, error: Exception) -> None:
        """The end, without an answer. What was gathered leaves before it. An error that is not of zmqserve becomes a BackendError."""
        self.answer.fail(error)

    def _emit_specially(self, chunk: Chunk) -> None:
        answer = self.answer
        if not self._first_s:
            self._first_s = self._gather.turn.now()
            if self._parts is None and self._last is None:
                gather = self._gather
                gather.turn.stepped_s = self._first_s
                lane = gather.lane
                if lane.alive:
                    head = WorkerHead(FIRST, lane.epoch, answer.head.client, answer.head.rid)
                    payload = encoded(self._opening(chunk))
                    answer.check_size(len(payload))
                    lane.post(encode(head), payload)
                    lane.out.wake()
                return
        if self._parts is not None:
            self._size_bytes += _least_bytes(chunk)
            answer.check_size(self._size_bytes)
            self._parts[chunk.index].append(chunk)
            turn = self._gather.turn
            turn.stepped_s = turn.now()  # it passes nothing on before the end
        elif self._last is not chunk:
            raise RuntimeError(f"a delta of choice {chunk.index} after the last finish_reason")

    def _opening(self, chunk: Chunk) -> FirstChunk:
        return FirstChunk(chunk.rid, chunk.seq, chunk.index, chunk.text, chunk.token_ids, chunk.logprobs, self._fingerprint)

    def _finished(self, delta: Delta) -> bool:
        if self._reasons[delta.index] is not None:
            raise RuntimeError(f"choice {delta.index} has finished already")
        self._reasons[delta.index] = delta.finish_reason
        self._unfinished -= 1
        return self._unfinished == 0


def _choice(chunks: Iterable[Chunk], reason: str) -> Choice:
    chunks = list(chunks)
    logprobs: list[TokenLogprob] | None = None
    if any(chunk.logprobs is not None for chunk in chunks):
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs or ()]
    return Choice("".join(chunk.text for chunk in chunks), b"".join(chunk.token_ids for chunk in chunks), reason, logprobs)


def _least_bytes(chunk: Chunk) -> int:
    """What a piece takes at least in the message of a whole answer."""
    least = len(chunk.text) + len(chunk.token_ids)
    for entry in chunk.logprobs or ():
        least += LOGPROB_BYTES * (1 + len(entry.top)) + len(entry.text) + sum(len(other.text) for other in entry.top)
    return least


def _logprob_bound(entry: TokenLogprob) -> int:
    """More than the bytes that a token's logprob takes in a message."""
    return CHUNK_BYTES + 4 * len(entry.text) + sum(CHUNK_BYTES + 4 * len(other.text) for other in entry.top)


def _short(text: str) -> str:
    return text if len(text) <= MAX_ERROR_CHARACTERS else text[: MAX_ERROR_CHARACTERS - 3] + "..."


def _typed(error: BaseException) -> ZmqserveError:
    """What the caller is told of an exception: the error itself when it is one of ours, else its type and text."""
    if isinstance(error, ZmqserveError) and not isinstance(error, Unauthenticated | GoingAway):
        return error  # those are a controller's to say; a backend may have a client of its own that was told so
    names = {cls.__name__ for cls in type(error).__mro__}
    text = _short(f"{type(error).__name__}: {error}".rstrip(": "))
    # torch's own class is named so too: known by its name, since the core does not import torch.
    return OutOfMemory(text) if names & {"MemoryError", "OutOfMemoryError"} else BackendError(text)
