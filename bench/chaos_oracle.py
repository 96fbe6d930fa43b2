"""What an echo worker must answer, computed apart from all of zmqserve: token k is word k of the prompt, cyclically, and its id is k."""

from __future__ import annotations

from collections.abc import Sequence


class Oracle:
    """Watches one answer of `tokens` tokens as it arrives. `wrong`: the first thing that was not as it should be; empty while all is well.

    It trusts nothing that the client checks itself: seq, ids and text are each compared with what they must be.
    """

    def __init__(self, words: Sequence[str], tokens: int) -> None:
        self.words = list(words)
        self.tokens = tokens
        self.seen = 0
        self.wrong = ""
        self._next_seq = 0

    def __repr__(self) -> str:
        return f"Oracle({self.seen}/{self.tokens} tokens{f', {self.wrong}' if self.wrong else ''})"

    def chunk(self, seq: int, text: str, token_ids: Sequence[int]) -> None:
        """The next chunk that the caller was given."""
        first = self.seen
        if seq != self._next_seq:
            self._blame(f"seq {seq} after {self._next_seq - 1}")
        for token in token_ids:
            if token != self.seen:
                kind = "duplicated" if token < self.seen else "missing"
                self._blame(f"{kind}: token {token} where {self.seen} was due")
            self.seen += 1
        if text != self.text(first, self.seen):
            self._blame(f"text {text!r} where {self.text(first, self.seen)!r} was due")
        self._next_seq = seq + 1

    def end(self, text: str, token_ids: Sequence[int], finish_reason: str, usage: tuple[int, int]) -> None:
        """The whole answer, as the caller was given it at the end. `usage`: tokens of prompt and answer."""
        if self.seen != self.tokens or list(token_ids) != list(range(self.tokens)):
            self._blame(f"ended with {self.seen} tokens streamed and {len(token_ids)} in all, {self.tokens} were due")
        if text != self.text(0, self.tokens):
            self._blame("the whole text is not what it must be")
        if finish_reason != "length":
            self._blame(f"finished by {finish_reason!r}, not by its length")
        if usage != (len(self.words), self.tokens):
            self._blame(f"usage {usage}, not {(len(self.words), self.tokens)}")

    def text(self, first: int, last: int) -> str:
        """The text of tokens `first` up to, not including, `last`."""
        return "".join(("" if k == 0 else " ") + self.words[k % len(self.words)] for k in range(first, last))

    def _blame(self, what: str) -> None:
        self.wrong = self.wrong or what
