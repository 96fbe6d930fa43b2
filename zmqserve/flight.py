"""One request in progress (a flight), whose it is (a client) and the way its tokens take (a route)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from .liveness import Lease, Timer
from .messages import RequestHeader

if TYPE_CHECKING:
    from .access import Account
    from .need import Need
    from .pool import Pool
    from .registry import Worker
    from .uplink import Upward

Envelope: TypeAlias = tuple[bytes, ...]
"""The frames before a client's payload: its connection's routing id, and those that devices and REQ sockets put behind it."""


NOBODY: frozenset[str] = frozenset()
"""One for all flights: Python makes a new empty set each time, of 216 bytes."""


class Client:
    """Who asked. It exists while it has flights; `number` is what workers know it by, and is never used twice.

    `gone`: nothing is sent to it any more; its flights are only waited for. `above`: the way to it, where it is a parent's client.
    `account`: that of its key, where it has one. `waiting`: those of its flights that stand in a queue, where it has none.
    """

    __slots__ = ("above", "account", "envelope", "flights", "gone", "lease", "number", "timer", "waiting", "waiting_bytes")

    def __init__(self, envelope: Envelope, number: int, account: Account | None = None) -> None:
        self.account = account
        self.envelope = envelope
        self.number = number
        self.above: Upward | None = None
        self.flights: dict[int, Flight] = {}
        self.lease: Lease | None = None
        self.timer: Timer | None = None
        self.gone = False
        self.waiting = 0
        self.waiting_bytes = 0

    def __repr__(self) -> str:
        return f"Client({self.number}, {len(self.flights)} flights{', gone' if self.gone else ''})"

    @property
    def party(self) -> Client | Account:
        """Who is counted for what it has waiting: all of a key's clients together."""
        return self if self.account is None else self.account

    @property
    def group(self) -> bytes:
        """With whom it takes turns: the others of its key, or of its connection."""
        return self.envelope[0] if self.account is None else self.account.group


class Flight:
    """One request, `open` until it is settled. It is `waiting` while it stands in a queue, has a `worker` while one answers it
    (neither, for a moment, while its worker is lost), and has `started` once its first chunk has gone to the client.

    `alias`: the name that it calls its model by, where that is another. `attempts`: workers that it has lost, `attempts_before` when it
    came. `queued_ms`: what it waited in the controllers above. `told`: the client has had its end, and only its worker has not let go of
    it yet. `on_trial`: its worker tries it (see Need)."""

    __slots__ = (
        "affinity",
        "alias",
        "arrived_s",
        "attempts",
        "attempts_before",
        "avoid",
        "cancel_timer",
        "client",
        "deadline_s",
        "dispatched_s",
        "ending",
        "first_s",
        "need",
        "on_trial",
        "open",
        "payload",
        "pool",
        "priority",
        "queued_ms",
        "rid",
        "route",
        "slotted",
        "started",
        "timer",
        "told",
        "trace",
        "waiting",
        "worker",
    )

    def __init__(self, client: Client, header: RequestHeader, need: Need, pool: Pool, payload: bytes, now: float) -> None:
        self.client = client
        self.rid = header.rid
        self.need = need
        self.pool = pool
        self.alias = header.model if header.model != pool.model else None
        self.payload = payload
        self.priority = header.priority
        self.affinity = header.affinity
        self.attempts = self.attempts_before = header.attempts
        self.trace = header.trace
        self.queued_ms = 0.0
        self.deadline_s = now + header.deadline_ms / 1000 if header.deadline_ms is not None else None
        self.slotted = need.slotted
        self.arrived_s = now
        self.dispatched_s = now
        self.first_s: float | None = None
        self.worker: Worker | None = None
        self.route: Route | None = None
        self.open = True
        self.waiting = False
        self.started = False
        self.ending: str | None = None
        self.told = False
        self.on_trial = False
        self.avoid = NOBODY
        self.timer: Timer | None = None
        self.cancel_timer: Timer | None = None

    def log(self, report: Callable[..., None], worker: Worker | None, now: float, outcome: str, code: int, tokens: tuple[int, int]) -> None:
        """Report what is said of it when it has ended."""
        waited_until = self.dispatched_s if worker is not None else now
        report(
            "request",
            rid=self.rid,
            verb=self.need.verb,
            model=self.pool.model,
            worker=worker.name if worker is not None else None,
            outcome=outcome,
            code=code,
            queue_ms=_ms(waited_until - self.arrived_s),
            first_ms=_ms(self.first_s - self.arrived_s) if self.first_s is not None else None,
            total_ms=_ms(now - self.arrived_s),
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            attempts=self.attempts,
            trace=self.trace,
        )

    def __repr__(self) -> str:
        state = "waiting" if self.worker is None else f"on {self.worker.name!r}"
        return f"Flight(rid={self.rid}, {self.need.verb} {self.pool.model!r}, {state}{', started' if self.started else ''})"


def _ms(seconds: float) -> float:
    """Milliseconds to three digits. Rounding to a whole number is several times faster than to digits."""
    return round(seconds * 1e6) / 1000


class Route:
    """One worker's way to one client: what a MORE head stands for. It exists while a flight of theirs is open.

    `identity` is the worker's routing id, or empty when the relay shall not take its messages on trust. Of its `flights` so many
    are `told`: when all are, what still comes on it is for nobody.
    """

    __slots__ = ("client", "flights", "head", "identity", "told", "worker")

    def __init__(self, worker: Worker, client: Client, head: bytes) -> None:
        self.worker = worker
        self.identity = worker.identity
        self.client = client
        self.head = head
        self.flights = 0
        self.told = 0

    def __repr__(self) -> str:
        return f"Route({self.worker.name!r} -> {self.client.number}, {self.flights} flights)"
