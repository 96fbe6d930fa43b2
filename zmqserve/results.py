"""What the SDK hands to its caller."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from .errors import MalformedMessage, ZmqserveError
from .messages import Embedding, ModelCard, ModelStatus, Timings, TokenLogprob, Usage
from .requests import Prompt

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[np.float32]


class StreamChunk(Struct, frozen=True, gc=False):
    """The next piece of an answer. `text` is new text only and may be empty; `token_ids` are the ids that came with it.

    `seq` rises by one per chunk of the request; `index` is the choice (n > 1); `logprobs`: one entry per id, when asked for.
    """

    text: str
    token_ids: list[int]
    seq: int
    index: int = 0
    logprobs: list[TokenLogprob] | None = None


class CompletionChoice(Struct, frozen=True):
    """One of the `n` answers. `finish_reason` is ``stop``, ``length`` or ``cancelled``."""

    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


class Completion(Struct, frozen=True):
    """A whole answer. `timings` are the worker's, in ms; `resumed`: how often it went on
    elsewhere after its worker or controller was lost.
    """

    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings
    resumed: int = 0

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first choice's ids."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended: ``stop``, ``length`` or ``cancelled``."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """The first choice's, one entry per id, when asked for."""
        return self.choices[0].logprobs


class MapResult(Struct, frozen=True):
    """What became of one prompt of a `map`: its `index` among the prompts (from 0), and the answer or the `error` that ended it."""

    index: int
    prompt: Prompt
    answer: Completion | None = None
    error: ZmqserveError | None = None

    @property
    def completion(self) -> Completion:
        """The answer; raises the error if it ended with one."""
        if self.answer is None:
            raise self.error or RuntimeError("neither an answer nor an error")
        return self.answer

    @property
    def text(self) -> str:
        """The answer's text (of its first choice); raises as `completion`."""
        return self.completion.text


class ServedModel(Struct, frozen=True):
    """A model that the controller serves. `card` is its worker's word on it, the rest the controller's.

    `state` is ``ready`` or ``loading``; `slots` and `running` are sums over `workers`; `waiting` are requests in the queue.
    """

    card: ModelCard
    state: str
    workers: list[str]
    running: int
    waiting: int
    slots: int

    @property
    def name(self) -> str:
        """What clients ask for."""
        return self.card.name

    @property
    def context_length(self) -> int:
        """In tokens, prompt and completion together; 0 when there is no bound."""
        return self.card.context_length

    @property
    def aliases(self) -> Sequence[str]:
        """Other names that it answers to."""
        return self.card.aliases


def served(status: ModelStatus) -> ServedModel:
    """The caller's view of a ModelStatus."""
    return ServedModel(status.card, status.state, status.workers, status.running, status.waiting, status.slots)


def array_of(reply: Embedding, count: int) -> Array:
    """The vectors of `count` texts: float32, of shape (count, dimensions). Raises MalformedMessage if it is not that."""
    import numpy as np

    rows, columns = reply.shape
    if reply.dtype != "float32" or rows != count or columns < 0 or len(reply.data) != rows * columns * 4:
        what = f"{len(reply.data)} bytes of {reply.dtype} for {rows} x {columns}"
        raise MalformedMessage(f"the embedding of {count} texts is not one: {what}")
    return np.frombuffer(reply.data, dtype="<f4").reshape(rows, columns).astype(np.float32, copy=True)
