"""The tokens of one sequence, made with the model's plain forward and a key-value cache of its own."""

from __future__ import annotations

from typing import Any

import torch

from .checkpoint import Checkpoint
from .sequences import Token, TokenSequence

PROMPT_PIECE = 512
"""Tokens of a prompt that are taken in one step: a long prompt keeps others waiting for a piece, not for the whole."""


class SingleSteps:
    """Steps of a StepLoop. What the sequence has already is taken like a prompt."""

    def __init__(self, checkpoint: Checkpoint, sequence: TokenSequence) -> None:
        self._checkpoint = checkpoint
        self._sequence = sequence
        self._taken = 0
        self._cache: Any = None

    def __repr__(self) -> str:
        return f"SingleSteps({self._taken} ids taken of {self._sequence!r})"

    @torch.inference_mode()
    def step(self) -> Token | None:
        ids = self._sequence.ids
        piece = torch.tensor([ids[self._taken : self._taken + PROMPT_PIECE]], device=self._checkpoint.device)
        logits, self._cache = self._checkpoint.forward(piece, self._cache)
        self._taken += piece.shape[1]
        return self._sequence.choose(logits) if self._taken == len(ids) else None
