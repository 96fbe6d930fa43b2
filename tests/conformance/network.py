"""A controller, one worker and a client: what the cases ask, and what they get."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tests.processes import Served, ServedController, eventually
from zmqserve import Client
from zmqserve.messages import TokenLogprob, Usage
from zmqserve.requests import Prompt
from zmqserve.results import Completion, StreamChunk
from zmqserve.stream import Stream

from .wire import Wire

if TYPE_CHECKING:
    from .subjects import Role, Subject


@dataclass(frozen=True)
class Answer:
    """A whole answer, and the chunks that it came in."""

    chunks: list[StreamChunk]
    completion: Completion

    @property
    def text(self) -> str:
        return self.completion.text

    @property
    def ids(self) -> list[int]:
        return self.completion.token_ids

    @property
    def reason(self) -> str:
        return self.completion.finish_reason

    @property
    def usage(self) -> Usage:
        return self.completion.usage

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """One entry per id of the first choice; empty when there are none."""
        return self.completion.logprobs or []


@dataclass(frozen=True)
class Network:
    """A running subject. Its worker never gets the parameters in `forgets`: to a case it looks like one that ignores them."""

    subject: Subject
    client: Client
    endpoint: str
    forgets: frozenset[str] = frozenset()
    _known: dict[str, Answer] = field(default_factory=dict, repr=False)

    def forgetting(self, parameter: str) -> Network:
        """The same, with a worker that ignores `parameter`."""
        return dataclasses.replace(self, forgets=self.forgets | {parameter})

    def open(self, prompt: Prompt, **params: Any) -> Stream:
        """Ask, and leave the reading to the caller."""
        stream: Stream = self.client.generate(self.subject.model, prompt, **self._heard(params))
        return stream

    def ask(self, prompt: Prompt, *, fresh: bool = False, **params: Any) -> Answer:
        """Ask and read to the end. One that must come out the same again is asked once, unless it is to be `fresh`."""
        key = repr((prompt, sorted(self._heard(params).items())))
        fixed = params.get("temperature") == 0 and "temperature" not in self.forgets
        if fixed and not fresh and key in self._known:
            return self._known[key]
        answer = read(self.open(prompt, **params))
        if fixed:
            self._known[key] = answer
        return answer

    def together(self, asked: Sequence[tuple[Prompt, dict[str, Any]]]) -> list[Answer]:
        """Ask all at once."""
        return [read(stream) for stream in [self.open(prompt, **params) for prompt, params in asked]]

    def greedy(self, prompt: Prompt, max_tokens: int, **params: Any) -> Answer:
        """The likeliest answer."""
        return self.ask(prompt, temperature=0, max_tokens=max_tokens, **params)

    def embed(self, texts: list[str], **options: Any) -> NDArray[np.float32]:
        """One row per text."""
        return self.client.embed(self.subject.model, texts, **self._heard(options))

    @contextmanager
    def wire(self) -> Iterator[Wire]:
        """A client without SDK."""
        wire = Wire(self.endpoint, self.subject.model)
        try:
            yield wire
        finally:
            wire.close()

    def _heard(self, params: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in params.items() if name not in self.forgets}


def read(stream: Stream) -> Answer:
    """Read a stream to its end."""
    chunks = list(stream)
    return Answer(chunks, stream.completion)


def ready(worker: Served, client: Client) -> bool:
    """Whether its model can be asked. AssertionError, with its log, when it has ended instead."""
    assert worker.process.poll() is None, f"the worker ended:\n{''.join(worker.output)}"
    return any(model.state == "ready" for model in client.models())


@contextmanager
def served(subject: Subject, role: Role) -> Iterator[Network]:
    """Start a controller and the subject's worker for `role`; both end with the block."""
    with subject.launch(role) as launch, ServedController() as controller:
        arguments = [*launch.arguments, "--controller", controller.workers, "--worker-name", subject.name, "--name", subject.model]
        worker = Served("worker", subject.backend, *arguments, env=dict(launch.environment))
        try:
            with Client(controller.clients) as client:  # its threads start here, and not within a test
                eventually(lambda: ready(worker, client), subject.patience_s, f"{subject.name} is ready")
                yield Network(subject, client, controller.clients)
        finally:
            worker.end(signal.SIGKILL)
