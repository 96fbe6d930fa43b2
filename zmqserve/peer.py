"""The controller as a client knows it: where it is, whether it answers, what it takes. Pure: `now` is passed in, a Wire is written to.

::

            greet                       Welcome
    away ----------> greeting --------------------------> open
      ^                 | nobody answers, or refuses        | silent for ttl_s
      +-----------------+-----------------------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from .errors import ControllerLost, ControllerUnreachable, ProtocolMismatch, ZmqserveError
from .liveness import BEATS_PER_TTL, Agenda, Timer
from .messages import PROTOCOL, Hello, Limits, Ping, Pong, Welcome, encode

FIRST_PING_S = 0.1
"""When a client that begins to ask says its ttl. A short request needs no Ping at all."""


class State(Enum):
    """Where a client stands with its controller; drawn at the top of this module."""

    AWAY = "away"
    GREETING = "greeting"
    OPEN = "open"


class Wire(Protocol):
    """What is written to."""

    def connect(self, endpoint: str) -> None:
        """Drop the connection, if there is one, and begin another."""

    def send(self, payload: bytes) -> bool:
        """Send, or return False when it cannot be taken now: not connected, or full."""


class Owner(Protocol):
    """Who has the requests, and is told what happens to the controller."""

    def on_open(self, now: float) -> None:
        """It answered: requests may be sent."""

    def on_lost(self, error: Callable[[], ZmqserveError]) -> None:
        """It is gone, and what it held with it. `error` makes a new error at each call: each reader raises its own."""

    def to_ping(self) -> list[int] | None:
        """Rids of the requests that were sent, for a Ping; None when no request is open and nobody needs the controller."""


class Peer:
    """One controller at a time, of those at `endpoints`; see Session for the times.

    `leaving` is its reason once it has said GoAway.
    """

    def __init__(
        self, owner: Owner, wire: Wire, agenda: Agenda, endpoints: Sequence[str], *, name: str, ttl_s: float, connect_timeout_s: float
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.state = State.AWAY
        self.controller = ""
        self.limits = Limits()
        self.leaving: str | None = None
        self.heard_s = 0.0
        self._owner, self._wire, self._agenda = owner, wire, agenda
        self._ttl_s, self._connect_timeout_s = ttl_s, connect_timeout_s
        self._beat_s = ttl_s / BEATS_PER_TTL
        self._hello = encode(Hello(PROTOCOL, name))
        self._hello_waits = False
        self._at = 0
        self._tried = 0
        self._watched_s = 0.0
        self._asked_s: float | None = None
        self._beating: Timer | None = None
        self._greeting: Timer | None = None

    def __repr__(self) -> str:
        return f"Peer({self.state.value}, controller={self.controller!r}, endpoint={self.endpoint!r})"

    @property
    def endpoint(self) -> str:
        """Where it is, or is looked for."""
        return self.endpoints[self._at]

    @property
    def blocked(self) -> bool:
        """Whether a Hello waits for the wire to take it."""
        return self._hello_waits

    def heard(self, now: float) -> None:
        """Any message is a sign of life."""
        self.heard_s = now
        self._asked_s = None

    def stale(self, now: float) -> bool:
        """Whether it was heard too long ago to rely on."""
        return now - self.heard_s >= self._ttl_s

    def greet(self, now: float, *, fresh: bool) -> None:
        """Say Hello, for Welcome to open the way; `fresh`: on a new connection."""
        self.forget()
        self.state = State.GREETING
        self._tried = 0
        self._dial(now, fresh=fresh or not self._wire.send(self._hello))

    def watch(self, now: float) -> None:
        """Begin to expect answers: it has until a ttl from now."""
        self._watched_s = now
        self._asked_s = None
        # Soon, for the controller to know the ttl: it forgets a client without requests, and until a Ping it cannot tell a silent one
        # from a patient one.
        soon_s = now + min(FIRST_PING_S, self._beat_s)
        if self._beating is None or self._beating.when_s > soon_s:
            if self._beating is not None:
                self._beating.cancel()
            self._beating = self._agenda.at(soon_s, self._beat)

    def forget(self) -> None:
        """Back to the beginning; nothing is expected of anybody."""
        self.state = State.AWAY
        self._hello_waits = False
        self._stop_timers()

    def flush(self) -> None:
        """Send a Hello that waits, if the wire takes it now."""
        if self._hello_waits and self._wire.send(self._hello):
            self._hello_waits = False

    def on_welcome(self, now: float, welcome: Welcome) -> None:
        """Check the version, note the limits."""
        if welcome.protocol != PROTOCOL:
            theirs = f"protocol {welcome.protocol}" + (f" (zmqserve {welcome.version})" if welcome.version else "")
            older = "client" if welcome.protocol > PROTOCOL else "controller"
            message = f"the controller at {self.endpoint} speaks {theirs}, this client protocol {PROTOCOL}; upgrade the {older}"
            self._lose(lambda: ProtocolMismatch(message, data={"controller": welcome.protocol, "client": PROTOCOL}))
            return
        self.controller, self.limits, self.leaving = welcome.controller, welcome.limits, None
        if self.state is State.GREETING:
            self._stop_timers()
            self.state = State.OPEN
            self.watch(now)
            self._owner.on_open(now)

    def on_pong(self, pong: Pong) -> Callable[[], ControllerLost]:
        """Note who answers. Returns the maker of the error for requests that it does not know."""
        was, self.controller = self.controller, pong.controller
        if was == pong.controller:
            why = f"the connection to the controller at {self.endpoint} broke, and with it this request"
        else:
            why = f"the controller at {self.endpoint} was replaced: {pong.controller} does not know this request of {was}"
            # Its limits and version may be others.
            self._hello_waits = not self._wire.send(self._hello)
        data = {"controller": pong.controller, "endpoint": self.endpoint}
        return lambda: ControllerLost(why, data=data)

    def on_refusal(self, error: Callable[[], ZmqserveError]) -> None:
        """It answered Hello with an error."""
        self._lose(error)

    def _dial(self, now: float, *, fresh: bool) -> None:
        if fresh:
            self._wire.connect(self.endpoint)
            self._hello_waits = True
            self.flush()
        self._greeting = self._agenda.at(now + self._connect_timeout_s, self._unanswered)

    def _unanswered(self, now: float) -> None:
        """Nobody answered at this endpoint: try the next, until all were tried."""
        self._tried += 1
        if self._tried < len(self.endpoints):
            self._at = (self._at + 1) % len(self.endpoints)
            self._dial(now, fresh=True)
            return
        where = " or ".join(self.endpoints)
        message = f"no controller answered at {where} within {self._connect_timeout_s:g} s; is one running (zmqserve controller)?"
        self._lose(lambda: ControllerUnreachable(message, data={"endpoints": list(self.endpoints)}))

    def _beat(self, now: float) -> None:
        """Ping while requests are open, and give up a controller that leaves Pings unanswered."""
        self._beating = None
        rids = self._owner.to_ping()
        if rids is None:
            return
        if self._asked_s is not None and now >= self._lost_s(self._asked_s):
            silence_s = now - max(self.heard_s, self._watched_s)
            message = f"the controller at {self.endpoint} has been silent for {silence_s:.1f} s"
            data: dict[str, str | int | float | list[str]] = {"endpoint": self.endpoint, "silence_s": silence_s}
            self._lose(lambda: ControllerLost(message, data=data))
            return
        self._wire.send(encode(Ping(max(1, round(self._ttl_s * 1000)), rids)))
        if self._asked_s is None:
            self._asked_s = now
        self._beating = self._agenda.at(min(now + self._beat_s, self._lost_s(self._asked_s)), self._beat)

    def _lost_s(self, asked_s: float) -> float:
        """When it is lost: silent for a ttl, of which it had all but one beat to answer a Ping. A client that was suspended
        did not ask, and does not take its own pause for the controller's."""
        return max(max(self.heard_s, self._watched_s) + self._ttl_s, asked_s + self._ttl_s - self._beat_s)

    def _lose(self, error: Callable[[], ZmqserveError]) -> None:
        self.forget()
        self._owner.on_lost(error)

    def _stop_timers(self) -> None:
        for timer in (self._beating, self._greeting):
            if timer is not None:
                timer.cancel()
        self._beating = self._greeting = None
