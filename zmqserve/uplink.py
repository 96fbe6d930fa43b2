"""A controller as its parent's worker: it offers what its own workers can do, and passes requests and answers through.

::

    parent ──REQUEST──> Uplink ──> Flights ──REQUEST──> worker, or the next controller below
    parent <──FIRST, MORE, DONE, FAILED── Upward <── Flights <──

Payloads are never changed, and of an answer's only the head is made anew. Pure: `now` and messages are fed in.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING

import msgspec

from . import messages as m
from .endings import error_message
from .errors import BackendError, DuplicateRequest, MalformedMessage, ZmqserveError
from .flight import Client
from .link import MOST_REFUSED_S
from .liveness import Lease
from .need import Need
from .offer import offer

if TYPE_CHECKING:
    from .broker import Broker
    from .link import ControllerLink

LOOK_GAP_S = 0.02
"""Least time between two looks at what has changed below, and so between two announcements."""
HEAD_BYTES = 16
"""By how much an offer without its models may differ in size from what was measured: numbers have as many bytes as they need."""
MOST_NAMED = 20
"""Names in a line of the log."""
NOBODY = b""
"""The routing id of clients that have none. ROUTER sockets know no empty one."""


class Upward:
    """The way to one client of the parent, under the number that the parent gave it, in one registration."""

    __slots__ = ("_epoch", "_more", "_number", "uplink")

    def __init__(self, uplink: Uplink, epoch: int, number: int) -> None:
        self.uplink = uplink
        self._epoch = epoch
        self._number = number
        self._more = m.more_head(epoch, number)

    def __repr__(self) -> str:
        return f"Upward({self.uplink!r}, client {self._number})"

    def first(self, rid: int, payload: bytes, now: float) -> None:
        """The first chunk of a request."""
        self.uplink.post(self._epoch, m.encode(m.WorkerHead(m.FIRST, self._epoch, self._number, rid)), payload, now)

    def more(self, payload: bytes, now: float) -> None:
        """Later chunks, of any requests of the client."""
        self.uplink.post(self._epoch, self._more, payload, now)

    def end(self, rid: int, payload: bytes, now: float, outcome: str, code: int, tokens: tuple[int, int]) -> None:
        """What ends a request."""
        limit = self.uplink.link.message_bytes
        if limit and len(payload) > limit:
            error = BackendError(f"the answer is {len(payload)} bytes long, a controller above takes {limit} bytes a message")
            payload, outcome, code = error_message(rid, error), "failed", error.code
        kind = m.FAILED if code or outcome == "failed" else m.DONE
        head = m.WorkerHead(kind, self._epoch, self._number, rid, outcome if kind == m.DONE else "", code, *tokens)
        self.uplink.post(self._epoch, m.encode(head), payload, now)

    def busy(self, rid: int, now: float) -> None:
        """A request that has no worker here: the parent shall keep it."""
        self.uplink.post(self._epoch, m.encode(m.WorkerHead(m.BUSY, self._epoch, self._number, rid)), b"", now)


class Uplink:
    """The LinkHost of the link to one parent. `attach` gives it that link; `now` is set by whoever feeds the link, before it does.

    The broker ticks those in its `uplinks`. A parent that is lost takes its requests with it and disturbs nobody else.
    """

    link: ControllerLink

    def __init__(self, broker: Broker, name: str, *, report: Callable[..., None], now: float) -> None:
        self.name = name
        self.now = now
        self._broker = broker
        self._report = report
        self._leaves_s: float | None = None
        self._changes = self._moves = -1
        self._look_s = now
        self._models: list[m.ModelCard] = []
        self._left_out: list[str] = []
        self._controllers: list[str] = []
        self._told: m.Ready | None = None
        self._told_others = 0
        self._told_epoch = 0
        self._told_why = ""
        self._refused_s = now

    def __repr__(self) -> str:
        return f"Uplink({self.name!r} to {self.link!r})"

    def attach(self, link: ControllerLink, *, renew: Callable[[], None]) -> None:
        """The link to the parent, and what replaces its connection."""
        self.link = link
        self._renew = renew

    def post(self, epoch: int, head: bytes, payload: bytes, now: float) -> None:
        """Send, or keep for later. A parent that does not read is given up before it costs too much memory."""
        link = self.link
        link.post(epoch, head, payload)
        if link.outbox_bytes > self._broker.config.outbox_bytes:
            self.now = now
            self._broker.counters["parents that did not read"] += 1
            self._report("parent does not read", level="warning", parent=link.endpoint, outbox_bytes=link.outbox_bytes)
            link.give_up(now)

    def tick(self, now: float) -> float:
        """Do what is due; returns when to call again. The broker does this in its own tick."""
        self.now = now
        due_s = inf
        if self._moves != self._broker.registry.moves and self.link.state == "registered":
            if now < self._look_s:
                due_s = self._look_s
            else:
                self._look(now)
        elif self.link.state == "refused" and self._leaves_s is None:
            due_s = self._reconsider(now)
        if self._leaves_s is not None:
            due_s = min(due_s, self._leaves_s)
            if now >= self._leaves_s or not (self._open() or self.link.outbox_bytes):
                self.close(now)
        return min(due_s, self.link.tick(now))

    def close(self, now: float) -> None:
        """Leave the parent: BYE, and what it asked for is cancelled. Harmless when that was done."""
        self.now = now
        self._leaves_s = None
        self.link.close()

    def _look(self, now: float) -> None:
        """Tell the parent what has changed below."""
        self._moves = self._broker.registry.moves
        self._look_s = now + LOOK_GAP_S
        if self._offer() != self._told:
            self.link.announce()
        load = self._load()
        if load.running - load.yours != self._told_others:
            self.link.others_changed(now)

    def _reconsider(self, now: float) -> float:
        """After a refusal for good: register again with an offer that is another, and where the parent has taken this controller before, as
        it is after a minute, since what a parent allows changes as well. Returns when to look again."""
        again_s = self._refused_s + MOST_REFUSED_S if self._told_epoch else inf
        if self._moves != self._broker.registry.moves:
            if now < self._look_s:
                return min(again_s, self._look_s)
            self._moves = self._broker.registry.moves
            self._look_s = now + LOOK_GAP_S
            if _substance(self._offer()) != _substance(self._told):
                again_s = now
        if now >= again_s:
            self.link.ask_again(now)
            return inf
        return again_s

    def _offer(self) -> m.Ready:
        registry = self._broker.registry
        if self._changes != registry.changes:
            self._changes = registry.changes
            self._controllers = [self._broker.controller_id, *sorted({each for worker in registry for each in worker.controllers})]
            # A parent tells nobody how much it takes: as much as this one, unless they were configured to differ.
            room_bytes = self._broker.config.ready_bytes - len(m.encode(self._ready([]))) - HEAD_BYTES
            self._models, left_out = offer(registry.pools.values(), sum(worker.slots for worker in registry), room_bytes)
            if left_out != self._left_out:
                self._left_out = left_out
                if left_out:
                    told = {"names": left_out[:MOST_NAMED], "left_out": len(left_out)}
                    self._broker.report("offer is too large", level="warning", parent=self.link.endpoint, **told)
        return self._ready(self._models)

    def _ready(self, models: list[m.ModelCard]) -> m.Ready:
        broker = self._broker
        registry = broker.registry
        usable = [worker for worker in registry if worker.usable]
        return m.Ready(
            m.PROTOCOL,
            self.name,
            "controller",
            "loading" if all(worker.loading for worker in registry) else "ready",
            models,
            min(m.MAX_SLOTS, sum(worker.trusted for worker in usable)),
            # Load is divided by speed: ten workers together are ten times as fast as one.
            min(m.MAX_SPEED, sum(worker.speed for worker in usable)) or 1.0,
            int(broker.config.ttl_s * 1000),
            self._controllers,
            broker.version,
        )

    def _load(self) -> m.Load:
        """Slots in use, of which `yours` are this parent's: what is neither free nor theirs has been taken by others."""
        taken = sum(worker.trusted - worker.free for worker in self._broker.registry if worker.usable)
        mine = (flight for client in self._clients() for flight in client.flights.values())
        yours = sum(flight.slotted and not flight.told and flight.worker is not None and flight.worker.usable for flight in mine)
        return m.Load(taken, 0, min(taken, yours))

    def _clients(self) -> list[Client]:
        behind = self._broker.flights.clients.behind(NOBODY)
        return [client for client in behind if client.above is not None and client.above.uplink is self]

    def _open(self) -> bool:
        return any(not flight.told for client in self._clients() for flight in client.flights.values())

    @staticmethod
    def _envelope(link: ControllerLink, number: int) -> tuple[bytes, ...]:
        return NOBODY, link.endpoint.encode(), b"%d" % number

    # --- LinkHost

    def ready(self) -> m.Ready:
        """As LinkHost says."""
        self._told = self._offer()
        return self._told

    def load(self, link: ControllerLink) -> m.Load:  # noqa: ARG002 - there is one
        """As LinkHost says."""
        load = self._load()
        self._told_others = load.running - load.yours
        return load

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        """As LinkHost says. The parent keeps the queue, so what takes a slot is taken only if there is one now."""
        try:
            return self._take(link, head, payload)
        except ZmqserveError as error:
            self._broker.counters[f"errors: {type(error).__name__}"] += 1
            failed = m.WorkerHead(m.FAILED, link.epoch, head.client, head.rid, code=error.code)
            self.post(link.epoch, m.encode(failed), error_message(head.rid, error), self.now)
            return True

    def _take(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        broker = self._broker
        header = broker.intake.read(payload)
        if header is None or header.rid != head.rid:
            raise MalformedMessage("not a request that a worker answers, or not the one that its head names")
        # What is left of them counts: they were spent on the way here as well.
        header = msgspec.structs.replace(header, deadline_ms=head.deadline_ms, attempts=head.attempts)
        need = broker.intake.need(header)
        if need.slotted and self._not_now(header.model, need, link):
            return False
        pool = broker.intake.pool(header, need)
        # Where there is room, one that has lost a worker waits here for its trial: BUSY would turn away others of its model as well.
        if need.slotted and not broker.flights.has_room(pool, need._replace(trial=False)):
            return False
        clients = broker.flights.clients
        envelope = self._envelope(link, head.client)
        client = clients.get(envelope)
        if client is not None and head.rid in client.flights:
            raise DuplicateRequest(f"rid {head.rid} is in flight already: draw a new one for each request")
        if client is None:
            client = clients.of(envelope)
            client.above = Upward(self, link.epoch, head.client)
            client.lease = Lease(inf, self.now)  # its own controller watches it
        broker.flights.admit(client, header, need, pool, payload, self.now, head.queue_ms)
        return True

    def _not_now(self, model: str, need: Need, link: ControllerLink) -> bool:
        """Whether there is nobody for it, but no error: this controller leaves, the model is loading, or the parent has not heard yet
        of what has gone and will find another way."""
        if self._leaves_s is not None:
            return True
        pool = self._broker.registry.find(model)
        if pool is not None and (pool.state != "ready" or pool.can(need)):
            return pool.state != "ready"
        return not link.known or self._offer() != self._told

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None:
        """As LinkHost says."""
        known = self._broker.flights.clients.get(self._envelope(link, client))
        flight = known.flights.get(rid) if known is not None else None
        if flight is not None:
            self._broker.flights.cancel(flight, self.now, "cancelled")

    def abort(self, link: ControllerLink) -> None:  # noqa: ARG002 - there is one
        """As LinkHost says."""
        for client in self._clients():
            self._broker.flights.delivery.detach(client, self.now, "parent gone")

    def drain(self, grace_s: float | None) -> None:
        """As LinkHost says: this parent only is left, when its requests have ended or after `grace_s`."""
        if self._leaves_s is None and self.link.state == "registered":
            self._leaves_s = self.now + (self._broker.config.drain_grace_s if grace_s is None else grace_s)
            self._report("parent drains this controller", parent=self.link.endpoint)
            self.link.drain()

    def fresh_socket(self, link: ControllerLink) -> None:  # noqa: ARG002 - there is one
        """As LinkHost says."""
        self._renew()

    def changed(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        refusal, told = link.refusal, {"parent": link.endpoint, "controller": link.controller}
        if link.silent:
            self._report("parent silent", level="warning", **told)
        elif link.state == "registered":
            if link.epoch != self._told_epoch:
                self._told_epoch = link.epoch
                self._told_why = ""
                self._report("registered with parent", **told, name=self.name)
        elif link.state == "refused" and refusal is not None:
            self._refused_s = self.now
            if refusal.why != self._told_why:
                self._told_why = refusal.why
                self._report("parent refused", level="error", **told, why=refusal.why)
        elif link.state == "registering" and refusal is not None:
            again = {"why": refusal.why, "retry_after_ms": refusal.retry_after_ms}
            self._report("parent refused for now", level="error", **told, **again)
        elif link.state == "registering":
            self._report("parent gone", level="warning", **told)


def _substance(ready: m.Ready | None) -> object:
    """What of an offer a parent may refuse: not what merely comes and goes with the workers' states."""
    return ready and (ready.models, ready.slots, ready.controllers)
