"""The controller as a client knows it: where it is, whether it answers, what it takes. Pure: `now` is passed in, a Wire is written to.

::

            greet                           Welcome
    away ----------> greeting ------------------------------> open
      ^  <----------   |  ^                                    |
      |   nobody wants |  | nobody answered, or refused:       | silent, disconnected, leaving:
      |   it any more  +--+ the next endpoint                  | the next endpoint
      +--------------------------------------------------------+
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from .errors import ControllerLost, ControllerUnreachable, GoingAway, ProtocolMismatch, Unauthenticated, ZmqserveError
from .liveness import BEATS_PER_TTL, Agenda, Timer
from .messages import PROTOCOL, Hello, Limits, Ping, Pong, Welcome, encode

FIRST_PING_S = 0.1
"""When a client that begins to ask says its ttl. A short request needs no Ping at all."""
HUNG_SHARE = 0.8
"""A controller is given up after this part of its ttl where there is another one to turn to: what it held goes on within the ttl."""

Failure = Callable[[], ZmqserveError]
"""Makes a new error at each call: each reader raises its own."""


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

    @property
    def wanted(self) -> bool:
        """Whether a request waits for a controller."""

    def on_open(self, now: float) -> None:
        """It answered: requests may be sent."""

    def on_lost(self, now: float, error: Failure) -> None:
        """It is gone, and what it held with it. Another one will be looked for if one is `wanted` then."""

    def on_unanswered(self, now: float, error: Failure) -> None:
        """One more endpoint was tried in vain; `error` says so of all that were."""

    def to_ping(self, number: int) -> list[int] | None:
        """Rids of the requests that it has, for the Ping of this number; None when no request is open at all."""


class Peer:
    """One controller at a time, of those at `endpoints`; see Session for the times.

    `lost_s`: since when there has been none that stayed. `tried`: endpoints that have not answered since, on new connections.
    """

    def __init__(
        self, owner: Owner, wire: Wire, agenda: Agenda, endpoints: Sequence[str], *, name: str, ttl_s: float, connect_timeout_s: float
    ) -> None:
        self.endpoints = tuple(endpoints)
        self.state = State.AWAY
        self.controller = ""
        self.limits = Limits()
        self.heard_s = 0.0
        self.lost_s: float | None = None
        self.tried = 0
        self._owner, self._wire, self._agenda = owner, wire, agenda
        self._ttl_s, self._connect_timeout_s = ttl_s, connect_timeout_s
        self._hello = encode(Hello(PROTOCOL, name))
        self._hello_waits = False
        self._on_old = False
        self._ping = b""
        self._pings = self._pongs = 0
        self._at = 0
        self._dialed_s: dict[int, float] = {}
        self._greeted_s = self._opened_s = self._watched_s = 0.0
        self._asked_s: float | None = None
        self._refusals: dict[int, Failure] = {}
        self._beating: Timer | None = None
        self._greeting: Timer | None = None

    def __repr__(self) -> str:
        return f"Peer({self.state.value}, controller={self.controller!r}, endpoint={self.endpoint!r})"

    @property
    def endpoint(self) -> str:
        """Where it is, or is looked for."""
        return self.endpoints[self._at]

    @property
    def where(self) -> str:
        """All endpoints, for people."""
        return " or ".join(self.endpoints)

    @property
    def blocked(self) -> bool:
        """Whether a Hello or Ping waits for the wire to take it."""
        return self._hello_waits or bool(self._ping)

    @property
    def hopeless(self) -> bool:
        """Whether every endpoint has turned this client away for good since it last had a controller: it need not be asked again soon."""
        return len(self._refusals) == len(self.endpoints) and not any(error().retryable for error in self._refusals.values())

    def heard(self, now: float) -> None:
        """Any message is a sign of life."""
        self.heard_s = now
        self._asked_s = None

    def stale(self, now: float) -> bool:
        """Whether it was heard too long ago to rely on."""
        return now - self.heard_s >= self._its_ttl_s

    def round_ends(self, now: float) -> int:
        """What `tried` will be when, from now on, each endpoint has had its whole time."""
        begun = self.state is State.GREETING and not self._on_old and self._greeted_s < now
        return self.tried + len(self.endpoints) + begun

    def greet(self, now: float, *, fresh: bool) -> None:
        """Say Hello, for Welcome to open the way; `fresh`: on a new connection."""
        if self.state is State.OPEN and now - self._opened_s >= self._connect_timeout_s:
            self.lost_s = None  # it stayed: a loss from here on is a new one
        self._stop()
        self._refusals.clear()
        if fresh or not self._wire.send(self._hello):
            self._connect(now)
        else:
            self._expect_welcome(now, on_old=True)

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
        self._stop()
        self.lost_s = None
        self.tried = 0

    def flush(self) -> None:
        """Send a Hello or Ping that waits, if the wire takes it now."""
        if self._hello_waits and self._wire.send(self._hello):
            self._hello_waits = False
        if self._ping and self._wire.send(self._ping):
            self._ping = b""

    # --- what happens to it

    def on_welcome(self, now: float, welcome: Welcome) -> None:
        """Check the version, note the limits."""
        if welcome.protocol != PROTOCOL:
            theirs = f"protocol {welcome.protocol}" + (f" (zmqserve {welcome.version})" if welcome.version else "")
            older = "client" if welcome.protocol > PROTOCOL else "controller"
            message = f"the controller at {self.endpoint} speaks {theirs}, this client protocol {PROTOCOL}; upgrade the {older}"
            self.on_refusal(now, lambda: ProtocolMismatch(message, data={"controller": welcome.protocol, "client": PROTOCOL}))
            return
        self.controller, self.limits = welcome.controller, welcome.limits
        if self.state is State.GREETING:
            self._stop()
            self.state = State.OPEN
            self._opened_s = now
            self.watch(now)
            self._owner.on_open(now)

    def on_pong(self, pong: Pong) -> tuple[int, Failure]:
        """Note who answers. Returns which Ping it answers, and the maker of the error for requests that it does not know."""
        self._pongs += 1
        was, self.controller = self.controller, pong.controller
        if was == pong.controller:
            why = f"the connection to the controller at {self.endpoint} broke, and with it this request"
        else:
            why = f"the controller at {self.endpoint} was replaced: {pong.controller} does not know this request of {was}"
            # Its limits and version may be others.
            self._hello_waits = not self._wire.send(self._hello)
        data = {"controller": pong.controller, "endpoint": self.endpoint}
        return self._pongs, lambda: ControllerLost(why, data=data)

    def on_refusal(self, now: float, error: Failure) -> None:
        """It will not serve this client: try the next."""
        if self.state is State.OPEN:
            self._lose(now, error)
        else:
            self._refusals[self._at] = error
            self._next(now)

    def on_shut_out(self, now: float, why: str) -> None:
        """A handshake failed: the connection was made, and one end turned the other away. `why` says whose fault that is."""
        if self.state is State.GREETING:
            message = f"the controller at {self.endpoint} does not let this client in: {why}"
            data = {"endpoint": self.endpoint}
            self.on_refusal(now, lambda: Unauthenticated(message, data=data))

    def on_go_away(self, now: float, why: str) -> None:
        """It takes nothing new, and ends what it has."""
        if self.state is State.OPEN:
            message = f"the controller at {self.endpoint} is leaving ({why})"
            self._lose(now, lambda: GoingAway(message))

    def on_disconnected(self, now: float) -> None:
        """The connection has broken. Whoever is at its other end takes the next one for a new client: what it held is lost."""
        if self.state is State.OPEN:
            message, data = f"the connection to the controller at {self.endpoint} broke", {"endpoint": self.endpoint}
            self._lose(now, lambda: ControllerLost(message, data=data))
        elif self.state is State.GREETING:
            self._hello_waits = True

    def _dial(self, now: float) -> None:
        """Connect to the endpoint. Not again so soon: one that takes connections and drops them would be dialed without end."""
        self._stop()
        due_s = self._dialed_s.get(self._at, now - self._connect_timeout_s) + self._connect_timeout_s
        if now < due_s:
            self._greeting = self._agenda.at(due_s, self._connect)
        else:
            self._connect(now)

    def _connect(self, now: float) -> None:
        self._dialed_s[self._at] = now
        self._pings = self._pongs = 0
        self._wire.connect(self.endpoint)
        self._hello_waits = True
        self.flush()
        self._expect_welcome(now)

    def _expect_welcome(self, now: float, *, on_old: bool = False) -> None:
        self.state = State.GREETING
        self._greeted_s, self._on_old = now, on_old
        self._greeting = self._agenda.at(now + self._connect_timeout_s, self._unanswered)

    def _unanswered(self, now: float) -> None:
        self._refusals.pop(self._at, None)
        # What was silent for long may lead nowhere any more without anybody having been told, and its controller be well.
        self._next(now, counts=not self._on_old)

    def _next(self, now: float, *, counts: bool = True) -> None:
        """Nobody answered at this endpoint: try the next, as long as anybody wants a controller. `counts`: that it was tried."""
        self._stop()
        self._at = (self._at + 1) % len(self.endpoints)
        if counts:
            self.tried += 1
            self._owner.on_unanswered(now, next(iter(self._refusals.values()), self._unreachable))
        if self._owner.wanted:
            self._dial(now)
        else:
            self.forget()

    def _unreachable(self) -> ControllerUnreachable:
        hint = "is one running (zmqserve controller), is this its side for clients, and does it ask for a key?"
        message = f"no controller answered at {self.where} within {self._connect_timeout_s:g} s; {hint}"
        return ControllerUnreachable(message, data={"endpoints": list(self.endpoints)})

    def _lose(self, now: float, error: Failure) -> None:
        if self.lost_s is None or now - self._opened_s >= self._connect_timeout_s:
            self.lost_s = now
        self._stop()
        self._refusals.clear()
        self._at = (self._at + 1) % len(self.endpoints)
        self._owner.on_lost(now, error)
        if self._owner.wanted:
            self._dial(now)
        else:
            self.forget()

    def _stop(self) -> None:
        """Nothing is expected now; what still comes on the old connection does not count."""
        self.state = State.AWAY
        self._hello_waits = False
        self._ping = b""
        for timer in (self._beating, self._greeting):
            if timer is not None:
                timer.cancel()
        self._beating = self._greeting = None

    # --- whether it lives

    @property
    def _its_ttl_s(self) -> float:
        return self.limits.ttl_ms / 1000 or self._ttl_s

    @property
    def _beat_s(self) -> float:
        return min(self._its_ttl_s, self._ttl_s) / BEATS_PER_TTL

    @property
    def _patience_s(self) -> float:
        return self._its_ttl_s * (HUNG_SHARE if len(self.endpoints) > 1 else 1.0)

    def _beat(self, now: float) -> None:
        """Ping while requests are open, and give up a controller that leaves Pings unanswered."""
        self._beating = None
        # One that the wire has not taken yet is replaced.
        number = self._pings + (not self._ping)
        rids = self._owner.to_ping(number)
        if rids is None:
            return
        if self._asked_s is not None and now >= self._gives_up_s(self._asked_s):
            silence_s = now - max(self.heard_s, self._watched_s)
            message = f"the controller at {self.endpoint} has been silent for {silence_s:.1f} s"
            data: dict[str, str | int | float | list[str]] = {"endpoint": self.endpoint, "silence_s": silence_s}
            self._lose(now, lambda: ControllerLost(message, data=data))
            return
        self._pings = number
        self._ping = encode(Ping(max(1, round(self._ttl_s * 1000)), rids))
        self.flush()
        if self._asked_s is None:
            self._asked_s = now
        self._beating = self._agenda.at(min(now + self._beat_s, self._gives_up_s(self._asked_s)), self._beat)

    def _gives_up_s(self, asked_s: float) -> float:
        """When it is lost: silent for the patience that it gets, of which it had all but one beat to answer a Ping. A client that was
        suspended did not ask, and does not take its own pause for the controller's."""
        return max(max(self.heard_s, self._watched_s) + self._patience_s, asked_s + self._patience_s - self._beat_s)
