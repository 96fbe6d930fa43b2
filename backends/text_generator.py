"""What ModelWorker does with models that generate: prompts become ids on one thread, an engine's thread makes the tokens.

A request's way: its prompt becomes ids on a thread of its own (tokenizers are not for several at once), a Generation holds its
state, its model's engine makes its tokens together with those of others, and on the event loop they become text and leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from zmqserve.answers import Job
from zmqserve.errors import BackendError
from zmqserve.jobs import Delta
from zmqserve.messages import CountTokens

from .generation import Generation
from .guided import Grammar
from .loaded_model import LoadedModel

CONGESTED_WAIT_S = 0.01
"""When to look again, while a job's controller takes less than is made."""


class TextGenerator:
    """Answers `generate` and `count_tokens` with `models`, by their names, on an event loop. Close it at the end.

    The engines are its caller's to close.
    """

    def __init__(self, models: Mapping[str, LoadedModel], name: str) -> None:
        self._models = models
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{name} tokenizer")
        # Of its own: while a large schema is compiled, the prompts of others become ids.
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix=f"{name} grammars")
        # None: its prompt is still being made into ids.
        self._generations: dict[Job, Generation | None] = {}
        self._paused: dict[Job, Generation] = {}
        self._looking: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"TextGenerator({len(self._generations)} jobs, {len(self._paused)} paused)"

    def begin(self, job: Job) -> None:
        """Start to answer: see BaseModelWorker.begin."""
        model = self._model(job.request.model)
        self._generations[job] = None
        loop = asyncio.get_running_loop()
        preparing: asyncio.Future[Generation | None]
        if job.request.params.guided is None:
            preparing = loop.run_in_executor(self._tokenizing, self._prepare, job, model)
        else:
            preparing = loop.create_task(self._prepare_guided(job, model))
        preparing.add_done_callback(partial(self._prepared, job, model))

    def abandon(self, job: Job) -> None:
        """Stop it."""
        generation = self._generations.pop(job, None)
        self._paused.pop(job, None)
        if generation is not None:
            generation.stop()

    async def count_tokens(self, request: CountTokens) -> int:
        """Tokens of the prompt, special tokens or the chat template's included."""
        model = self._model(request.model)
        return len(await asyncio.get_running_loop().run_in_executor(self._tokenizing, model.encode, request))

    def waiting(self) -> int:
        """Jobs that no engine has begun with. From any thread."""
        return sum(generation is None or generation.waits for generation in tuple(self._generations.values()))

    def step_age_s(self) -> float:
        """Seconds since the engine that is latest with its step ended one; 0 when there is nothing to do. From any thread."""
        return max((model.engine.age_s() for model in tuple(self._models.values())), default=0.0)

    def close(self) -> None:
        """End the threads that prepare."""
        self._compiling.shutdown(cancel_futures=True)
        self._tokenizing.shutdown(cancel_futures=True)

    def _model(self, name: str) -> LoadedModel:
        model = self._models.get(name)
        if model is None:
            raise BackendError(f"model {name!r} is not loaded")
        return model

    async def _prepare_guided(self, job: Job, model: LoadedModel) -> Generation | None:
        loop = asyncio.get_running_loop()
        grammar = await loop.run_in_executor(self._compiling, self._compile, job, model)
        return await loop.run_in_executor(self._tokenizing, self._prepare, job, model, grammar)

    def _compile(self, job: Job, model: LoadedModel) -> Grammar | None:
        """On the grammars' thread. None as in `_prepare`."""
        guided = job.request.params.guided
        return None if guided is None or job not in self._generations else model.checkpoint.grammars.compile(guided)

    def _prepare(self, job: Job, model: LoadedModel, grammar: Grammar | None = None) -> Generation | None:
        """On the tokenizer's thread. None if nobody wants it any more: what was cancelled must not keep others waiting."""
        return model.prepare(job, grammar) if job in self._generations else None

    # --- jobs on the event loop -------------------------------------------------------------------

    def _prepared(self, job: Job, model: LoadedModel, preparing: asyncio.Future[Generation | None]) -> None:
        if preparing.cancelled():
            self._fail(job, BackendError("the worker is stopping"))
            return
        failure = preparing.exception()
        if job not in self._generations:
            return
        if failure is not None:
            self._fail(job, failure if isinstance(failure, Exception) else BackendError(repr(failure)))
            return
        generation = preparing.result()
        if generation is None:
            return
        self._generations[job] = generation
        try:
            generation.start(model.engine, partial(self._emit, job, generation))
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request
            self._fail(job, error)

    def _emit(self, job: Job, generation: Generation, made: Delta | Exception) -> None:
        if isinstance(made, Exception):
            self._fail(job, made)
            return
        try:
            job.cached_tokens = generation.cached_tokens
            job.emit(made)
            if generation.done:
                self._generations.pop(job, None)
                job.finish()
            elif job.congested and generation.settled:
                self._pause(job, generation)
        except Exception as error:  # noqa: BLE001 - the same
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if job in self._generations:
            self.abandon(job)
            job.fail(error)

    def _pause(self, job: Job, generation: Generation) -> None:
        """What is made for a controller that does not take it would pile up. In a batch nobody can wait: it leaves, and comes back."""
        generation.pause()
        self._paused[job] = generation
        self._look_later()

    def _look(self) -> None:
        """Let those go on whose controller takes more."""
        self._looking = None
        for job, generation in list(self._paused.items()):
            if not job.congested:
                del self._paused[job]
                try:
                    generation.go_on()
                except Exception as error:  # noqa: BLE001 - the same
                    self._fail(job, error)
        self._look_later()

    def _look_later(self) -> None:
        if self._paused and self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(CONGESTED_WAIT_S, self._look)
