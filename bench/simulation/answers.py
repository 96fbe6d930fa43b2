"""What each request must be answered with, computed apart from the code under test.

Echo's rule: token k of an answer is word k of the prompt, cyclically, with a space before it from k = 1 on; its id is k. It ends
after `max_tokens`, or with the token that completes a stop string, which is not part of the text.
"""

from __future__ import annotations

import hashlib
from array import array
from typing import NamedTuple

from zmqserve.messages import CountTokens, Embed, Generate

DIMENSIONS = 4
"""Of the vectors that simulated workers make."""


class Expected(NamedTuple):
    """A whole answer to a Generate: packed ids, text, how it ends."""

    token_ids: bytes
    text: str
    reason: str
    prompt_tokens: int


def words_of(request: Generate | CountTokens) -> list[str]:
    """The prompt's words."""
    if request.messages is not None:
        return " ".join(message.content for message in request.messages).split()
    if isinstance(request, Generate) and request.token_ids is not None:
        return [str(number) for number in array("I", request.token_ids)]
    return (request.prompt or "").split()


def answer_to(request: Generate) -> Expected:
    """The answer to a Generate with `max_tokens`."""
    words = words_of(request)
    most = request.params.max_tokens
    assert most is not None
    text, reason = "", "length"
    made = 0
    while made < most:
        text += (" " if made else "") + words[made % len(words)]
        made += 1
        ends = [place for stop in request.params.stop if (place := text.find(stop)) >= 0]
        if ends:
            text, reason = text[: min(ends)], "stop"
            break
    return Expected(array("I", range(made)).tobytes(), text, reason, len(words))


def vectors_for(request: Embed) -> bytes:
    """Echo's vectors: SHA-256 of a counter and the text, as numbers in [-1, 1], at length 1."""
    rows = array("f")
    for text in request.texts:
        digest = hashlib.sha256(f"0:{' '.join(text.split())}".encode()).digest()
        row = [2 * number / (2**32 - 1) - 1 for number in array("I", digest)[:DIMENSIONS]]
        length = sum(number * number for number in row) ** 0.5
        rows.extend(number / length for number in row)
    return rows.tobytes()
