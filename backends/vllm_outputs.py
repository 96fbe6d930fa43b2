"""From vLLM's engine to the answers: what a step made for all requests is passed on in the same turn of the event loop.

vLLM puts each request's new tokens into a collector of its own, for a task that waits there. Here the collector's `put` is
replaced: it reads the tokens and emits them at once, so that no task is woken per request and step, and all of a client's
chunks of a step leave as one message. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

from zmqserve.answers import Job
from zmqserve.errors import BackendError, SlowConsumer
from zmqserve.jobs import Delta
from zmqserve.messages import TokenLogprob

from .reader import Reader

RELIEF_S = 0.005
"""How often answers that wait for a congested controller are looked at."""
PIECE_TOKENS = 256
"""Most tokens of one delta, of those that have waited."""
MOST_PILED_LOGPROBS = 20_000
"""Log probabilities of one answer that may wait for its controller; ids alone may wait to the answer's end, they are small."""

TextOf = Callable[[int], str]
ReadLogprobs = Callable[[Mapping[int, Any], int, int, TextOf], TokenLogprob]


class Choice:
    """One of a job's answers as the engine makes it. `late`: text that leaves with its next token. `ends`: ids that end it."""

    def __init__(self, reader: Reader, ends: set[int], late: str = "") -> None:
        self.reader = reader
        self.ends = ends
        self.late = late
        self.index = 0
        self.engine_id = ""
        self.over = False
        # Made and not passed on: ids, their log probabilities, and why the engine made no more.
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.reason: str | None = None

    def __repr__(self) -> str:
        return f"Choice({self.index}, {'over' if self.over else self.reader!r}, {len(self.ids)} ids wait)"


