"""Reads one answer's tokens: the text that may leave with each, and why the answer ends with it, if it does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from zmqserve.params import SamplingParams
from zmqserve.stopping import StopMatcher, StopStrings

from .detokenize import Detokenizer


class Vocabulary(Protocol):
    """What turns ids into text."""

    @property
    def special_ids(self) -> Collection[int]:
        """Ids that a reader does not want to see."""

    def decode(self, ids: list[int]) -> str:
        """Their text, special tokens included."""


class Reader:
    """Of an answer to the ids `prompt` of at most `max_tokens` tokens (None: no bound). An id of `ends` ends it and has no text.

    `stop`: those of `params`, which all answers to a request share.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        params: SamplingParams,
        ends: Collection[int],
        max_tokens: int | None,
        stop: StopStrings,
    ) -> None:
        self._ends = ends
        self._text = Detokenizer(vocabulary.decode, prompt, vocabulary.special_ids if params.skip_special_tokens else ())
        self._stop = StopMatcher(stop)
        self._min_tokens = params.min_tokens
        self._max_tokens = max_tokens
        self.count = 0

    def __repr__(self) -> str:
        return f"Reader({self.count} tokens read, {self._stop!r})"

    def read(self, token_id: int) -> tuple[str, str | None]:
        """The next token: its text and a finish reason. Nothing comes after a reason."""
        self.count += 1
        reason = None
        if token_id in self._ends:
            reason, piece = "stop", ""
        else:
            piece = self._text.feed(token_id)
            if self.count == self._max_tokens:
                reason = "length"
        if reason is not None:
            piece += self._text.flush()
        if self.count <= self._min_tokens:
            return piece, reason
        text, stopped = self._stop.feed(piece)
        if stopped:
            return text, "stop"
        return (text, None) if reason is None else (text + self._stop.flush(), reason)
