"""What a controller does with a message and with time passing. Pure: it owns no socket, thread or clock.

It is fed `(now, peer, message)` and given ways to send. The same code runs over ZeroMQ (controller.py) and in tests and
simulations. No input may make it raise: what is wrong is answered, counted and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from random import Random

import msgspec

from . import messages as m
from .config import ControllerConfig
from .delivery import SENT
from .dispatch import POLICIES, Policy
from .endings import error_message
from .errors import (
    DeadlineExceeded,
    DuplicateRequest,
    GoingAway,
    InvalidParameter,
    MalformedMessage,
    ProtocolMismatch,
    ZmqserveError,
)
from .flight import Envelope, Flight
from .flights import Flights
from .intake import Intake
from .liveness import Agenda, Lease
from .membership import Membership
from .registry import NewPolicy, Registry, Worker
from .status import model_status, snapshot
from .uplink import Uplink
from .waiting import WaitingRoom


class Broker:
    """The controller's state machine."""

    def __init__(
        self,
        config: ControllerConfig,
        *,
        controller_id: str,
        version: str,
        send_client: Callable[[Envelope, bytes], int],
        send_worker: Callable[[bytes, bytes, bytes], int],
        report: Callable[..., None],
        random: Random,
        new_epoch: Callable[[], int],
        now: float,
    ) -> None:
        self.config = config
        self.controller_id = controller_id
        self.version = version
        self.started_s = now
        self.agenda = Agenda()
        turns = count(1)
        self.registry = Registry(self._new_policy, lambda: WaitingRoom(config, turns))
        self.flights = Flights(
            config,
            self.registry,
            self.agenda,
            send_client=send_client,
            send_worker=send_worker,
            lose=lambda worker, why, now: self.members.lose(worker, why, now),
            look_after=lambda pool, now: self.members.look_after(pool, now),
            report=report,
            random=random,
        )
        self.members = Membership(
            config,
            self.registry,
            self.flights,
            self.agenda,
            controller_id=controller_id,
            version=version,
            send_worker=send_worker,
            report=report,
            new_epoch=new_epoch,
        )
        self.intake = Intake(self.registry, config.max_attempts)
        self.uplinks: list[Uplink] = []
        self.counters = self.flights.counters
        self.endpoints: tuple[list[str], list[str]] = ([], [])
        self.outbox_bytes: Callable[[], int] = lambda: 0
        self.outbox_drops: Callable[[], int] = lambda: 0
        self._send_client, self._send_worker = send_client, send_worker
        self._ticked_s = now
        self._peek = msgspec.msgpack.Decoder(m.Peek)
        self._messages = m.decoder(m.FromClient)
        self._heads = msgspec.msgpack.Decoder(m.WorkerHead)

    def __repr__(self) -> str:
        return f"Broker({self.controller_id!r}, {self.registry!r}, {self.flights!r})"

    def _new_policy(self, free: Callable[[Worker], int]) -> Policy[Worker]:
        policy: NewPolicy = POLICIES[self.config.dispatch]  # type: ignore[assignment]
        return policy(free)

    # --- time

    def tick(self, now: float) -> float | None:
        """Do what is due; returns when the next thing is, or None.

        A process that was stopped (SIGSTOP, a closed laptop) finds every lease expired though the heartbeats lie in its
        sockets: after a gap all leases begin anew.
        """
        if now - self._ticked_s > self.config.ttl_s / 2:
            self.counters["pauses"] += 1
            for worker in self.registry:
                worker.lease.heard_s = max(worker.lease.heard_s, now)
            for client in self.flights.clients.values():
                if client.lease is not None:
                    client.lease.heard_s = max(client.lease.heard_s, now)
        self._ticked_s = now
        self.agenda.run(now)
        due_s = self.agenda.next_s()
        for uplink in self.uplinks:
            uplink_s = uplink.tick(now)
            due_s = uplink_s if due_s is None else min(due_s, uplink_s)
        return due_s

    # --- from clients

    def from_client(self, now: float, envelope: Envelope, payload: bytes) -> None:
        """Take one client-side message."""
        header = self.intake.read(payload)
        try:
            if header is not None:
                self._request(now, envelope, header, payload)
            else:
                self._control(now, envelope, m.read(self._messages, payload))
        except ZmqserveError as error:
            self.counters[f"errors: {type(error).__name__}"] += 1
            self._send_client(envelope, error_message(self._rid_of(payload), error))

    def _rid_of(self, payload: bytes) -> int:
        try:
            peek = self._peek.decode(payload)
        except (msgspec.DecodeError, RecursionError):
            return 0
        return peek.rid if peek.tag not in (1, 10) and 0 < peek.rid <= m.MAX_RID else 0

    def _request(self, now: float, envelope: Envelope, header: m.RequestHeader, payload: bytes) -> None:
        need = self.intake.need(header)
        known = self.flights.clients.get(envelope)
        if known is not None:
            if header.rid in known.flights:
                raise DuplicateRequest(f"rid {header.rid} is in flight already: draw a new one for each request")
            if known.lease is not None:
                known.lease.heard_s = now
        pool = self.intake.pool(header, need)
        self.flights.admit(known or self.flights.clients.of(envelope), header, need, pool, payload, now)

    def _control(self, now: float, envelope: Envelope, message: object) -> None:
        """A message for the controller itself."""
        match message:
            case m.Cancel(rid=rid):
                client = self.flights.clients.get(envelope)
                flight = client.flights.get(rid) if client is not None else None
                if flight is not None:
                    self.flights.cancel(flight, now, "cancelled")
            case m.Ping():
                self._ping(now, envelope, message)
            case m.Hello():
                self._hello(envelope, message)
            case m.ListModels(rid=rid):
                models = [model_status(pool) for pool in self.registry.pools.values() if pool.workers]
                self._send_client(envelope, m.encode(m.Models(rid, models)))
            case m.Status(rid=rid):
                self._send_client(envelope, m.encode(m.StatusReply(rid, snapshot(self, now))))
            case m.Drain():
                self._drain(now, envelope, message)
            case _:
                raise MalformedMessage(f"{type(message).__name__}: no header could be read")

    def _hello(self, envelope: Envelope, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            text = f"this controller speaks protocol {m.PROTOCOL}, the client {hello.protocol}: use the same major version on both"
            raise ProtocolMismatch(text, data={"controller": m.PROTOCOL, "client": hello.protocol})
        config = self.config
        limits = m.Limits(
            message_bytes=config.message_bytes,
            queue_requests=config.queue_requests,
            queue_bytes=config.queue_bytes,
            default_deadline_ms=int(config.default_deadline_s * 1000),
            ttl_ms=int(config.ttl_s * 1000),
            client_requests=config.client_requests,
            client_bytes=config.client_bytes,
        )
        self._send_client(envelope, m.encode(m.Welcome(m.PROTOCOL, self.controller_id, limits, self.version)))

    def _ping(self, now: float, envelope: Envelope, ping: m.Ping) -> None:
        client = self.flights.clients.get(envelope)
        if client is not None:
            if client.lease is None:
                client.lease = Lease(ping.ttl_ms / 1000, now)
                self.flights.deadlines.watch(client, now)
            client.lease.heard_s, client.lease.ttl_s = now, ping.ttl_ms / 1000
        held = client.flights if client is not None else {}
        self._send_client(envelope, m.encode(m.Pong(self.controller_id, [rid for rid in ping.rids if rid not in held or held[rid].told])))

    def _drain(self, now: float, envelope: Envelope, drain: m.Drain) -> None:
        worker = self.registry.by_name.get(drain.worker)
        if worker is None:
            names = sorted(self.registry.by_name)
            raise InvalidParameter(
                f"no worker is named {drain.worker!r}; there are: {', '.join(names[:20]) or 'none'}",
                data={"parameter": "worker", "known": names[:100]},
            )
        grace_ms = drain.grace_ms or int(self.config.drain_grace_s * 1000)
        self.members.start_draining(worker)
        head = m.ControllerHead(m.DRAIN, worker.epoch, deadline_ms=grace_ms)
        if self._send_worker(worker.identity, m.encode(head), b"") != SENT:
            self.members.lose(worker, "connection lost", now)
        self._send_client(envelope, m.encode(m.DrainReply(drain.rid, drain.worker, worker.running)))

    # --- from workers

    def from_worker(self, now: float, identity: bytes, head_bytes: bytes, payload: bytes, certain: bool = True) -> None:
        """Take one worker-side message. MORE in its canonical form goes past here, by `flights.routes`.

        Without `certain` the frames may be ones that another peer forged by sending too many (see relay.py): then only
        what repeats a secret of the sender counts, its epoch or the number that came with REREGISTER.
        """
        worker = self.registry.workers.get(identity)
        try:
            head = self._heads.decode(head_bytes)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self.counters["dropped: malformed head"] += 1
            if certain:
                self.members.violation(now, identity, "its head is not one of this protocol")
            return
        if head.kind == m.READY:
            self._ready(now, identity, worker, head.epoch, payload, certain)
            return
        if worker is None:
            self.counters["dropped: unknown worker"] += 1
            self.members.tell_to_register(now, identity)
            return
        if head.epoch != worker.epoch:
            self.counters["dropped: stale epoch"] += 1
            return
        worker.lease.heard_s = now
        if head.kind == m.MORE:
            route = self.flights.routes.get(m.more_head(head.epoch, head.client))
            if route is None or route.told == route.flights:
                self.counters["dropped: no open flight"] += 1
            else:
                self.flights.delivery.chunks(route.client, payload, now)
        elif head.kind in (m.FIRST, m.DONE, m.FAILED, m.BUSY):
            flight = worker.flights.get((head.client, head.rid))
            if flight is None:
                self.counters["dropped: no open flight"] += 1
            else:
                self._of_flight(now, worker, flight, head, payload)
        elif head.kind == m.LOAD:
            self.members.load(now, worker, payload)
        elif head.kind == m.DRAINING:
            self.members.start_draining(worker)
        elif head.kind == m.BYE:
            self.members.lose(worker, "it left", now, clean=True)
        else:
            self.members.violation(now, identity, f"kind {head.kind} is not one that a worker sends")

    def shut_down(self, now: float) -> bool:
        """The controller is leaving: it says BYE to its parents, every request ends as GoingAway, and workers stop what they run for it.

        Returns whether anybody had to be told.
        """
        for uplink in self.uplinks:
            uplink.close(now)
        clients = list(self.flights.clients.values())
        for client in clients:
            self._send_client(client.envelope, m.encode(m.GoAway("the controller is shutting down")))
            self.flights.delivery.detach(client, now, "shut down", GoingAway("the controller is shutting down", retry_after_ms=1000))
        return bool(clients or self.uplinks)

    def _ready(self, now: float, identity: bytes, worker: Worker | None, number: int, payload: bytes, certain: bool) -> None:
        """READY registers a worker, anew with 0 or the number that came with REREGISTER; with its epoch it changes what it offers."""
        # Of several that are under way the last must win, so an unknown worker's changes of a registration that is over don't count.
        meant = (certain and number == 0) or (number == worker.epoch if worker is not None else self.members.was_told(identity, number))
        if meant:
            self.members.register(now, identity, payload, update=worker is not None and number == worker.epoch)
        elif worker is None:
            self.members.tell_to_register(now, identity)
        else:
            self.counters["dropped: stale epoch"] += 1

    def _of_flight(self, now: float, worker: Worker, flight: Flight, head: m.WorkerHead, payload: bytes) -> None:
        flights = self.flights
        if head.kind == m.FIRST:
            if not flight.started:
                flights.started(flight, now)
            if flight.open and not flight.told:  # what was fed to its worker then may have found that one gone
                flights.delivery.first(flight, payload, now)
            return
        if head.kind == m.BUSY:
            if flight.started or not flight.slotted:
                self.members.violation(now, worker.identity, "it said BUSY to a request that had begun or takes no slot")
            else:
                flights.busy(flight, now)
            return
        outcome, code = head.outcome, head.code
        if head.kind == m.FAILED:
            outcome = "deadline" if code == DeadlineExceeded.code else "failed"  # its worker has a clock as well
        if flight.ending is not None and (head.outcome == "cancelled" or flight.client.gone):
            outcome = flight.ending
            if outcome == "deadline":
                late = DeadlineExceeded("the deadline passed while the worker answered")
                payload, code = error_message(flight.rid, late), late.code
        if worker.stalled_s is not None and not any(other.ending for other in worker.flights.values() if other is not flight):
            self.members.unstall(worker)
        flights.settle(flight, now, outcome, payload, code, (head.prompt_tokens, head.completion_tokens))
