"""What an engine makes: sequences of token ids that grow, and how their tokens come from its thread to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch

from .guided import Guide
from .sampling import Likelihood, Sampler, likelihood

_SPARE = 64
"""Ids that a sequence's tensor has room for beyond those it has."""


class Token(NamedTuple):
    """One that was made. `likelihood`: if it was asked for."""

    token_id: int
    likelihood: Likelihood | None = None


class TokenSequence:
    """`prompt` and an answer of which `made` is there already, until an id of `ends` comes or the answer has `max_tokens` ids.

    `logprobs`: how many of the likeliest tokens to tell with each; None: no likelihoods. `receive` gets each token, or at last
    what went wrong, on the event loop that was running when this was made. Its engine appends to `ids`, on its own thread;
    `wanted` turns false on the event loop, and nothing is received after that. `cached_tokens` of `ids` were found computed by
    the engine; below 0: it has not begun with them. `trials`: how often the batch broke with it. `request`: what it is one of the
    answers to; those of one request have one turn together. `guide`: holds the answer to a form.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        made: Sequence[int],
        sampler: Sampler,
        receive: Callable[[Token | Exception], None],
        *,
        ends: Collection[int] = (),
        max_tokens: int | None = None,
        logprobs: int | None = None,
        request: object = None,
        guide: Guide | None = None,
    ) -> None:
        self.ids = [*prompt, *made]
        self.ends = ends
        self.receive = receive
        self.request = self if request is None else request
        self.loop = asyncio.get_running_loop()
        self.wanted = True
        self.cached_tokens = 0
        self.trials = 0
        self._most = None if max_tokens is None else len(prompt) + max_tokens
        self._prompt_tokens = len(prompt)
        self._sampler = sampler
        self._guide = guide
        self._logprobs = logprobs
        self._tensor: torch.Tensor | None = None
        self._copied = 0

    def __repr__(self) -> str:
        return f"TokenSequence({len(self.ids)} ids, {'wanted' if self.wanted else 'not wanted'})"

    @property
    def room(self) -> int | None:
        """Tokens that may still come; None: no bound."""
        return None if self._most is None else self._most - len(self.ids)

    @property
    def plain(self) -> bool:
        """Whether the next token is the likeliest and nothing else is to be told of it: `choose` need not be asked."""
        return self._sampler.plain and self._logprobs is None and self._guide is None

    def choose(self, logits: torch.Tensor) -> Token:
        """The next token, from `logits` (1, vocabulary), which stay as they are.

        What a form leaves out has no probability, in what is told of the likeliest too. Where it leaves nothing but the answer's end,
        that comes, whatever else was asked for.
        """
        over = False
        if self._guide is not None:
            logits, over = self._guide.mask(self.ids[self._prompt_tokens :], logits)
        token_id = int(logits.argmax()) if over else self._sampler.pick(self._as_tensor(logits.device), logits)
        return Token(token_id, None if self._logprobs is None else likelihood(logits, token_id, self._logprobs))

    def add(self, token: Token) -> bool:
        """Append it; returns whether the sequence is complete."""
        self.ids.append(token.token_id)
        return token.token_id in self.ends or len(self.ids) == self._most

    def _as_tensor(self, device: torch.device) -> torch.Tensor:
        """The ids, (1, n). Only what is new since the last time is copied."""
        length = len(self.ids)
        tensor = self._tensor
        if tensor is None or tensor.shape[1] < length:
            self._tensor = tensor = torch.zeros((1, 2 * length + _SPARE), dtype=torch.long, device=device)
            self._copied = 0
        tensor[0, self._copied : length] = torch.tensor(self.ids[self._copied :], device=device)
        self._copied = length
        return tensor[:, :length]


class SequenceEngine(Protocol):
    """A thread that makes the tokens of all sequences.

    `on_death`: what to call, from that thread, if it notices that it can make no more.
    """

    on_death: Callable[[Exception], object] | None

    def open(self, sequence: TokenSequence) -> None:
        """Begin. From any thread. Raises BackendError if it is stopping."""

    def cancel(self, sequence: TokenSequence) -> None:
        """No step for it after the present one; its memory is free then. From its event loop."""

    def age_s(self) -> float:
        """Seconds since the last step ended; 0 when there is nothing to do. From any thread."""

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread after its present step; what is still open fails."""


def hand_over(made: Iterable[tuple[TokenSequence, Token | Exception]]) -> None:
    """From an engine's thread: let all of a step be received in one turn of the event loop, so that it leaves together."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[TokenSequence, Token | Exception]]] = {}
    for sequence, what in made:
        by_loop.setdefault(sequence.loop, []).append((sequence, what))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_receive, pairs)
        except RuntimeError:  # the event loop is closed: nobody waits
            for sequence, _ in pairs:
                sequence.wanted = False


def _receive(pairs: list[tuple[TokenSequence, Token | Exception]]) -> None:
    for sequence, what in pairs:
        if sequence.wanted:
            sequence.receive(what)
