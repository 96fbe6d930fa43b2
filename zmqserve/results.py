"""What the SDK hands to its caller."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from .messages import ModelCard, ModelStatus, Timings, TokenLogprob, Usage


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

    `text`, `token_ids`, `finish_reason` and `logprobs` are those of the first choice.
    """

    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings
    resumed: int = 0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        return self.choices[0].logprobs


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
