"""One request in progress (a flight), whose it is (a client) and the way its tokens take (a route)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from .liveness import Lease, Timer
from .messages import RequestHeader

if TYPE_CHECKING:
    from .need import Need
    from .registry import Pool, Worker
    from .uplink import Upward

Envelope: TypeAlias = tuple[bytes, ...]
"""The frames before a client's payload: its connection's routing id, and those that devices and REQ sockets put behind it."""


class Client:
    """Who asked. It exists while it has flights; `number` is what workers know it by, and is never used twice.

    `gone`: nothing is sent to it any more; its flights are only waited for. `above`: the way to it, where it is a parent's client.
    `waiting`: those of its flights that stand in a queue.
    """

    __slots__ = ("above", "envelope", "flights", "gone", "lease", "number", "timer", "waiting", "waiting_bytes")

    def __init__(self, envelope: Envelope, number: int) -> None:
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


class Flight:
    """One request, `open` until it is settled. It is `waiting` while it stands in a queue, has a `worker` while one answers it
    (neither, for a moment, while its worker is lost), and has `started` once its first chunk has gone to the client.

    `attempts`: workers that it has lost, `attempts_before` when it came. `queued_ms`: what it waited in the controllers above.
    `told`: the client has had its end, and only its worker has not let go of it yet. `on_trial`: its worker tries it (see Need)."""

    __slots__ = (
        "affinity",
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
        self.avoid: frozenset[str] = frozenset()
        self.timer: Timer | None = None
        self.cancel_timer: Timer | None = None

    def __repr__(self) -> str:
        state = "waiting" if self.worker is None else f"on {self.worker.name!r}"
        return f"Flight(rid={self.rid}, {self.need.verb} {self.pool.model!r}, {state}{', started' if self.started else ''})"


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
