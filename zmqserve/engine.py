"""The engine side of a worker: an event loop in its own thread, where backends run. Sockets and heartbeats are elsewhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from .admission import admit
from .answers import Answer, Job
from .errors import MalformedMessage
from .lane import Gather, Lane, Outbound, Turn
from .logs import Logger
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

if TYPE_CHECKING:
    from .worker import BaseModelWorker

log = Logger("zmqserve.worker")
STOP_WAIT_S = 2.0
"""How long what is cancelled at the end may take to clean up."""

_requests = decoder(Request)


class Engine(threading.Thread):
    """Answers requests with a backend's methods, each in a task; one that fails, fails alone.

    `call` is how the socket thread reaches it. `on_crash` gets what broke the loop itself; `on_end` is called last, on the thread.
    """

    def __init__(
        self, worker: BaseModelWorker, out: Outbound, on_crash: Callable[[BaseException], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(name=f"{worker.name} engine", daemon=True)
        self.cards: Mapping[str, ModelCard] = {}
        self._worker = worker
        self._out = out
        self._on_crash = on_crash
        self._on_end = on_end
        self._loop = asyncio.new_event_loop()
        self._turn = Turn(self._loop.call_soon, out.wake)
        self._stopping = asyncio.Event()
        self._lanes: set[Lane] = set()

    def call(self, calls: list[tuple[Any, ...]]) -> None:
        """Run each ``(function, *arguments)``, in order, on the loop. From any thread; harmless when the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._run_calls, calls)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _run_calls(self, calls: list[tuple[Any, ...]]) -> None:
        for function, *arguments in calls:
            function(*arguments)

    def run(self) -> None:
        """The thread."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            log.exception("engine crashed", worker=self._worker.name)
            self._on_crash(error)
        finally:
            self._on_end()

    async def _main(self) -> None:
        await self._stopping.wait()
        answers = [answer for lane in self._lanes for answer in lane.answers.values()]
        tasks = [answer.task for answer in answers if answer.task is not None]
        for answer in answers:
            self.stop(answer, "aborted")
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_WAIT_S)

    def halt(self) -> None:
        """End the loop and what still runs in it. From any thread."""
        self.call([(self._stopping.set,)])

    def age_s(self) -> float:
        """Seconds since anything was made."""
        return max(0.0, time.monotonic() - self._turn.stepped_s)

    def rouse(self) -> None:
        """The first request after idle time: what came before says nothing about this one. From the socket thread."""
        self._turn.stepped_s = time.monotonic()

    # --- on the loop --------------------------------------------------------------------------

    def request(self, lane: Lane, head: ControllerHead, payload: bytes, slot: bool, arrived_s: float) -> None:
        """Begin to answer."""
        self._lanes.add(lane)
        gather = lane.gathers.get(head.client) or Gather(lane, head.client, self._turn)
        answer = Answer(gather, head, slot=slot, arrived_s=arrived_s, worker=self._worker.name)
        try:
            if not lane.alive:
                self.stop(answer, "aborted")
                return
            request: Request = read(_requests, payload)
            if request.rid != head.rid:
                raise MalformedMessage(f"the request is {request.rid}, its head says {head.rid}")
            card = admit(request, self.cards, self._worker.backend, self._worker.honours)
            deadline_s = None
            if head.deadline_ms is not None:
                deadline_s = arrived_s + head.deadline_ms / 1000
                answer.timer = self._loop.call_at(deadline_s, self.stop, answer, "deadline")
            if isinstance(request, Generate):
                self._worker.begin(Job(request, answer, deadline_s, card.fingerprint))
            else:
                self.spawn(answer, self._answer_once, answer, request, card)
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
            self._worker.abandon(answer.job)
        answer.settle()

    def spawn(self, answer: Answer, function: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Answer in a task. An exception of `function` is the answer's."""
        answer.task = self._loop.create_task(self._guard(answer, function, arguments))

    async def _guard(self, answer: Answer, function: Callable[..., Awaitable[None]], arguments: tuple[Any, ...]) -> None:
        answer.started = True
        try:
            await function(*arguments)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - the same
            if answer.stopped is None:
                answer.fail(error)
        if answer.stopped is not None:
            answer.settle()

    async def drive(self, job: Job) -> None:
        """Take a backend's deltas one by one."""
        lane = job.answer.gather.lane
        deltas = self._worker.generate(job)
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
            vectors = await self._worker.embed(request)
            usage = Usage(vectors.prompt_tokens, 0)
            message = Embedding(rid, "float32", vectors.shape, vectors.data, usage, answer.timings())
            answer.done("ok", message, vectors.prompt_tokens)
        elif isinstance(request, CountTokens):
            answer.done("ok", Tokens(rid, await self._worker.count_tokens(request), card.context_length))
        else:
            answer.done("ok", Details(rid, await self._worker.model_details(request)))
