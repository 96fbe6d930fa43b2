"""What a worker's engine side does with requests, without a thread, an event loop or a clock of its own: those are passed in."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from math import ceil
from typing import Any, Protocol

from .admission import admit
from .answers import Answer, Cancellable, Due, Job
from .errors import MalformedMessage
from .jobs import Delta, GenerateJob, Vectors
from .lane import Gather, Lane, Outbound, Turn
from .messages import (
    ControllerHead,
    CountTokens,
    Details,
    Embed,
    Embedding,
    Generate,
    ModelCard,
    ModelDetails,
    Request,
    Tokens,
    Usage,
    decoder,
    read,
)

DEADLINE_STEP_S = 0.01
"""Deadlines within so much of each other share a timer of the event loop, which costs as much as decoding a request. None is early."""

_requests = decoder(Request)


class Backend(Protocol):
    """What answers: a BaseModelWorker, which says what each of these means."""

    @property
    def name(self) -> str: ...
    @property
    def backend(self) -> str: ...
    @property
    def honours(self) -> frozenset[str]: ...
    def begin(self, job: Job) -> None: ...
    def abandon(self, job: Job) -> None: ...
    def generate(self, job: GenerateJob) -> AsyncIterator[Delta]: ...
    async def embed(self, request: Embed) -> Vectors: ...
    async def count_tokens(self, request: CountTokens) -> int: ...
    async def model_details(self, request: ModelDetails) -> ModelCard: ...


class CallAt(Protocol):
    """Calls a function at a time of the desk's clock, unless its handle is cancelled before."""

    def __call__(self, when_s: float, function: Callable[..., object], /, *arguments: Any) -> Cancellable: ...


