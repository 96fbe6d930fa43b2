"""What clients ask of a controller itself, and not of a worker. Pure, as broker.py, of which this is a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import messages as m
from .delivery import SENT
from .errors import InvalidParameter, MalformedMessage, ProtocolMismatch
from .liveness import Lease
from .status import model_status, snapshot

if TYPE_CHECKING:
    from .access import Account
    from .broker import Broker
    from .flight import Client, Envelope


class Controls:
    """Answers the broker's clients: Hello, Ping, Cancel, ListModels, Status and Drain."""

    def __init__(
        self, broker: Broker, send_client: Callable[[Envelope, bytes], int], send_worker: Callable[[bytes, bytes, bytes], int]
    ) -> None:
        self._broker = broker
        self._send_client, self._send_worker = send_client, send_worker

    def __repr__(self) -> str:
        return f"Controls({self._broker!r})"

    def take(self, now: float, envelope: Envelope, client: Client | None, account: Account | None, message: object) -> None:
        """Take one message. `client`: who that is, if it has requests open; `account`: its key's, if it has one."""
        if account is not None:
            _permit(now, account, message)
        match message:
            case m.Cancel(rid=rid):
                flight = client.flights.get(rid) if client is not None else None
                if flight is not None:
                    self._broker.flights.cancel(flight, now, "cancelled")
            case m.Ping():
                self._ping(now, envelope, client, message)
            case m.Hello():
                self._hello(envelope, message)
            case m.ListModels(rid=rid):
                models = [model_status(pool, account) for pool in self._broker.intake.models(account)]
                self._send_client(envelope, m.encode(m.Models(rid, models)))
            case m.Status(rid=rid):
                self._send_client(envelope, m.encode(m.StatusReply(rid, snapshot(self._broker, now, account))))
            case m.Drain():
                self._drain(now, envelope, message)
            case _:
                raise MalformedMessage(f"{type(message).__name__}: no header could be read")

    def _hello(self, envelope: Envelope, hello: m.Hello) -> None:
        if hello.protocol != m.PROTOCOL:
            text = f"this controller speaks protocol {m.PROTOCOL}, the client {hello.protocol}: use the same major version on both"
            raise ProtocolMismatch(text, data={"controller": m.PROTOCOL, "client": hello.protocol})
        broker, config = self._broker, self._broker.config
        limits = m.Limits(
            message_bytes=config.message_bytes,
            queue_requests=config.queue_requests,
            queue_bytes=config.queue_bytes,
            default_deadline_ms=int(config.default_deadline_s * 1000),
            ttl_ms=int(config.ttl_s * 1000),
            client_requests=config.client_requests,
            client_bytes=config.client_bytes,
        )
        self._send_client(envelope, m.encode(m.Welcome(m.PROTOCOL, broker.controller_id, limits, broker.version)))

    def _ping(self, now: float, envelope: Envelope, client: Client | None, ping: m.Ping) -> None:
        broker = self._broker
        if client is not None:
            # A longer silence would get a client more patience than one has that never Pings.
            ttl_s = min(ping.ttl_ms / 1000, broker.config.default_deadline_s)
            if client.lease is None:
                client.lease = Lease(ttl_s, now)
                broker.flights.deadlines.watch(client, now)
            client.lease.heard_s, client.lease.ttl_s = now, ttl_s
            if client.timer is not None and client.lease.ends_s < client.timer.when_s:
                broker.flights.deadlines.watch(client, now)
        held = client.flights if client is not None else {}
        unknown = [rid for rid in ping.rids if rid not in held or held[rid].told]
        self._send_client(envelope, m.encode(m.Pong(broker.controller_id, unknown)))

    def _drain(self, now: float, envelope: Envelope, drain: m.Drain) -> None:
        broker = self._broker
        worker = broker.registry.by_name.get(drain.worker)
        if worker is None:
            names = sorted(broker.registry.by_name)
            raise InvalidParameter(
                f"no worker is named {drain.worker!r}; there are: {', '.join(names[:20]) or 'none'}",
                data={"parameter": "worker", "known": names[:100]},
            )
        grace_ms = drain.grace_ms or int(broker.config.drain_grace_s * 1000)
        broker.members.start_draining(worker)
        head = m.ControllerHead(m.DRAIN, worker.epoch, deadline_ms=grace_ms)
        if self._send_worker(worker.identity, m.encode(head), b"") != SENT:
            broker.members.lose(worker, "connection lost", now)
        self._send_client(envelope, m.encode(m.DrainReply(drain.rid, drain.worker, worker.running)))


def _permit(now: float, account: Account, message: object) -> None:
    """Raises what keeps a key from this. A Hello, Cancel or Ping is free: it is about what the client has itself."""
    match message:
        case m.ListModels():
            account.count(now)
            account.check("models")
        case m.Status():
            account.count(now)
            account.check("status")
        case m.Drain():
            account.count(now)
            account.check_admin("drain a worker")
