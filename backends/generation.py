"""One answer in the making: its tokens, its key-value cache, its sampler and its text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from zmqserve.jobs import Delta
from zmqserve.params import SamplingParams
from zmqserve.stopping import StopMatcher

from .checkpoint import Checkpoint
from .detokenize import Detokenizer

PROMPT_PIECE = 512
"""Tokens of a prompt that are taken in one step: a long prompt keeps others waiting for a piece, not for the whole."""

_GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: logits divided by it would overflow."""


class Sampler:
    """Chooses the next token with transformers' own processors, in its own order. Draws from a generator of its own,
    so that what others ask for meanwhile doesn't change the outcome of a `seed`."""

    def __init__(self, params: SamplingParams, prompt_tokens: int, ends: Collection[int], device: torch.device) -> None:
        name = str(device)
        processors = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.min_tokens and ends:
            processors.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, params.min_tokens, sorted(ends), name))
        self.greedy = params.temperature < _GREEDY_BELOW
        if not self.greedy:
            if params.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                processors.append(TopPLogitsWarper(float(params.top_p)))
            if params.min_p > 0.0:
                processors.append(MinPLogitsWarper(float(params.min_p)))
        # transformers asks for its own alias of Tensor.
        self._processors: Callable[[Any, Any], torch.Tensor] = processors
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def pick(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token after `ids` (1, n), from `logits` (1, vocabulary)."""
        scores = self._processors(ids, logits)
        if self.greedy:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))


class Generation:
    """Makes an answer of at most `max_tokens` tokens (None: until it ends by itself) to the ids `prompt`, a token a step.

    `echo` is text that comes before the answer. The token that ends the answer is among the ids and has no text.
    """

    def __init__(
        self, checkpoint: Checkpoint, prompt: Sequence[int], params: SamplingParams, max_tokens: int | None, echo: str = ""
    ) -> None:
        self._checkpoint = checkpoint
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else checkpoint.eos)
        self._sampler = Sampler(params, len(prompt), self._ends, checkpoint.device)
        self._text = Detokenizer(checkpoint.decode, prompt, checkpoint.special_ids if params.skip_special_tokens else ())
        self._stop = StopMatcher(params.stop)
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self._echo = echo
        self._ids = torch.tensor([list(prompt)], device=checkpoint.device)
        self._taken = 0
        self._made = 0
        self._cache: Any = None

    def __repr__(self) -> str:
        return f"Generation({self._made} tokens made, {self._taken} of {self._ids.shape[1]} taken)"

    @torch.inference_mode()
    def step(self) -> Delta | None:
        """Take a piece of the prompt, or the last token, and make the next. None while there is more of the prompt."""
        piece = self._ids[:, self._taken : self._taken + PROMPT_PIECE]
        logits, self._cache = self._checkpoint.forward(piece, self._cache)
        self._taken += piece.shape[1]
        if self._taken < self._ids.shape[1]:
            return None
        token_id = self._sampler.pick(self._ids, logits)
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token_id]])], dim=1)
        self._made += 1
        text, reason = self._read(token_id)
        if self._echo:
            text, self._echo = self._echo + text, ""
        return Delta(text, (token_id,), finish_reason=reason)

    def _read(self, token_id: int) -> tuple[str, str | None]:
        """The text that may leave, and why the answer ends with this token if it does."""
        reason = None
        if token_id in self._ends:
            reason, piece = "stop", ""
        else:
            piece = self._text.feed(token_id)
            if self._made == self._max_tokens:
                reason = "length"
        if reason is not None:
            piece += self._text.flush()
        if self._made <= self._min_tokens and reason is None:
            return piece, None
        text, stopped = self._stop.feed(piece)
        if stopped:
            return text, "stop"
        return (text, None) if reason is None else (text + self._stop.flush(), reason)
