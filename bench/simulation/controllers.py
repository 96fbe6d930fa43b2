"""A controller: the real Broker, Relay and Ports on simulated ROUTER sockets. Its loop is that of zmqserve.controller."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any, cast

from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.link import ControllerLink
from zmqserve.port import Port
from zmqserve.relay import Relay
from zmqserve.uplink import Uplink

from .network import Network
from .node import Node
from .sockets import DealerSocket, serve_link
from .world import World

MOST_SLEEP = 1 / 3
"""Of its ttl. The real loop sleeps less; half of a ttl would mean that the process was stopped."""


class ControllerNode(Node):
    """`parents`: worker sides of the controllers that it is a worker of."""

    def __init__(
        self, world: World, network: Network, name: str, config: ControllerConfig, *, parents: Sequence[str] = (), lag_s: float = 0.0
    ) -> None:
        super().__init__(world, network, name, lag_s=lag_s)
        self.config = config
        self.parents = tuple(parents)
        self.client_endpoint, self.worker_endpoint = f"tcp://{name}:5570", f"tcp://{name}:5571"

    def begin(self) -> None:
        random = Random(self.random.getrandbits(64))
        self._leaving = False
        self.clients = self.network.router(self, self.client_endpoint)
        self.workers = self.network.router(self, self.worker_endpoint)
        config = self.config
        clients = Port(cast("Any", self.clients), config.outbox_bytes, total_bytes=config.outbox_total_bytes)
        workers = Port(cast("Any", self.workers), config.outbox_bytes)
        self.broker = broker = Broker(
            config,
            controller_id=f"{self.name}.{self.life}",
            version="0",
            send_client=lambda envelope, payload: clients.post(*envelope, payload),
            send_worker=workers.send,
            post_worker=workers.post,
            report=self._report,
            random=random,
            new_epoch=lambda: random.getrandbits(63) | 1,
            now=self.clock_s,
        )
        broker.outbox_bytes = lambda: clients.waiting_bytes + workers.waiting_bytes
        self.relay = Relay(broker, clients, workers)
        self.relay.clock = lambda: 0.0  # a turn takes no time
        self.uplinks: dict[Uplink, DealerSocket] = {}
        for endpoint in self.parents:
            self._climb(endpoint)
        self._most_sleep_s = MOST_SLEEP * config.ttl_s

    def finish(self) -> None:
        self.clients.close(graceful=self._leaving)
        self.workers.close(graceful=self._leaving)
        for dealer in self.uplinks.values():
            dealer.close(graceful=self._leaving)

    def stop(self) -> None:
        """SIGTERM: clients are told, then it ends."""
        if self.alive and not self.paused:
            self.world.note(f"{self.name} shuts down")
            self._leaving = True
            self.broker.shut_down(self.clock_s)
            self.leave()

    def _climb(self, endpoint: str) -> None:
        """Become a worker of a parent."""
        now = self.clock_s

        def send(head: bytes, payload: bytes) -> bool:
            return self.uplinks[uplink].send(head, payload)

        def renew() -> None:
            self.uplinks[uplink].close()
            self.uplinks[uplink] = DealerSocket(self.network, self, endpoint)

        uplink = Uplink(self.broker, self.name, report=self._report, now=now)
        random = Random(self.random.getrandbits(64))
        link = ControllerLink(endpoint, uplink, send, ttl_s=self.config.ttl_s, random=random, now=now)
        uplink.attach(link, renew=renew)
        self.broker.uplinks.append(uplink)
        self.uplinks[uplink] = DealerSocket(self.network, self, endpoint)

    def _from_parents(self, now: float) -> None:
        for uplink in self.uplinks:
            uplink.now = now
            serve_link(uplink.link, self.uplinks, uplink, now)

    def turn(self, now: float) -> float:
        relay = self.relay
        if self.workers.waiting:
            relay.from_workers(now, self.workers.waiting)
        if self.clients.waiting:
            relay.from_clients(now, self.clients.waiting)
        if self.workers.broke:
            self.workers.broke = 0
            self.broker.members.disconnected(now)
        if self.uplinks:
            self._from_parents(now)
        due_s = self.broker.tick(now)
        when_s = now + self._most_sleep_s if due_s is None else min(due_s, now + self._most_sleep_s)
        if relay.clients.outboxes or relay.workers.outboxes:
            relay.flush(now)
            retry_s = relay.next_s()
            when_s = when_s if retry_s is None else min(when_s, retry_s)
        return when_s

    def _report(self, event: str, **fields: object) -> None:
        if self.world.log is not None:
            self.world.say(f"{self.name}: {event} " + " ".join(f"{name}={value!r}" for name, value in fields.items()))
