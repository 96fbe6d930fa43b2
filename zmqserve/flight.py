"""One request in progress (a flight), whose it is (a client) and the way its tokens take (a route)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .liveness import Lease, Timer
from .messages import RequestHeader

if TYPE_CHECKING:
    from .registry import Need, Pool, Worker

Envelope: TypeAlias = tuple[bytes, ...]
"""The frames before a client's payload: its connection's routing id, and those that devices and REQ sockets put behind it."""


class Client:
    """Who asked. It exists while it has flights; `number` is what workers know it by, and is never used twice.

    `gone`: nothing is sent to it any more; its flights are only waited for.
    """

    __slots__ = ("envelope", "flights", "gone", "lease", "number", "timer")

    def __init__(self, envelope: Envelope, number: int) -> None:
        self.envelope = envelope
        self.number = number
        self.flights: dict[int, Flight] = {}
        self.lease: Lease | None = None
        self.timer: Timer | None = None
        self.gone = False

    def __repr__(self) -> str:
        return f"Client({self.number}, {len(self.flights)} flights{', gone' if self.gone else ''})"


class Flight:
    """One request, `open` until it is settled. It is `waiting` while it stands in a queue, has a `worker` while one answers it
    (neither, for a moment, while its worker is lost), and has `started` once its first chunk has gone to the client."""

    __slots__ = (
        "affinity",
        "arrived_s",
        "attempts",
        "avoid",
        "cancel_timer",
        "client",
        "deadline_s",
        "dispatched_s",
        "ending",
        "first_s",
        "need",
        "open",
        "payload",
        "pool",
        "priority",
        "rid",
        "route",
        "slotted",
        "started",
        "timer",
        "trace",
        "waiting",
        "worker",
    )

    def __init__(self, client: Client, header: RequestHeader, need: Need, pool: Pool, payload: bytes, now: float) -> None:
        self.client = client
        self.rid = header.rid
        self.need = need
        self.pool = pool
        self.payload = payload
        self.priority = header.priority
        self.affinity = header.affinity
        self.attempts = header.attempts
        self.trace = header.trace
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
        self.avoid: frozenset[str] = frozenset()
        self.timer: Timer | None = None
        self.cancel_timer: Timer | None = None

    def __repr__(self) -> str:
        state = "waiting" if self.worker is None else f"on {self.worker.name!r}"
        return f"Flight(rid={self.rid}, {self.need.verb} {self.pool.model!r}, {state}{', started' if self.started else ''})"


class Route:
    """One worker's way to one client: what a MORE head stands for. It exists while a flight of theirs is open.

    `identity` is the worker's routing id, or empty when the relay shall not take its messages on trust.
    """

    __slots__ = ("client", "flights", "head", "identity", "worker")

    def __init__(self, worker: Worker, client: Client, head: bytes) -> None:
        self.worker = worker
        self.identity = worker.identity
        self.client = client
        self.head = head
        self.flights = 0

    def __repr__(self) -> str:
        return f"Route({self.worker.name!r} -> {self.client.number}, {self.flights} flights)"
