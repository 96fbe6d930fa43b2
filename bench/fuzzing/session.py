"""The client's state machine, before a controller that says anything at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.answering import completed
from zmqserve.call import Call, ClientRequest
from zmqserve.errors import ZmqserveError
from zmqserve.params import SamplingParams
from zmqserve.results import array_of
from zmqserve.session import Session

from .mutator import Mutator
from .target import Input, golden

OPEN = 6
"""Requests in progress."""
TIMEOUT_S = 20.0
OVER_S = 60.0
TEXTS = ["one", "two", "three"]
_VERBS: tuple[Callable[[int], ClientRequest], ...] = (
    lambda rid: m.Generate(rid, "m", prompt="hi"),
    lambda rid: m.Generate(rid, "m", prompt="hi"),
    lambda rid: m.Generate(rid, "m", prompt="hi", params=SamplingParams(n=2, logprobs=1)),
    lambda rid: m.Embed(rid, "m", texts=TEXTS),
    lambda rid: m.CountTokens(rid, "m", prompt="hi"),
    lambda rid: m.ModelDetails(rid, "m"),
    m.ListModels,
    m.Status,
    lambda rid: m.Drain(rid, "w"),
)


class _Wire:
    """Takes most of what is sent."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self.connections = 0

    def connect(self, endpoint: str) -> None:
        self.connections += bool(endpoint)

    def send(self, payload: bytes) -> bool:
        return bool(payload) and self._random.random() < 0.95


class SessionTarget:
    """One Session with two endpoints and some requests open at any time, whose readers take what comes."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._messages = Mutator(golden(), random)
        self._usage, self._timings = m.Usage(1, 1), m.Timings("w")
        self._now = 1000.0
        self._rid = 0
        self._open: list[Call] = []
        self._ended: list[tuple[Call, object]] = []
        self._session = Session(
            _Wire(random), ("tcp://a:1", "tcp://b:1"), random=Random(random.getrandbits(32)), failover_s=2.0, buffer_bytes=10_000
        )

    def draw(self) -> Input:
        """As Target says: what the controller sends, or ``None`` for a connection that breaks."""
        random = self._random
        dice = random.random()
        if dice < 0.002:
            return (None,)
        if dice < 0.4:
            return (self._messages.draw(),)
        data = m.encode(self._fitting())
        return (self._messages.change(data) if random.random() < 0.4 else data,)

    def _fitting(self) -> Any:
        """A message that may well be right for one of the open requests, or nearly."""
        random = self._random
        call = random.choice(self._open) if self._open else None
        rid, seq = (call.rid, call.next_seq) if call is not None else (random.randrange(10), 0)
        seq += random.choice((0,) * 12 + (1, -1, 2**62))
        chunk = m.Chunk(rid, seq, random.choice((0, 0, 0, 1, 2, -1)), "text", m.pack_ids([1] * random.randrange(3)), None)
        first = m.FirstChunk(rid, seq, 0, "text", b"\0\0\0\0", None, random.choice(("f", "f", "g", None)))
        reasons = random.choice((["stop"], ["stop", "length"], [], ["cancelled"]))
        done = m.Done(rid, seq, reasons, self._usage, self._timings, random.choice((None, chunk)))
        ends = (
            m.Embedding(rid, "float32", random.choice(((3, 2), (3, 0), (2, 3))), b"\0" * 24, self._usage, self._timings),
            m.Tokens(rid, 5),
            m.Details(rid, m.ModelCard("m")),
            m.Models(rid, []),
            m.DrainReply(rid, "w", 0),
        )
        code, retryable = random.choice(((40301, False), (50007, True), (42903, True), (40401, False), (12345, True), (40003, False)))
        error = m.Error(random.choice((rid, rid, 0)), code, "why", retryable, random.choice((None, 1, 2**40)), {"attempts": 1, "beside": 9})
        pong = m.Pong("here", random.choice(([], [rid], [0, -1, 2**63 - 1])))
        greeting = m.Welcome(
            random.choice((1, 1, 1, 2)), random.choice(("here", "there", "")), m.Limits(ttl_ms=random.choice((0, 1, 3000)))
        )
        return random.choice((*[chunk] * 4, first, m.Chunks([chunk, chunk]), done, *ends, error, pong, *[greeting] * 2, m.GoAway("bye")))

    def feed(self, given: Input) -> None:
        """As Target says."""
        (data,) = given
        session, random = self._session, self._random
        while len(self._open) < OPEN:
            self._rid += 1
            request = random.choice(_VERBS)(self._rid)
            self._open.append(
                session.open(self._now, request, timeout_s=TIMEOUT_S, collect=random.random() < 0.5, retries=random.randrange(3))
            )
        if data is None:
            session.on_disconnected(self._now)
        else:
            session.on_message(self._now, data)
        if random.random() < 0.01:
            session.cancel(random.choice(self._open))
        self._pass(random.choice((0.0, 0.0, 0.001, 0.01)))
        if session.blocked:
            session.flush()
        self._read()

    def _read(self) -> None:
        for call in list(self._open):
            if self._random.random() < 0.5:
                while call.take() is not None:
                    pass
            if call.end is not None:
                self._open.remove(call)
                self._ended.append((call, call.end))
                self._use(call)

    def _use(self, call: Call) -> None:
        """Make of an end what the SDK's caller gets."""
        with suppress(ZmqserveError, RuntimeError):
            if isinstance(call.request, m.Generate):
                completed(call)
            elif isinstance(call.end, m.Embedding):
                array_of(call.end, len(TEXTS))

    def _pass(self, seconds: float) -> None:
        until = self._now + seconds
        while (due_s := self._session.next_s()) is not None and due_s <= until:
            self._now = max(self._now, due_s)
            self._session.tick(self._now)
        self._now = until

    def check(self) -> None:
        """An end is for good, and what has ended is not kept."""
        for call, end in self._ended:
            assert call.end is end, f"{call!r} had ended by {end!r:.200}"
        self._ended.clear()
        left = set(self._session.calls) - {call.rid for call in self._open}
        assert not left, f"requests that ended are kept: {left}"

    def finish(self) -> None:
        """As Target says: every request ends within its timeout, whatever the controller said before."""
        self._pass(OVER_S)
        self._read()
        assert not self._open, f"never ended: {self._open}"
        self.check()
        self._session.close()
