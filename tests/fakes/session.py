"""A client's session with a wire that records, and time that the test passes in."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fakes.broker import chunk, done
from zmqserve import messages as m
from zmqserve.call import Call
from zmqserve.errors import WorkerLost
from zmqserve.params import SamplingParams
from zmqserve.session import Session

_decode = m.decoder(m.FromClient).decode


class FakeWire:
    """Takes what is sent while `takes` says so, and notes each connection."""

    def __init__(self) -> None:
        self.takes = True
        self.connected: list[str] = []
        self.sent: list[Any] = []

    def connect(self, endpoint: str) -> None:
        self.connected.append(endpoint)

    def send(self, payload: bytes) -> bool:
        if self.takes:
            self.sent.append(_decode(payload))
        return self.takes

    def taken(self) -> list[Any]:
        sent, self.sent = self.sent, []
        return sent


class World:
    """A session, its wire, and the time."""

    def __init__(self, *endpoints: str, seed: int = 1, **options: Any) -> None:
        self.wire = FakeWire()
        self.session = Session(self.wire, endpoints or ("tcp://a:1",), random=Random(seed), **options)
        self.now = 1000.0
        self._rid = 0

    def open(
        self,
        *,
        collect: bool = False,
        timeout_s: float | None = None,
        prompt: str = "hi",
        params: SamplingParams | None = None,
        **terms: Any,
    ) -> Call:
        self._rid += 1
        request = m.Generate(self._rid, "m", prompt=prompt, params=params or SamplingParams())
        return self.session.open(self.now, request, timeout_s=timeout_s, collect=collect, **terms)

    def ask(self, request: Any, **terms: Any) -> Call:
        """Open a request of another kind."""
        return self.session.open(self.now, request, collect=True, **terms)

    def begin(self, tokens: int = 1, **options: Any) -> Call:
        """A stream of which so many chunks have come, the first with its model's fingerprint."""
        call = self.open(**options)
        self.go_on(call, tokens)
        return call

    def go_on(self, call: Call, tokens: int, fingerprint: str = "f") -> None:
        """The next chunks of a stream, from a worker that has not spoken of it yet."""
        first = call.next_seq
        for seq in range(first, first + tokens):
            piece = chunk(call.rid, seq)
            self.hear(m.FirstChunk(call.rid, seq, 0, piece.text, piece.token_ids, None, fingerprint) if seq == first else piece)

    def lost(self, call: Call, attempts: int | None = 1, *, retryable: bool = True, beside: int = 0) -> None:
        """The controller says that its worker was lost, with so many other requests."""
        data: dict[str, m.Scalar] = {} if attempts is None else {"attempts": attempts, "beside": beside}
        self.hear(m.Error(call.rid, WorkerLost.code, "worker w was lost", retryable, data=data))

    def disconnect(self) -> None:
        """The connection breaks."""
        self.session.on_disconnected(self.now)

    def hear(self, *messages: Any) -> None:
        for message in messages:
            self.session.on_message(self.now, message if isinstance(message, bytes) else m.encode(message))

    def welcome(self, controller: str = "c1", **limits: int) -> None:
        self.hear(m.Welcome(m.PROTOCOL, controller, m.Limits(**limits)))

    def welcomed(self, **limits: int) -> World:
        """Past the greeting: as after a first request that ended."""
        call = self.open()
        self.welcome("c1", **limits)
        self.hear(done(call.rid, 0))
        self.wire.taken()
        return self

    def pass_s(self, seconds: float) -> None:
        """Let time pass as an owner does: a tick whenever one is due."""
        until = self.now + seconds
        while (due_s := self.session.next_s()) is not None and due_s <= until:
            self.now = max(self.now, due_s)
            self.session.tick(self.now)
        self.now = until


def ended(call: Call) -> Any:
    """How it ended, read anew each time."""
    return call.end


def texts(call: Call) -> list[str]:
    """What its reader gets."""
    found = []
    while (taken := call.take()) is not None:
        found.append(taken.text)
    return found


TWO = ("tcp://a:1", "tcp://b:2")


def pair() -> World:
    """A client of two controllers, at the first, past its first second."""
    world = World(*TWO).welcomed()
    world.pass_s(1)
    return world


def asked(world: World) -> list[m.Generate]:
    """The requests that were sent since the last look."""
    return [message for message in world.wire.taken() if isinstance(message, m.Generate)]


def moved(world: World, call: Call, **welcome: Any) -> m.Generate:
    """The next controller has answered: what it is sent for this call."""
    world.wire.taken()
    world.welcome(**welcome)
    (again,) = [message for message in asked(world) if message.rid == call.rid]
    return again