class Desk:
    """Takes requests in, lets the backend answer them, and ends them early when that is asked; one that fails, fails alone.

    `now` tells the time in seconds, monotonic; `call_at` is on the same clock. `call_soon` runs a function after what is due
    already. `spawn` runs a coroutine; the handle that it returns throws CancelledError into it. `cards` are the models, once loaded.
    """

    def __init__(
        self,
        backend: Backend,
        out: Outbound,
        *,
        now: Callable[[], float],
        call_soon: Callable[[Callable[[], None]], object],
        call_at: CallAt,
        spawn: Callable[[Coroutine[Any, Any, None]], Cancellable],
    ) -> None:
        self.cards: Mapping[str, ModelCard] = {}
        self._backend = backend
        self._now = now
        self._call_at = call_at
        self._spawn = spawn
        self._turn = Turn(call_soon, out.wake, now)
        self._lanes: set[Lane] = set()
        self._due: dict[int, Due] = {}
        self._latest: Due | None = None

    def __repr__(self) -> str:
        return f"Desk({sum(len(lane.answers) for lane in self._lanes)} answers)"

    def age_s(self) -> float:
        """Seconds since anything was made."""
        return max(0.0, self._now() - self._turn.stepped_s)

    def request(self, lane: Lane, head: ControllerHead, payload: bytes, slot: bool, share: str, arrived_s: float) -> None:
        """Begin to answer. `slot` and `share` are what the Answer holds."""
        self._lanes.add(lane)
        gather = lane.gathers.get(head.client) or Gather(lane, head.client, self._turn)
        answer = Answer(gather, head, slot=slot, share=share, arrived_s=arrived_s, worker=self._backend.name)
        try:
            if not lane.alive:
                self.stop(answer, "aborted")
                return
            request: Request = read(_requests, payload)
            if request.rid != head.rid:
                raise MalformedMessage(f"the request is {request.rid}, its head says {head.rid}")
            card = admit(request, self.cards, self._backend.backend, self._backend.honours)
            deadline_s = None
            if head.deadline_ms is not None:
                deadline_s = arrived_s + head.deadline_ms / 1000
                self._watch(answer, deadline_s)
            if isinstance(request, Generate):
                self._backend.begin(Job(request, answer, deadline_s, card.fingerprint))
            else:
                self._in_task(answer, self._answer_once, answer, request, card)
        except Exception as error:  # noqa: BLE001 - whatever a backend raises is this request's
            answer.fail(error)

    def cancel(self, lane: Lane, client: int, rid: int) -> None:
        """Stop a request, if it is still there."""
        answer = lane.answers.get((client, rid))
        if answer is not None:
            self.stop(answer, "cancelled")

    def abort(self, lane: Lane) -> None:
        """Nobody waits for what this lane answers."""
        self._lanes.discard(lane)
        for answer in list(lane.answers.values()):
            self.stop(answer, "aborted")

    def stop(self, answer: Answer, why: str) -> None:
        """End an answer early. Its slot is free when its task has really ended."""
        if answer.ended or (answer.stopped is not None and why != "aborted"):
            return
        first = answer.stopped is None
        answer.stopped = why
        if answer.task is not None and answer.started:
            if first:
                answer.task.cancel()
            return
        if answer.task is not None:
            answer.task.cancel()
        elif answer.job is not None:
            self._backend.abandon(answer.job)
        answer.settle()

    def end(self) -> list[Cancellable]:
        """Abort everything; returns the tasks, which may have something to clean up."""
        answers = [answer for lane in self._lanes for answer in lane.answers.values()]
        tasks = [answer.task for answer in answers if answer.task is not None]
        for answer in answers:
            self.stop(answer, "aborted")
        return tasks

    def drive(self, job: Job) -> None:
        """Answer with the backend's `generate`, in a task."""
        self._in_task(job.answer, self._take_deltas, job)

    def _watch(self, answer: Answer, deadline_s: float) -> None:
        """Stop it when its time is up. By then it may have ended, and left `due`."""
        step = ceil(deadline_s / DEADLINE_STEP_S)
        due = self._due.get(step)
        if due is None:
            before = self._latest
            self._latest = due = self._due[step] = Due(step, self._emptied)
            due.timer = self._call_at(step * DEADLINE_STEP_S, self._expire, due)
            if before is not None and not before.answers:
                self._emptied(before)
        due.answers[answer] = None
        answer.due = due

    def _emptied(self, due: Due) -> None:
        """A deadline may be far away: nothing is kept for it, but of the latest, which the next request may have too."""
        if due is not self._latest and self._due.get(due.step) is due:
            del self._due[due.step]
            if due.timer is not None:
                due.timer.cancel()

    def _expire(self, due: Due) -> None:
        del self._due[due.step]
        for answer in list(due.answers):
            self.stop(answer, "deadline")

    def _in_task(self, answer: Answer, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """An exception of `function` is the answer's."""
        answer.task = self._spawn(self._guard(answer, function, arguments))

    async def _guard(self, answer: Answer, function: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        answer.started = True
        try:
            await function(*arguments)
        except (Exception, CancelledError) as error:  # noqa: BLE001 - the same
            if answer.stopped is None:
                answer.fail(error)
        if answer.stopped is not None:
            answer.settle()

    async def _take_deltas(self, job: Job) -> None:
        """One by one."""
        lane = job.answer.gather.lane
        deltas = self._backend.generate(job)
        try:
            async for delta in deltas:
                if job.stopped:
                    break
                job.emit(delta)
                if lane.congested:
                    await lane.relief()
        finally:
            close = getattr(deltas, "aclose", None)
            if close is not None:
                await close()
        if not job.stopped:
            job.finish()

    async def _answer_once(self, answer: Answer, request: Embed | CountTokens | ModelDetails, card: ModelCard) -> None:
        rid = request.rid
        if isinstance(request, Embed):
            vectors = await self._backend.embed(request)
            usage = Usage(vectors.prompt_tokens, 0)
            message = Embedding(rid, "float32", vectors.shape, vectors.data, usage, answer.timings())
            answer.done("ok", message, vectors.prompt_tokens)
        elif isinstance(request, CountTokens):
            answer.done("ok", Tokens(rid, await self._backend.count_tokens(request), card.context_length))
        else:
            answer.done("ok", Details(rid, await self._backend.model_details(request)))
