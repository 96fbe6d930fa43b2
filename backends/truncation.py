"""Texts to embed that are cut to so many tokens."""

from __future__ import annotations

from zmqserve.errors import InvalidParameter


def check_truncation(tokens: int, special: int) -> None:
    """InvalidParameter if a text cut to so many `tokens` has none of its own beside the `special` ones. Tokenizers would not cut it."""
    if tokens <= special:
        why = f"truncate_tokens must be more than the {special} special tokens that each text gets, got {tokens}"
        raise InvalidParameter(why, data={"parameter": "truncate_tokens"})