class EngineOutputs:
    """The answers that one AsyncLLM makes. When that dies they are left as they are: their worker ends, and they go on elsewhere."""

    def __init__(self, engine: Any, text_of: TextOf, read_logprobs: ReadLogprobs) -> None:
        self._engine = engine
        self._text_of = text_of
        self._read_logprobs = read_logprobs
        self._answers: dict[Job, list[Choice]] = {}
        self._names = count(1)
        self._unwanted: list[str] = []
        self._waiting: dict[Choice, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"EngineOutputs({len(self._answers)} answers, {len(self._waiting)} wait for their controller)"

    def __len__(self) -> int:
        return len(self._answers)

    async def open(self, job: Job, choices: Sequence[Choice], prompt: list[int], params: Sequence[Any], lora: Any = None) -> None:
        """Let the engine make all `choices` of `job`, each with its own vLLM `params`. Raises what vLLM raises of them."""
        if job.stopped:
            return
        self._answers[job] = list(choices)
        for index, (choice, wanted) in enumerate(zip(choices, params, strict=True)):
            choice.index = index
            asked = {"type": "token", "prompt_token_ids": prompt}
            collector = await self._engine.add_request(str(next(self._names)), asked, wanted, lora_request=lora)
            choice.engine_id = collector.request_id
            if choice.over:  # abandoned meanwhile
                self._abort([choice])
                return
            early = collector.get_nowait()
            collector.put = lambda output, job=job, choice=choice: self._put(job, choice, output)
            if early is not None:
                self._put(job, choice, early)

    def abandon(self, job: Job) -> None:
        """Make no more for it. The engine drops it before its next step."""
        choices = self._answers.pop(job, [])
        running = [choice for choice in choices if not choice.over]
        for choice in running:
            choice.over = True
            self._waiting.pop(choice, None)
        self._abort(running)

    def fail(self, job: Job, error: Exception) -> None:
        """End it with `error`."""
        self.abandon(job)
        job.fail(error)

    # --- from the engine --------------------------------------------------------------------------

    def _put(self, job: Job, choice: Choice, output: Any) -> None:
        """In place of the collector's own. It must not raise: that would end all answers."""
        # vLLM puts an exception into all collectors when the engine is dead: EngineWatch ends the worker then.
        if choice.over or isinstance(output, Exception):
            return
        try:
            self._take(job, choice, output)
        except Exception as error:  # noqa: BLE001 - it belongs to this answer
            self.fail(job, error)

    def _take(self, job: Job, choice: Choice, output: Any) -> None:
        (made,) = output.outputs
        ids = made.token_ids
        if output.num_cached_tokens:
            job.cached_tokens = min(output.num_cached_tokens, job.prompt_tokens)
        reason = made.finish_reason
        if reason is not None:
            choice.reason = _finish_reason(reason, made.stop_reason)
            if reason == "stop" and ids:
                choice.ends.add(ids[-1])
        choice.ids += ids
        most = job.request.params.logprobs
        if most is not None and ids:
            pairs = zip(made.logprobs, ids, strict=True)
            choice.logprobs += [self._read_logprobs(position, token_id, most, self._text_of) for position, token_id in pairs]
        if choice in self._waiting or job.congested:
            self._wait(job, choice)
        elif choice.ids or choice.reason is not None:
            self._pass_on(job, choice)

    def _pass_on(self, job: Job, choice: Choice) -> None:
        """Read and emit what was made, as long as the controller takes it."""
        read = choice.reader.read
        while True:
            ids = choice.ids[:PIECE_TOKENS]
            del choice.ids[:PIECE_TOKENS]
            parts = [choice.late]
            choice.late = ""
            finish = None
            for position, token_id in enumerate(ids, 1):
                text, finish = read(token_id)
                parts.append(text)
                if finish is not None:
                    del ids[position:]
                    break
            if finish is None and not choice.ids:
                finish = choice.reason
            logprobs = None
            if job.request.params.logprobs is not None:
                logprobs = choice.logprobs[: len(ids)]
                del choice.logprobs[: len(ids)]
            job.emit(Delta("".join(parts), ids, choice.index, logprobs, finish))
            if finish is not None:
                self._finished(job, choice)
                return
            if not choice.ids:
                return
            if job.congested:
                self._wait(job, choice)
                return

    def _finished(self, job: Job, choice: Choice) -> None:
        choice.over = True
        if choice.reason is None:  # a stop string: the engine does not know
            self._abort([choice])
        choices = self._answers.get(job, [])
        if all(each.over for each in choices):
            self._answers.pop(job, None)
            job.finish()

    # --- answers that wait for their controller ---------------------------------------------------

    def _wait(self, job: Job, choice: Choice) -> None:
        """The engine goes on, and what it makes waits as ids: at most the answer's length of them."""
        if len(choice.logprobs) * (1 + (job.request.params.logprobs or 0)) > MOST_PILED_LOGPROBS:
            text = f"the answer's controller takes less than is made, and more than {MOST_PILED_LOGPROBS} log probabilities wait for it"
            raise SlowConsumer(text)
        if not self._waiting:
            asyncio.get_running_loop().call_later(RELIEF_S, self._relieve)
        self._waiting[choice] = job

    def _relieve(self) -> None:
        waiting, self._waiting = self._waiting, {}
        for choice, job in waiting.items():
            if choice.over:
                continue
            try:
                if job.congested:
                    self._wait(job, choice)
                else:
                    self._pass_on(job, choice)
            except Exception as error:  # noqa: BLE001 - it belongs to this answer
                self.fail(job, error)

    # --- to the engine ----------------------------------------------------------------------------

    def _abort(self, choices: Sequence[Choice]) -> None:
        """In a later turn: vLLM may be going through its requests now."""
        ids = [choice.engine_id for choice in choices if choice.engine_id]
        if ids and not self._unwanted:
            task = asyncio.get_running_loop().create_task(self._abort_unwanted())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._unwanted += ids

    async def _abort_unwanted(self) -> None:
        ids, self._unwanted = self._unwanted, []
        with contextlib.suppress(Exception):  # only a dead engine refuses
            await self._engine.abort(ids, internal=True)


def _finish_reason(reason: str, cause: object) -> str:
    """vLLM's word as ours; BackendError for an end that is no answer's."""
    if reason in ("stop", "length"):
        return reason
    if reason == "repetition":
        return "stop"
    raise BackendError(f"vLLM ended the answer early: {reason}" + (f" ({cause})" if cause is not None else ""))
