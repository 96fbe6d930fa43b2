"""EchoWorker: answers with the prompt's own words. No model, always the same: for tests, benches and integration tests.

Token k of an answer is word k of the prompt, cyclically; its id is k, its text the word, with a space before it from k = 1 on.
The words are those of the prompt, of all messages' contents in order, or of `token_ids` written as numbers. Without
`max_tokens` the answer is one pass over them and finishes with ``stop``; with it, exactly so many and ``length``.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import os
import sys
import time
from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import count
from typing import ClassVar, NoReturn, Self

from zmqserve.answers import Job
from zmqserve.errors import ContextOverflow, InvalidParameter
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.messages import CountTokens, Embed, Generate, ModelCard, Resume, pack_ids, unpack_ids
from zmqserve.params import SamplingParams
from zmqserve.resuming import invalid, reread
from zmqserve.stopping import StopMatcher, StopStrings
from zmqserve.worker import BaseModelWorker, WorkerConfig

CONGESTED_WAIT_S = 0.001
"""When to look again, while no job's controller takes more."""


class EchoWorker(BaseModelWorker):
    """A worker without a model.

    delay_first_s, delay_per_token_s: waits before the first token and before each later one. dimensions: of the vectors.
    context_length: prompt and answer together, in words; 0: no bound. faults: the words ``!die`` (the process exits at once),
    ``!hang`` (the event loop never comes back) and ``!raise`` act when they become the next token. For tests only.
    """

    backend = "echo"
    default_slots = 256
    # With one word to choose from, sampling changes nothing.
    honours: ClassVar[frozenset[str]] = frozenset(
        {"max_tokens", "min_tokens", "stop", "stop_token_ids", "n", "echo", "token_ids"}
        | {"temperature", "top_p", "top_k", "min_p", "seed", "skip_special_tokens"}
        | {"dimensions", "normalize", "truncate_tokens"}
    )
    resumes: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        config: WorkerConfig | None = None,
        *,
        delay_first_s: float = 0.0,
        delay_per_token_s: float = 0.0,
        dimensions: int = 384,
        context_length: int = 0,
        faults: bool = False,
    ) -> None:
        super().__init__(config or WorkerConfig(model="echo"))
        for name, value, least in (
            ("delay_first_s", delay_first_s, 0),
            ("delay_per_token_s", delay_per_token_s, 0),
            ("dimensions", dimensions, 1),
            ("context_length", context_length, 0),
        ):
            if not least <= value < math.inf:
                raise InvalidParameter(f"{name} must be {least} or more, got {value}", data={"parameter": name})
        self.delay_first_s = delay_first_s
        self.delay_per_token_s = delay_per_token_s
        self.dimensions = dimensions
        self.context_length = context_length
        self.faults = faults
        self._running: dict[Job, Iterator[Sequence[Delta]]] = {}
        self._scheduled = False

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument("--delay-first", type=float, default=0.0, metavar="S", help="seconds before the first token")
        parser.add_argument("--delay-per-token", type=float, default=0.0, metavar="S", help="seconds before each later token")
        parser.add_argument("--dimensions", type=int, default=384, metavar="N", help="length of the embedding vectors (default 384)")
        parser.add_argument("--context-length", type=int, default=0, metavar="N", help="words of prompt and answer (default 0: no bound)")
        parser.add_argument("--faults", action="store_true", help="let the words !die, !hang and !raise do so; for tests")

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        return cls(
            config,
            delay_first_s=args.delay_first,
            delay_per_token_s=args.delay_per_token,
            dimensions=args.dimensions,
            context_length=args.context_length,
            faults=args.faults,
        )

    def load(self) -> list[ModelCard]:
        card = ModelCard(
            self.model_name or "echo",
            fingerprint="echo-1",
            context_length=self.context_length,
            verbs=["generate", "chat", "embed", "count_tokens", "model_details"],
            embedding_dim=self.dimensions,
            source="echo",
        )
        return [card]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        steps = self._steps(job)
        resume = job.request.resume
        begun = resume is not None and resume.token_ids
        await asyncio.sleep(self.delay_per_token_s if begun else self.delay_first_s)
        for deltas in steps:
            for delta in deltas:
                yield delta
            if deltas[-1].finish_reason is None:
                await asyncio.sleep(self.delay_per_token_s)

    def begin(self, job: Job) -> None:
        """Without delays all jobs make a token in each turn of the event loop: a task per job would cost more than the token."""
        if self.delay_first_s or self.delay_per_token_s:
            super().begin(job)
            return
        # Not `if not self._running`: a step may be due although all its jobs were abandoned.
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._step)
        self._running[job] = self._steps(job)

    def abandon(self, job: Job) -> None:
        self._running.pop(job, None)

    def _step(self) -> None:
        """Make one token for each job."""
        idle = True
        for job, steps in list(self._running.items()):
            if job.congested:
                continue
            idle = False
            if not take_step(job, steps):
                del self._running[job]
        self._scheduled = bool(self._running)
        loop = asyncio.get_running_loop()
        if idle and self._running:
            loop.call_later(CONGESTED_WAIT_S, self._step)
        elif self._running:
            loop.call_soon(self._step)

    def _steps(self, job: GenerateJob) -> Iterator[Sequence[Delta]]:
        """The deltas of each token: one for each choice."""
        request, params = job.request, job.request.params
        words = _words(request)
        job.prompt_tokens = len(words)
        length, reason = self._length(request, len(words))
        if params.n == 1 and request.resume is None and not (params.stop or params.stop_token_ids or params.echo or self.faults):
            return _plain_steps(words, length, reason)
        return self._read_steps(request, words, length, reason)

    def _read_steps(self, request: Generate, words: list[str], length: int, reason: str) -> Iterator[Sequence[Delta]]:
        """Each choice's tokens are read one by one, for what may end it early."""
        params = request.params
        stop = StopStrings(params.stop)
        choices = [_Choice(params, words, length, reason, stop) for _ in range(params.n)]
        prompt = " ".join(words) + " " if params.echo else ""
        late = [prompt] * params.n
        made = 0
        if request.resume is not None:
            made = _check_ids(request.resume)
            late[0], finish = reread(request.resume, choices[0].read, prompt)
            if finish is not None:
                yield (Delta(late[0], finish_reason=finish),)
                return
        for k in range(made, length):
            word = words[k % len(words)]
            if self.faults and word in _FAULTS:
                _FAULTS[word]()
            deltas = []
            for index, choice in enumerate(choices):
                text, finish = choice.read(k)
                if late[index]:
                    text, late[index] = late[index] + text, ""
                deltas.append(Delta(text, (k,), index, None, finish))
            yield deltas
            if deltas[-1].finish_reason is not None:
                return

    async def embed(self, request: Embed) -> Vectors:
        params = request.params
        dimensions = params.dimensions or self.dimensions
        if dimensions > self.dimensions:
            text = f"dimensions must be at most {self.dimensions}, the model's own; got {dimensions}"
            raise InvalidParameter(text, data={"parameter": "dimensions"})
        rows = array("f")
        tokens = 0
        for text in request.texts:
            words = text.split()
            if params.truncate_tokens is not None:
                words = words[: params.truncate_tokens]
            self._check_context(len(words))
            tokens += len(words)
            rows.extend(_vector(" ".join(words), dimensions, unit=params.normalize is not False))
        if sys.byteorder == "big":
            rows.byteswap()
        return Vectors(rows.tobytes(), (len(request.texts), dimensions), tokens)

    async def count_tokens(self, request: CountTokens) -> int:
        return len(_words(request))

    def _length(self, request: Generate, prompt_tokens: int) -> tuple[int, str]:
        """How many tokens the answer may have, and what it means to reach that."""
        params = request.params
        if params.max_tokens is not None:
            self._check_context(prompt_tokens + params.max_tokens)
            return params.max_tokens, "length"
        length = max(prompt_tokens, params.min_tokens)
        self._check_context(prompt_tokens + max(1, params.min_tokens))
        if self.context_length and prompt_tokens + length > self.context_length:
            return self.context_length - prompt_tokens, "length"
        return length, "stop"

    def _check_context(self, tokens: int) -> None:
        if self.context_length and tokens > self.context_length:
            text = f"the request needs {tokens} tokens, the model's context has {self.context_length}"
            raise ContextOverflow(text, data={"context_length": self.context_length, "tokens": tokens})


