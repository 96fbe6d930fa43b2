"""What a load client tells the harness: one line of JSON as a request begins and one when it has ended.

Times are of the monotonic clock, which the processes of one machine share.
"""

from __future__ import annotations

import msgspec
from msgspec import Struct


class Begun(Struct, tag="begun", omit_defaults=True):
    """A request was asked. It must have ended by `deadline_s`. `poison`: it kills the workers that it reaches."""

    request: int
    at_s: float
    deadline_s: float
    poison: bool = False


class Ended(Struct, tag="ended", omit_defaults=True):
    """A request ended: with its whole answer (`code` 0) or with an error.

    wrong: the oracle's first complaint. tokens: that were delivered. resumed: how often its answer was joined.
    gap_s: the longest wait between two of its chunks. join_gaps_s: the waits across its joins.
    """

    request: int
    at_s: float
    code: int = 0
    error: str = ""
    message: str = ""
    retryable: bool = False
    wrong: str = ""
    tokens: int = 0
    resumed: int = 0
    gap_s: float = 0.0
    join_gaps_s: list[float] = []


Record = Begun | Ended

_decoder: msgspec.json.Decoder[Begun | Ended] = msgspec.json.Decoder(Begun | Ended)


def line(record: Record) -> bytes:
    """The record as a line. Shorter than PIPE_BUF, so that threads may write theirs to one pipe without a lock."""
    return msgspec.json.encode(record) + b"\n"


def parse(text: bytes) -> Record:
    """The record of a line."""
    return _decoder.decode(text)
