"""What is asked of every peer: how much of which work, and the pieces that the lean ends send."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from zmqserve import messages as m

MODEL = "bench"
TEXT = "x" * 20
IDS = b"\1\0\0\0"
BATCH, FLOATS = 32, 384
"""Texts in one embedding request, and the length of each vector."""
EMBED_IN_FLIGHT = 8
DONE_TAG = 38
"""The second byte of every Done."""


@dataclass(frozen=True)
class Scale:
    """How much of it. streams, tokens: of one streamed run. in_flight: one-chunk requests at one time. run_s: how long a closed loop runs.

    rate: tokens a second of each paced stream, for `paced_s`.
    """

    streams: int = 256
    tokens: int = 512
    in_flight: int = 256
    run_s: float = 1.5
    rate: float = 50.0
    paced_s: float = 4.0

    @property
    def paced_tokens(self) -> int:
        """Of each paced stream."""
        return int(self.rate * self.paced_s)


class Work(NamedTuple):
    """What a request asks of a generator: `kind` is ``one``, ``token`` or ``step``; with a `rate` (tokens/s) the tokens are paced.

    A generator waits for `streams` requests before it begins; all their tokens at one position are one step.
    """

    kind: str
    streams: int = 1
    tokens: int = 1
    rate: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Work:
        """From what `text` made."""
        kind, streams, tokens, rate = text.split()
        return cls(kind, int(streams), int(tokens), float(rate))

    @property
    def text(self) -> str:
        """As a prompt."""
        return " ".join(map(str, self))


ONE = Work("one").text
"""The prompt of a request for an answer of one chunk."""
_USAGE, _TIMINGS = m.Usage(1, 1), m.Timings("lean")


def streamed(scale: Scale, step: bool, paced: bool = False) -> Work:
    """Tokens of all streams, as fast as they go or at their pace."""
    kind = "step" if step else "token"
    return Work(kind, scale.streams, scale.paced_tokens, scale.rate) if paced else Work(kind, scale.streams, scale.tokens)


def asked(rid: int, prompt: str) -> bytes:
    """A request, as all lean ends send it."""
    return m.encode(m.Generate(rid, MODEL, prompt=prompt))


def chunk(rid: int, seq: int, text: str = TEXT) -> m.Chunk:
    """One token."""
    return m.Chunk(rid, seq, 0, text, IDS)


def done(rid: int, last: m.Chunk | None = None) -> bytes:
    """The end of an answer."""
    return m.encode(m.Done(rid, 1, ["length"], _USAGE, _TIMINGS, last))


def begun(rids: list[int]) -> list[bytes]:
    """The first token of each stream. The first of them says when its generator began to send."""
    return [m.encode(chunk(rid, 0, TEXT if k else stamp())) for k, rid in enumerate(rids)]


def stamp() -> str:
    """The time on this machine's monotonic clock, as a token of 20 characters."""
    return f"{time.monotonic():020.9f}"


def payloads(rids: list[int], work: Work, text: str = TEXT) -> list[bytes]:
    """The messages of one step: one, or one for each stream."""
    chunks = [chunk(rid, 1, text) for rid in rids]
    return [m.encode(m.Chunks(chunks))] if work.kind == "step" else [m.encode(each) for each in chunks]


def send_steps(rids: list[int], work: Work, send: Callable[[list[bytes]], object]) -> None:
    """Give `send` the messages of each step after the first token, at the work's pace."""
    messages = payloads(rids, work)
    began_s = time.monotonic()
    for k in range(1, work.tokens):
        if work.rate:
            time.sleep(max(0.0, began_s + k / work.rate - time.monotonic()))
            messages = payloads(rids, work, stamp())
        send(messages)


def chunks_of(message: object) -> list[m.Chunk]:
    """Those that came in a message to a client."""
    if isinstance(message, m.Chunks):
        return message.chunks
    return [message] if isinstance(message, m.Chunk) else []


class Tally:
    """What has come of one streamed run. `take` counts messages, and decodes them only if that is asked."""

    def __init__(self, work: Work, decode: bool) -> None:
        self._work = work
        self._left = work.streams
        self._decode = m.decoder(m.ToClient).decode if decode else None
        self._first = b""
        self._messages = self._tokens = 0

    def take(self, data: bytes) -> bool:
        """One message; returns whether it was the last."""
        if self._decode is not None:
            self._tokens += len(chunks_of(self._decode(data)))
        if data[1] != DONE_TAG:
            self._first = self._first or data
            self._messages += 1
            return False
        self._left -= 1
        return not self._left

    def result(self) -> tuple[int, float]:
        """Tokens, and seconds from the generator's first send to now. Nothing is missing."""
        now = time.monotonic()
        first = m.decoder(m.Chunk).decode(self._first)
        work = self._work
        tokens = work.streams * work.tokens
        assert self._messages == (work.streams + work.tokens - 1 if work.kind == "step" else tokens), self._messages
        assert self._tokens in (0, tokens), self._tokens
        return tokens, now - float(first.text)


class Delays:
    """When the tokens of one paced run came; decoded afterwards."""

    def __init__(self, work: Work) -> None:
        self._left = work.streams
        self._came: list[tuple[float, bytes]] = []

    def take(self, data: bytes) -> bool:
        """One message; returns whether it was the last."""
        if data[1] != DONE_TAG:
            self._came.append((time.monotonic(), data))
            return False
        self._left -= 1
        return not self._left

    def result(self) -> list[float]:
        """Seconds from send to hand of each token after the first of its stream."""
        decoded = m.decoder(m.ToClient).decode
        return [now - float(each.text) for now, data in self._came for each in chunks_of(decoded(data)) if each.seq]


class PayloadReader(ABC):
    """A consumer to which everything comes as payloads."""

    def tokens(self, scale: Scale, step: bool, decode: bool) -> tuple[int, float]:
        """Tokens, and seconds from the generator's first send to the last end."""
        work = streamed(scale, step)
        tally = Tally(work, decode)
        self._read(work, tally.take)
        return tally.result()

    def paced(self, scale: Scale, step: bool) -> list[float]:
        """Seconds from send to hand of each token after the first of its stream."""
        work = streamed(scale, step, paced=True)
        delays = Delays(work)
        self._read(work, delays.take)
        return delays.result()

    @abstractmethod
    def _read(self, work: Work, take: Callable[[bytes], bool]) -> None:
        """Ask for `work` and give each payload to `take`, until it says that this was the last one."""