def take_step(job: Job, steps: Iterator[Sequence[Delta]]) -> bool:
    """Make the job's next token; returns whether it goes on. What goes wrong is the job's end."""
    try:
        for delta in (deltas := next(steps)):
            job.emit(delta)
        if deltas[-1].finish_reason is None:
            return True
        job.finish()
    except Exception as error:  # noqa: BLE001 - it belongs to this job
        job.fail(error)
    return False


def _words(request: Generate | CountTokens) -> list[str]:
    if request.messages is not None:
        words = [word for message in request.messages for word in message.content.split()]
    elif request.prompt is not None:
        words = request.prompt.split()
    elif isinstance(request, Generate) and request.token_ids is not None:
        words = [str(token) for token in unpack_ids(request.token_ids)]
    else:
        words = []
    if not words:
        raise InvalidParameter("the prompt has no words: there is nothing to echo", data={"parameter": "prompt"})
    return words


def _plain_steps(words: list[str], length: int, reason: str) -> Iterator[Sequence[Delta]]:
    """The deltas of an answer that nothing ends early, one for each token."""
    last = length - 1
    if last:
        yield (Delta(words[0], (0,)),)
    pieces = [" " + word for word in words]
    for k in range(1, last):
        yield (Delta(pieces[k % len(pieces)], (k,)),)
    yield (Delta(pieces[last % len(pieces)] if last else words[0], (last,), 0, None, reason),)


