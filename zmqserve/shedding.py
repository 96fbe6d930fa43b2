"""What becomes of messages that waited for a client which does not read, when they are let go of. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from . import messages as m
from .flight import Envelope

ERROR_BYTES = 256
"""What the Error takes that stands for an end which was dropped: a little more than its text and numbers."""
_FIRST_END, _LAST_END = 38, 46

_peek = msgspec.msgpack.Decoder(m.Peek)


def dropped_ends(messages: Sequence[tuple[bytes, ...]]) -> list[tuple[Envelope, int]]:
    """Whose requests would never end, by envelope and rid, because their Done or other end was among these messages.

    None where telling them would take more than half of the space that was won: a client that still reads learns by its next Ping.
    """
    ends = [(frames[:-1], rid) for frames in messages if (rid := _ended(frames[-1]))]
    return ends if 2 * ERROR_BYTES * len(ends) <= sum(sum(map(len, frames)) for frames in messages) else []


def _ended(payload: bytes) -> int:
    """The rid of the request that this message ends, or 0."""
    try:
        peek = _peek.decode(payload)
    except (msgspec.DecodeError, RecursionError):  # Chunks have no rid
        return 0
    return peek.rid if _FIRST_END <= peek.tag <= _LAST_END else 0
