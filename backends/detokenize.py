"""Token ids to text, one at a time, so that the pieces add up to the text of the whole."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the beginning of a character to."""

_CONTEXT = 5
"""Tokens of the prompt that are decoded along: enough for a tokenizer to see that the answer is no beginning of a text."""

_MOST_HELD = 16
"""Tokens held back for the rest of a character, which has at most 4 bytes. Beyond that they are bytes of no character."""


class Detokenizer:
    """The text of an answer to the prompt with ids `prompt`. `decode` turns ids into text, those in `skipped` have none.

    A character split over tokens comes whole, with the last of them. Ids are decoded in a sliding window, since the text
    of a token may depend on the one before it; so it works with any tokenizer, at the price of two short decodes a token.
    """

    def __init__(self, decode: Callable[[list[int]], str], prompt: Sequence[int], skipped: Collection[int] = ()) -> None:
        self._decode = decode
        self._skipped = skipped
        # Ids of the window; the first `_known` of them have left, as the text `_before`.
        self._ids = [i for i in prompt[-_CONTEXT:] if i not in skipped]
        self._known = len(self._ids)
        self._before = decode(self._ids) if self._ids else ""

    def __repr__(self) -> str:
        return f"Detokenizer(held={self._ids[self._known :]})"

    def feed(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come; "" while a character is incomplete."""
        if token_id in self._skipped:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        held = len(self._ids) - self._known
        if held <= _MOST_HELD and (len(text) <= len(self._before) or text.endswith(_INCOMPLETE)):
            return ""
        new = text[len(self._before) :]
        del self._ids[: self._known]
        self._known = len(self._ids)
        self._before = self._decode(self._ids)
        return new

    def flush(self) -> str:
        """The rest of the text. An answer that ends inside a character ends before it."""
        return self._decode(self._ids)[len(self._before) :].rstrip(_INCOMPLETE) if len(self._ids) > self._known else ""