class _Choice:
    """Reads one choice's tokens, one after another: the text that may leave with each, and why the answer ends with it, if it does."""

    def __init__(self, params: SamplingParams, words: list[str], length: int, reason: str, stop: StopStrings) -> None:
        self._words = words
        self._last = length - 1
        self._reason = reason
        self._min_tokens = params.min_tokens
        self._stop_ids = frozenset(params.stop_token_ids)
        self._matcher = StopMatcher(stop)

    def read(self, k: int) -> tuple[str, str | None]:
        word = self._words[k % len(self._words)]
        text = " " + word if k else word
        finish = self._reason if k == self._last else None
        if k < self._min_tokens:
            return text, finish
        ended = k in self._stop_ids
        text, stopped = self._matcher.feed("" if ended else text)
        if stopped or ended:
            finish = "stop"
        return (text, None) if finish is None else (text + self._matcher.flush(), finish)


def _check_ids(resume: Resume) -> int:
    """How many ids were received. They can only be 0, 1, 2, ..."""
    made = len(resume.token_ids) // 4
    if resume.token_ids != pack_ids(range(made)):
        raise invalid(f"token_ids must be 0 to {made - 1} here, in order: they are no beginning of this answer")
    return made


def _vector(text: str, dimensions: int, *, unit: bool) -> list[float]:
    """Numbers in [-1, 1] that depend on the text alone: SHA-256 of the text and a counter, as far as needed."""
    numbers = array("I")
    for block in count():
        if len(numbers) >= dimensions:
            break
        numbers.frombytes(hashlib.sha256(f"{block}:{text}".encode()).digest())
    if sys.byteorder == "big":
        numbers.byteswap()
    vector = [2 * number / (2**32 - 1) - 1 for number in numbers[:dimensions]]
    norm = math.sqrt(math.fsum(x * x for x in vector)) if unit else 1.0
    return [x / norm for x in vector]


def _die() -> NoReturn:
    os._exit(70)


def _hang() -> NoReturn:
    while True:
        time.sleep(3600)


def _raise() -> NoReturn:
    raise RuntimeError("the prompt said !raise")


_FAULTS = {"!die": _die, "!hang": _hang, "!raise": _raise}
