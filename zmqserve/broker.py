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
from .access import UNREAD, Access, Account, Keys, unauthenticated
from .beginning import tag_and_rid
from .bounds import check_routing_id, check_size
from .carried import attempts_below, is_controllers, is_pieces, is_word_of
from .config import ControllerConfig
from .controls import Controls
from .dispatch import POLICIES, Policy
from .endings import REFUSED, count_error, error_message
from .errors import (
    BackendError,
    DeadlineExceeded,
    DuplicateRequest,
    GoingAway,
    MalformedMessage,
    ZmqserveError,
)
from .flight import Client, Envelope, Flight, Route
from .flights import Flights
from .intake import Intake
from .liveness import Agenda
from .loglimit import LogLimit
from .membership import Membership
from .pool import NewPolicy
from .registry import Registry, Worker
from .rules import Rules
from .uplink import Uplink
from .waiting import Crowd, WaitingRoom

OF_A_FLIGHT = frozenset({m.FIRST, m.DONE, m.FAILED, m.BUSY})
"""Kinds of what a worker says of one request."""
NO_REQUESTS = (1, 9, 10)
"""Tags of Hello, Cancel and Ping: an error about one of these is none of a request."""
CONTROL_BYTES = 2**20
"""What a message may have that is no request: a Ping with as many rids as it may has less."""


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
        post_worker: Callable[[bytes, bytes, bytes], int] | None = None,
        access: Access | None = None,
    ) -> None:
        """`post_worker` is as `send_worker`, but may send a request some others later, and who is gone is told then."""
        self.config = config
        self.access = access
        self.controller_id = controller_id
        self.version = version
        self.started_s = now
        self.agenda = Agenda()
        self.report = LogLimit(report, now)
        turns, crowd = count(1), Crowd()
        self.registry = Registry(self._new_policy, lambda: WaitingRoom(config, turns, crowd))
        self.flights = Flights(
            config,
            self.registry,
            self.agenda,
            crowd=crowd,
            send_client=send_client,
            send_worker=post_worker or send_worker,
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
            report=self.report,
            new_epoch=new_epoch,
            access=access,
        )
        self.controls = Controls(self, send_client, send_worker)
        self.intake = Intake(self.registry, config.max_attempts)
        self.uplinks: list[Uplink] = []
        self.counters = self.flights.counters
        self.endpoints: tuple[list[str], list[str]] = ([], [])
        self.outbox_bytes: Callable[[], int] = lambda: 0
        self.outbox_drops: Callable[[], int] = lambda: 0
        self._send_client, self._send_worker = send_client, send_worker
        self._ticked_s = now
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
        self.report.tick(now)
        self.agenda.run(now)
        due_s = self.agenda.next_s()
        for uplink in self.uplinks:
            uplink_s = uplink.tick(now)
            due_s = uplink_s if due_s is None else min(due_s, uplink_s)
        return due_s

    # --- from clients

    def from_client(self, now: float, envelope: Envelope, payload: bytes, user: str | None = None) -> None:
        """Take one client-side message. `user`: the key that its sender has proven to have; None for peers in this process."""
        try:
            account = self.access.account(user, now) if self.access is not None and user is not None else None
            client = self.flights.clients.get(envelope)
            if client is not None and client.account is not account:  # it has gone, and another has taken its routing id
                self.flights.delivery.detach(client, now, "client gone")
                client = None
            if account is not None and client is None:
                check_routing_id(envelope[0])
            check_size(self.config, len(payload))
            header = self.intake.read(payload)
            if header is not None:
                self._request(now, envelope, client, account, header, payload)
            else:
                self.controls.take(now, envelope, client, account, self._message(now, account, payload))
        except ZmqserveError as error:
            count_error(self.counters, error)
            tag, rid = tag_and_rid(payload)
            self._send_client(envelope, error_message(rid if tag not in NO_REQUESTS and rid <= m.MAX_RID else 0, error))

    def _message(self, now: float, account: Account | None, payload: bytes) -> object:
        """A message that is no request with a good header. What is long is not looked at: reading it may take a hundred times as long as
        refusing it."""
        try:
            if len(payload) > CONTROL_BYTES:
                text = (
                    f"{len(payload)} bytes that are no request, or one whose header cannot be read: such a message may have {CONTROL_BYTES}"
                )
                raise MalformedMessage(text, data={"limit": CONTROL_BYTES})
            return m.read(self._messages, payload)
        except ZmqserveError:
            if account is not None:
                account.count(now)
            raise

    def _request(
        self, now: float, envelope: Envelope, known: Client | None, account: Account | None, header: m.RequestHeader, payload: bytes
    ) -> None:
        intake = self.intake
        need = intake.need(header)
        if known is not None:
            if header.rid in known.flights:
                raise DuplicateRequest(f"rid {header.rid} is in flight already: draw a new one for each request")
            if known.lease is not None:
                known.lease.heard_s = now
        if account is None:
            pool = intake.pool(header, need)
        else:
            account.count(now)
            verb = intake.verb(header, payload, account)
            account.check_request(now, verb, header)
            pool = intake.pool(header, need, account, verb)
        self.flights.admit(known or self.flights.clients.of(envelope, account), header, need, pool, payload, now)

    # --- from workers

    def from_worker(
        self, now: float, identity: bytes, head_bytes: bytes, payload: bytes, certain: bool = True, user: str | None = None
    ) -> None:
        """Take one worker-side message. MORE in its canonical form goes past here, by `flights.routes`.

        Without `certain` the frames may be ones that another peer forged by sending too many (see relay.py): then only
        what repeats a secret of the sender counts, its epoch or the number that came with REREGISTER. `user`: as for clients; UNREAD
        where the message was put together from what a reader out of step had read.
        """
        worker = self.registry.workers.get(identity)
        if worker is not None and self.access is not None and user not in (UNREAD, worker.user):
            if not certain:  # another's frame behind its routing id
                self.counters["dropped: forged"] += 1
                return
            self.members.lose(worker, "connection lost", now)  # and its routing id has been taken by another
            worker = None
        try:
            head = self._heads.decode(head_bytes)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            self.counters["dropped: malformed head"] += 1
            if certain:
                self.members.violation(now, identity, "its head is not one of this protocol")
            return
        if head.kind == m.READY:
            self._ready(now, identity, worker, head.epoch, payload, certain, user)
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
                self.pieces(now, route, payload)
        elif head.kind in OF_A_FLIGHT:
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

    def held(self) -> dict[str, int]:
        """What memory goes to, as far as a broker knows. libzmq's own is not among it: messages that were never finished, and buffers."""
        flights, registry = self.flights, self.registry
        return {
            "outbox_bytes": self.outbox_bytes(),
            "waiting_bytes": sum(pool.waiting.bytes for pool in registry.pools.values()),
            "request_bytes": flights.held_bytes,
            "requests": flights.open,
            "clients": len(flights.clients),
            "workers": len(registry.workers),
        }

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

    def keys_changed(self, now: float, keys: Keys, rules: Rules | None) -> None:
        """Other keys are let in than before, or other rules hold (None: the same). What is not allowed any more ends."""
        access = self.access
        if access is None:
            raise RuntimeError("this controller was started without keys")
        access.renew(keys, rules, now)
        for worker in list(self.registry):
            if worker.user is not None and (why := access.unfit(worker.user, worker.name, worker.cards.values())):
                self.members.fence(worker, why, now, clean=True, told=REFUSED)
        for client in list(self.flights.clients.values()):
            if client.account is not None and client.account.key not in keys.clients:
                self.flights.delivery.detach(client, now, "key revoked", unauthenticated())

    def _ready(
        self, now: float, identity: bytes, worker: Worker | None, number: int, payload: bytes, certain: bool, user: str | None
    ) -> None:
        """READY registers a worker, anew with 0 or the number that came with REREGISTER; with its epoch it changes what it offers."""
        # Of several that are under way the last must win, so an unknown worker's changes of a registration that is over don't count.
        meant = (certain and number == 0) or (number == worker.epoch if worker is not None else self.members.was_told(identity, number))
        if meant:
            self.members.register(now, identity, payload, update=worker is not None and number == worker.epoch, user=user)
        elif worker is None:
            self.members.tell_to_register(now, identity)
        else:
            self.counters["dropped: stale epoch"] += 1

    def pieces(self, now: float, route: Route, payload: bytes) -> None:
        """What came by MORE for the route's client."""
        if is_pieces(payload):
            self.flights.delivery.chunks(route.client, payload, now)
        else:
            self.members.violation(now, route.worker.identity, "its MORE carries what is no Chunk or Chunks")

    def _of_flight(self, now: float, worker: Worker, flight: Flight, head: m.WorkerHead, payload: bytes) -> None:
        flights = self.flights
        if head.kind != m.BUSY and not is_word_of(head.kind, flight.rid, payload):
            what = f"what it says of request {flight.rid} is not of it, or not a worker's to say (kind {head.kind})"
            self.members.violation(now, worker.identity, what)
            return
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
        if head.kind == m.FAILED and worker.controllers and flights.lost_below(flight, attempts_below(payload), now):
            return
        outcome, code = head.outcome, 0
        if head.kind == m.FAILED:
            if is_controllers(payload):
                wrong = BackendError(f"worker {worker.name} failed it with an error that is a controller's to say (code {head.code})")
                payload, code = error_message(flight.rid, wrong), wrong.code
            else:
                code = head.code
            outcome = "deadline" if code == DeadlineExceeded.code else "failed"  # its worker has a clock as well
        elif outcome == "failed":
            outcome = "ok"
        if flight.ending is not None and (outcome == "cancelled" or flight.client.gone):
            outcome = flight.ending
            if outcome == "deadline":
                late = DeadlineExceeded("the deadline passed while the worker answered")
                payload, code = error_message(flight.rid, late), late.code
        if worker.hung_s is not None and flight.slotted and head.kind == m.DONE and head.outcome != "cancelled":
            self.registry.steps(worker)
        if worker.stalled_s is not None:
            self.members.let_go(worker, flight)
        flights.settle(flight, now, outcome, payload, code, (head.prompt_tokens, head.completion_tokens))
