"""Chooses tokens from a model's logits."""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable, Collection
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

from zmqserve.params import SamplingParams

_GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: logits divided by it would overflow."""


def draw_seed(seed: int, position: int) -> int:
    """The generator's seed for the token at `position` of an answer, from 0 on.

    A hash: torch's generator on a CPU takes only the low 32 bits of a seed, and its first draws after similar ones must not be alike.
    """
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest(), "little")


class Sampler:
    """Chooses the next token with transformers' own processors, in its own order.

    What is drawn for a token depends on the seed and on its position in the answer, and on nothing else: not on what others ask
    for meanwhile, and not on whether the tokens before it were made here.
    """

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
        self._seed = secrets.randbits(63) if params.seed is None else params.seed
        self._prompt_tokens = prompt_tokens

    def pick(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token after `ids` (1, n), from `logits` (1, vocabulary)."""
        scores = self._processors(ids, logits)
        if self.greedy:
            return int(scores.argmax(dim=-1))
        self._generator.manual_seed(draw_seed(self._seed, ids.shape[1] - self._prompt_tokens))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
