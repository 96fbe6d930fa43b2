"""Chooses tokens from a model's logits, and tells how likely they were."""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

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

from zmqserve.errors import BackendError
from zmqserve.params import SamplingParams

_GREEDY_BELOW = 1e-5
"""A lower temperature is greedy: logits divided by it would overflow."""


class Likelihood(NamedTuple):
    """Natural logarithms of probabilities: the chosen token's, and ids with theirs of the likeliest tokens, best first."""

    logprob: float
    top: list[tuple[int, float]]


def draw_seed(seed: int, position: int) -> int:
    """The generator's seed for the token at `position` of an answer, from 0 on.

    A hash: torch's generator on a CPU takes only the low 32 bits of a seed, and its first draws after similar ones must not be alike.
    """
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest(), "little")


def choice_seed(seed: int | None, index: int) -> int | None:
    """The seed of choice `index` of a request with this one. The first choice is the answer that a request for one would get."""
    if seed is None or not index:
        return seed
    return int.from_bytes(hashlib.blake2b(struct.pack("<QQ", seed, index), digest_size=8, person=b"choice").digest(), "little") >> 1


def likelihood(logits: torch.Tensor, token_id: int, top: int) -> Likelihood:
    """Of `token_id` and of the `top` likeliest, by `logits` (1, vocabulary) before the request's own. What cannot come is not told of."""
    logprobs = logits[0].log_softmax(dim=-1)
    values, ids = logprobs.topk(min(top, logprobs.shape[0]))
    likeliest = [(i, value) for i, value in zip(ids.tolist(), values.tolist(), strict=True) if value > -math.inf]
    return Likelihood(float(logprobs[token_id]), likeliest)


class OutputPenalties:
    """Lowers the logits of tokens that the answer has: `presence` once, `frequency` for each time. The prompt does not count.

    As OpenAI defines them: https://platform.openai.com/docs/api-reference/chat/create.
    """

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self._prompt_tokens = prompt_tokens
        self._presence = presence
        self._frequency = frequency

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        made, counts = torch.unique(ids[0, self._prompt_tokens :], return_counts=True)
        scores = scores.clone()
        scores[0, made] -= self._presence + self._frequency * counts
        return scores


class Sampler:
    """Chooses the next token: transformers' own processors in its own order, with the penalties of OpenAI's interface among them.

    What is drawn for a token depends on the seed and on its position in the answer, and on nothing else: not on what others ask
    for meanwhile, and not on whether the tokens before it were made here. `plain`: it is the likeliest one, whatever was before.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int, ends: Collection[int], device: torch.device, index: int = 0) -> None:
        name = str(device)
        # transformers asks for its own alias of Tensor.
        processors: Any = LogitsProcessorList()
        if params.repetition_penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        if params.presence_penalty or params.frequency_penalty:
            processors.append(OutputPenalties(prompt_tokens, params.presence_penalty, params.frequency_penalty))
        if params.min_tokens and ends:
            processors.append(MinNewTokensLengthLogitsProcessor(prompt_tokens, params.min_tokens, sorted(ends), name))
        self.greedy = params.temperature < _GREEDY_BELOW
        self.plain = self.greedy and not processors
        if not self.greedy:
            if params.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1.0:
                processors.append(TopPLogitsWarper(float(params.top_p)))
            if params.min_p > 0.0:
                processors.append(MinPLogitsWarper(float(params.min_p)))
        self._processors: Callable[[Any, Any], torch.Tensor] = processors
        self._generator = torch.Generator(device)
        seed = choice_seed(params.seed, index)
        self._seed = secrets.randbits(63) if seed is None else seed
        self._prompt_tokens = prompt_tokens

    def pick(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """The next token after `ids` (1, n), from `logits` (1, vocabulary), which stay as they are."""
        scores = self._processors(ids, logits)
        # A draw from them would be an assertion on the GPU, which no later request of this process survives.
        if not torch.isfinite(scores.max()):
            raise BackendError("the token cannot be chosen: after the request's penalties the model's logits are not finite")
        if self.greedy:
            return int(scores.argmax(dim=-1))
        self._generator.manual_seed(draw_seed(self._seed, ids.shape[1] - self._prompt_tokens))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))
