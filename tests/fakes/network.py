"""A Broker without sockets or clocks: sends are recorded, time is told, clients and workers say what the test lets them say.

`Network.check` holds at any moment; `Network.assert_clean` when everything has been answered.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.access import Access
from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.delivery import FULL, GONE, SENT
from zmqserve.flight import Envelope, Flight
from zmqserve.registry import Worker

from .scripted import ScriptedClient, ScriptedWorker

STEP_S = 0.25
"""The longest that a controller sleeps."""
VERBS = ["generate", "chat", "embed", "count_tokens", "model_details"]

_to_client = m.decoder(m.ToClient)
_controller_head = m.decoder(m.ControllerHead)


def card(name: str = "m", **fields: Any) -> m.ModelCard:
    """A model that can do everything."""
    return m.ModelCard(name, **{"verbs": VERBS, **fields})


class Network:
    """`gone` and `full` are routing ids whose sends fail in that way. What is sent to one that is FULL still arrives."""

    def __init__(self, seed: int = 1, *, access: Access | None = None, **settings: Any) -> None:
        self.now = 1000.0
        self.config = ControllerConfig(**settings)
        self.gone: set[bytes] = set()
        self.full: set[bytes] = set()
        self.clients: dict[Envelope, ScriptedClient] = {}
        self.workers: dict[bytes, ScriptedWorker] = {}
        self.reports: list[dict[str, Any]] = []
        self.stray: list[bytes] = []
        self._epochs = 1_000_000
        self.broker = Broker(
            self.config,
            controller_id="here",
            version="0",
            send_client=self._send_client,
            send_worker=self._send_worker,
            report=lambda event, **fields: self.reports.append({"event": event, **fields}),
            random=Random(seed),
            new_epoch=self._new_epoch,
            now=self.now,
            access=access,
        )
        self.tick()

    def _new_epoch(self) -> int:
        self._epochs += 1
        return self._epochs

    def _status(self, identity: bytes) -> int:
        if identity in self.gone:
            return GONE
        return FULL if identity in self.full else SENT

    def _send_client(self, envelope: Envelope, payload: bytes) -> int:
        status = self._status(envelope[0])
        if status != GONE:
            client = self.clients.get(envelope)
            if client is None:
                self.stray.append(payload)
            else:
                client.take(_to_client.decode(payload))
        return status

    def _send_worker(self, identity: bytes, head: bytes, payload: bytes) -> int:
        status = self._status(identity)
        if status != GONE and identity in self.workers:
            self.workers[identity].take(_controller_head.decode(head), payload)
        return status

    # --- time

    def tick(self) -> None:
        """Let the broker do what is due."""
        self.broker.tick(self.now)

    def advance(self, seconds: float) -> None:
        """Let time pass as a controller's loop does: from one due time to the next, never sleeping for long."""
        until = self.now + seconds
        while self.now < until:
            due = self.broker.agenda.next_s()
            self.now = min(until, self.now + STEP_S, until if due is None else max(self.now, due))
            self.tick()

    def beat_for(self, seconds: float, *workers: ScriptedWorker) -> None:
        """Let time pass while these workers send their heartbeats."""
        for _ in range(round(seconds / 0.5)):
            self.advance(0.5)
            for worker in workers:
                worker.load()

    # --- peers

    def client(self, *envelope: bytes, user: str | None = None) -> ScriptedClient:
        """A client with this key; without an envelope, on a connection of its own."""
        frames = envelope or (b"\0cl%02d" % len(self.clients),)
        client = self.clients[frames] = ScriptedClient(self, frames, user)
        return client

    def worker(
        self,
        name: str = "w",
        *cards: m.ModelCard,
        register: bool = True,
        identity: bytes | None = None,
        user: str | None = None,
        **offer: Any,
    ) -> ScriptedWorker:
        """A worker of model ``m`` (or the cards given), registered as ready unless told otherwise."""
        identity = identity or b"\0wk%02d" % len(self.workers)
        worker = self.workers[identity] = ScriptedWorker(self, identity, name, list(cards) or [card()], offer, user)
        if register:
            worker.ready()
        return worker

    # --- what must hold

    @property
    def counters(self) -> Counter[str]:
        """The broker's."""
        return self.broker.counters

    def ends(self) -> list[dict[str, Any]]:
        """The broker's line for each request that has ended."""
        return [report for report in self.reports if report["event"] == "request"]

    def check(self) -> None:
        """The books agree with each other."""
        registry, flights = self.broker.registry, self.broker.flights
        opened = [flight for client in flights.clients.values() for flight in client.flights.values()]
        opened += [flight for worker in registry for flight in worker.flights.values() if flight.client.gone]
        assert flights.open == len(opened)
        assert flights.held_bytes == sum(len(flight.payload) for flight in opened)
        self._check_accounts(opened)
        running: list[Flight] = [flight for worker in registry for flight in worker.flights.values()]
        assert flights.running == len(running)
        assert not flights._homeless
        assert not flights._placing
        routes: Counter[bytes] = Counter()
        for worker in registry:
            self._check_worker(worker)
            routes.update(m.more_head(worker.epoch, flight.client.number) for flight in worker.flights.values())
        assert {head: route.flights for head, route in flights.routes.items()} == dict(routes)
        told = Counter(m.more_head(worker.epoch, f.client.number) for worker in registry for f in worker.flights.values() if f.told)
        assert {head: route.told for head, route in flights.routes.items() if route.told} == dict(told)
        waiting: list[Flight] = []
        for client in flights.clients.values():
            assert client.flights, f"{client!r} has nothing open"
            assert not client.gone
            assert client.timer is not None
            assert client.timer.action is not None
            waiting += [flight for flight in client.flights.values() if flight.worker is None]
        by_connection = {(number, client) for group in flights.clients._connections.values() for number, client in group.items()}
        assert by_connection == {(client.number, client) for client in flights.clients.values()}
        assert all(flight.waiting and flight.open for flight in waiting)
        for flight in running:
            assert flight.open
            assert not flight.waiting
            assert flight.client.flights[flight.rid] is flight
            assert flight.ending is not None or not flight.client.gone
        for pool in registry.pools.values():
            mine = [flight for flight in waiting if flight.pool is pool]
            assert len(pool.waiting) == len(mine)
            assert pool.waiting.bytes == sum(len(flight.payload) for flight in mine)
            assert pool.running == sum(flight.pool is pool for flight in running)
            assert pool.workers or pool.orphan_timer is not None
            for flight in mine:
                idle = [w.name for w in pool.workers.values() if w.has_room(flight.need) and pool.serves(w, flight.need)]
                assert not idle, f"{flight!r} waits while {idle} have room"
                assert not pool.hopeless(flight.need) or pool.orphan_timer is not None
        assert sum(len(pool.waiting) for pool in registry.pools.values()) == len(waiting)
        timers = sum(len(worker.timers) for worker in registry) + sum(pool.orphan_timer is not None for pool in registry.pools.values())
        for flight in running + waiting:
            timers += sum(timer is not None and timer.action is not None for timer in (flight.timer, flight.cancel_timer))
        timers += self.broker.members._probe_timer is not None
        assert len(self.broker.agenda) == timers + len(flights.clients)
        for client in flights.clients.values():
            mine = [flight for flight in client.flights.values() if flight.waiting] if client.account is None else []
            assert (client.waiting, client.waiting_bytes) == (len(mine), sum(len(flight.payload) for flight in mine))

    def _check_accounts(self, opened: list[Flight]) -> None:
        """A key's account counts what is open for it, on all its connections, and no more."""
        access = self.broker.access
        accounts = {flight.client.account for flight in opened} | (set(access._accounts.values()) if access is not None else set())
        for account in accounts - {None}:
            assert account is not None
            mine = [flight for flight in opened if flight.client.account is account]
            waiting = [len(flight.payload) for flight in mine if flight.waiting]
            assert account.in_flight == len(mine)
            assert (account.waiting, account.waiting_bytes) == (len(waiting), sum(waiting))

    def _check_worker(self, worker: Worker) -> None:
        slotted = sum(flight.slotted for flight in worker.flights.values())
        assert worker.running == slotted
        assert 0 <= slotted <= self._most_slots(worker)
        assert worker.others >= 0
        for model, share in worker.shares.items():
            assert share.running == sum(flight.slotted and flight.pool.model == model for flight in worker.flights.values())
            assert share.others >= 0
        assert worker.trials == sum(flight.on_trial for flight in worker.flights.values())
        assert self.broker.registry.by_name[worker.name] is worker
        for (number, rid), flight in worker.flights.items():
            assert flight.worker is worker
            assert flight.need.met_by(worker.cards[flight.pool.model])
            assert (flight.client.number, flight.rid) == (number, rid)
        for pool in worker.pools:
            assert pool.workers[worker.identity] is worker

    def _most_slots(self, worker: Worker) -> int:
        """An offer may shrink below what runs."""
        return self.workers[worker.identity].most_slots

    def assert_clean(self) -> None:
        """Nothing is in progress and nothing is left over; each request of a client that lives has ended exactly once."""
        self.check()
        flights = self.broker.flights
        assert not flights.clients
        assert not flights.routes
        assert not flights.running
        assert all(not worker.flights and not worker.running for worker in self.broker.registry)
        assert all(not len(pool.waiting) and not pool.waiting.bytes for pool in self.broker.registry.pools.values())
        for client in self.clients.values():
            for rid in client.asked:
                ends = client.ends(rid)
                assert len(ends) == client.asked[rid] or client.envelope[0] in self.gone, f"rid {rid} ended with {ends}"
