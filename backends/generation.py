"""One answer in the making: its tokens, its key-value cache, its sampler and its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zmqserve.jobs import Delta
from zmqserve.messages import Resume, unpack_ids
from zmqserve.params import SamplingParams
from zmqserve.resuming import reread
from zmqserve.stopping import StopMatcher

from .checkpoint import Checkpoint
from .detokenize import Detokenizer
from .sampling import Sampler

PROMPT_PIECE = 512
"""Tokens of a prompt that are taken in one step: a long prompt keeps others waiting for a piece, not for the whole."""


class Generation:
    """Makes an answer of at most `max_tokens` tokens (None: until it ends by itself) to the ids `prompt`, a token a step.

    `echo` is text that comes before the answer. The token that ends the answer is among the ids and has no text.
    `resume`: go on after what was received of it already, which is taken like a prompt. Raises InvalidParameter if that cannot be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int | None,
        *,
        echo: str = "",
        resume: Resume | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else checkpoint.eos)
        self._sampler = Sampler(params, len(prompt), self._ends, checkpoint.device)
        self._text = Detokenizer(checkpoint.decode, prompt, checkpoint.special_ids if params.skip_special_tokens else ())
        self._stop = StopMatcher(params.stop)
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self._made = 0
        # Text that leaves with the next token.
        self._late = echo
        self._complete: str | None = None
        received: list[int] = []
        if resume is not None:
            received = unpack_ids(resume.token_ids)
            self._late, self._complete = reread(resume, self._read, echo)
        self._ids = torch.tensor([[*prompt, *received]], device=checkpoint.device)
        self._taken = 0
        self._cache: Any = None

    def __repr__(self) -> str:
        return f"Generation({self._made} tokens made, {self._taken} of {self._ids.shape[1]} taken)"

    @torch.inference_mode()
    def step(self) -> Delta | None:
        """Take a piece of the prompt, or the last token, and make the next. None while there is more of the prompt."""
        if self._complete is not None:
            return Delta(self._late, finish_reason=self._complete)
        piece = self._ids[:, self._taken : self._taken + PROMPT_PIECE]
        logits, self._cache = self._checkpoint.forward(piece, self._cache)
        self._taken += piece.shape[1]
        if self._taken < self._ids.shape[1]:
            return None
        token_id = self._sampler.pick(self._ids, logits)
        self._ids = torch.cat([self._ids, self._ids.new_tensor([[token_id]])], dim=1)
        text, reason = self._read(token_id)
        text, self._late = self._late + text, ""
        return Delta(text, (token_id,), finish_reason=reason)

    def _read(self, token_id: int) -> tuple[str, str | None]:
        """The answer's next token: the text that may leave with it, and why the answer ends with it, if it does."""
        self._made += 1
        reason = None
        if token_id in self._ends:
            reason, piece = "stop", ""
        else:
            piece = self._text.feed(token_id)
            if self._made == self._max_tokens:
                reason = "length"
        if reason is not None:
            piece += self._text.flush()
        if self._made <= self._min_tokens:
            return piece, reason
        text, stopped = self._stop.feed(piece)
        if stopped:
            return text, "stop"
        return (text, None) if reason is None else (text + self._stop.flush(), reason)
