"""The jobs that a bridge has at the network: asked, asked again when it was away, until each has its result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import inf
from random import Random
from time import monotonic
from typing import Any

from . import bridge_results
from .bridge_jobs import Envelope, Job
from .errors import Unauthenticated, UnknownModel, ZmqserveError
from .liveness import Agenda, Backoff, Timer
from .logs import Logger
from .polled import Asked, Pending, PolledClient, PolledStream

log = Logger("zmqserve.bridge")
FIRST_PAUSE_S, MOST_PAUSE_S = 0.1, 5.0
"""Pauses before a job is asked once more."""


class _Run:
    """One job under way. `began`: a piece of its answer was given, so it cannot be asked again."""

    __slots__ = ("asked", "began", "deadline_s", "envelope", "job", "number", "pauses")

    def __init__(self, number: int, envelope: Envelope, job: Job, deadline_s: float) -> None:
        self.number, self.envelope, self.job, self.deadline_s = number, envelope, job, deadline_s
        self.asked: Asked | None = None
        self.began = False
        self.pauses: Backoff | None = None

    def __repr__(self) -> str:
        return f"_Run({self.number}, {self.asked!r})"


class Runs:
    """Jobs by the client's requests. `put(number, message, last=...)` takes what comes of each.

    Errors that may pass are no results: the job is asked again until its deadline, however long that takes without one. So is a model
    that nobody serves if it is `model`, the bridge's own, or has been served before. After `end_patience` they are results after all.
    """

    def __init__(
        self, client: PolledClient, put: Callable[..., None], counters: Counter[str], *, model: str | None, timeout_s: float | None
    ) -> None:
        self._patient = True
        self._client = client
        self._put = put
        self._counters = counters
        self._timeout_s = timeout_s
        self._served = set() if model is None else {model}
        self._asked: dict[int, _Run] = {}
        self._paused: dict[_Run, tuple[Timer, ZmqserveError]] = {}
        self._agenda = Agenda()
        self._random = Random()
        self._waits = False

    def __repr__(self) -> str:
        return f"Runs({len(self._asked)} asked, {len(self._paused)} paused)"

    def __len__(self) -> int:
        return len(self._asked) + len(self._paused)

    def begin(self, now: float, number: int, envelope: Envelope, job: Job) -> None:
        """Ask for one more."""
        timeout_s = self._timeout_s if job.timeout_s is None else job.timeout_s
        self._ask(now, _Run(number, envelope, job, inf if timeout_s is None else now + timeout_s))

    def refuse(self, number: int, envelope: Envelope, error: ZmqserveError) -> None:
        """The result of what is no job, or of one that failed."""
        self._counters["errors"] += 1
        log.info("job failed", job=bytes(envelope.id)[:100].decode(errors="replace"), error=type(error).__name__, why=error.message)
        self._put(number, bridge_results.of_error(envelope, error), last=True)

    def end_patience(self) -> None:
        """From now on no job is asked again: those that wait for that end with the error that they have."""
        self._patient = False
        paused, self._paused = self._paused, {}
        for run, (timer, error) in paused.items():
            timer.cancel()
            self.refuse(run.number, run.envelope, error)

    def process(self, now: float) -> None:
        """Read what has come and do what is due."""
        self._agenda.run(now)
        for asked in self._client.process():
            run = self._asked.get(asked.rid)
            if run is not None:
                self._read(now, run)

    def wait_s(self) -> float:
        """After how many seconds `process` is due, if nothing comes before."""
        due_s, wait_ms = self._agenda.next_s(), self._client.wait_ms()
        return min(inf if due_s is None else max(0.0, due_s - monotonic()), inf if wait_ms is None else wait_ms / 1000)

    def _ask(self, now: float, run: _Run) -> None:
        client, job = self._client, run.job
        options: dict[str, Any] = dict(job.options) if job.ask == "texts" else {"stream": job.stream, **job.options}
        if run.deadline_s < inf:
            options["timeout_s"] = max(0.001, run.deadline_s - now)
        try:
            if job.ask == "texts":
                run.asked = client.embed(job.model, job.input, **options)
            elif job.ask == "messages":
                run.asked = client.chat(job.model, job.input, **options)
            else:
                run.asked = client.generate(job.model, job.input, **options)
        except ZmqserveError as error:
            self._fail(now, run, error)
            return
        self._asked[run.asked.rid] = run
        self._read(now, run)

    def _read(self, now: float, run: _Run) -> None:
        """Take what there is for it."""
        asked = run.asked
        try:
            if isinstance(asked, PolledStream):
                while chunks := asked.take():
                    run.began = True
                    self._counters["chunks"] += len(chunks)
                    for chunk in chunks:
                        self._put(run.number, bridge_results.of_chunk(run.envelope, chunk), last=False)
                if asked.done:
                    self._end(run, bridge_results.of_answer(run.envelope, run.job.model, asked.completion))
            elif asked is not None and asked.done:
                self._end(run, self._whole(run, asked))
        except ZmqserveError as error:
            self._fail(now, run, error)

    @staticmethod
    def _whole(run: _Run, asked: Pending[Any]) -> bytes:
        result, usage, timings = asked.result(), asked.usage, asked.timings
        if run.job.ask == "texts" and usage is not None and timings is not None:
            return bridge_results.of_vectors(run.envelope, run.job.model, result, usage, timings)
        return bridge_results.of_answer(run.envelope, run.job.model, result)

    def _end(self, run: _Run, result: bytes) -> None:
        self._forget(run)
        self._counters["answers"] += 1
        self._served.add(run.job.model)
        if self._waits:
            self._waits = False
            log.info("jobs go on", waiting=len(self._paused))
        self._put(run.number, result, last=True)

    def _fail(self, now: float, run: _Run, error: ZmqserveError) -> None:
        self._forget(run)
        pause_s = self._pause_s(now, run, error)
        if pause_s is None:
            self.refuse(run.number, run.envelope, error)
            return
        self._counters["retries"] += 1
        if not self._waits:
            self._waits = True
            log.warning("jobs wait", error=type(error).__name__, why=error.message)
        self._paused[run] = self._agenda.at(now + pause_s, lambda now: self._again(now, run)), error

    def _again(self, now: float, run: _Run) -> None:
        del self._paused[run]
        self._ask(now, run)

    def _pause_s(self, now: float, run: _Run, error: ZmqserveError) -> float | None:
        """Seconds until it is asked again; None: the error is its result."""
        # A key may be allowed in a while, and that it is not is no fault of the job.
        passes = (
            error.retryable or isinstance(error, Unauthenticated) or (isinstance(error, UnknownModel) and run.job.model in self._served)
        )
        if not passes or run.began or not self._patient:
            return None
        if run.pauses is None:
            run.pauses = Backoff(FIRST_PAUSE_S, MOST_PAUSE_S, self._random)
        pause_s = max(run.pauses.next_s(), (error.retry_after_ms or 0) / 1000)
        return pause_s if now + pause_s < run.deadline_s else None

    def _forget(self, run: _Run) -> None:
        if run.asked is not None:
            self._asked.pop(run.asked.rid, None)
