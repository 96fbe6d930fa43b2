"""A controller's state machine without sockets: workers that took requests, clients that ask, and what ends a request."""

from __future__ import annotations

from random import Random

from zmqserve import messages as m
from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.delivery import SENT
from zmqserve.flight import Envelope

NOW = 1.0
MANY = 10**6
"""Beyond what any bound here turns away."""
TTL_MS = 10**7
KEYS = 1000
"""Sessions, for requests that have one."""


class PureBroker:
    """A Broker that serves `workers` workers of `slots` slots, each of them all of `models` models, to `clients` clients.

    Each request of `prompt_bytes` is for one of the models, drawn at random, and with `affinity` of one of KEYS sessions.
    """

    def __init__(
        self,
        workers: int,
        *,
        slots: int = 8,
        models: int = 1,
        clients: int = 50,
        dispatch: str = "shortest_queue",
        affinity: bool = False,
        prompt_bytes: int = 20,
        reports: bool = True,
    ) -> None:
        self.broker = Broker(
            ControllerConfig(dispatch=dispatch, queue_requests=MANY, client_requests=MANY),
            controller_id="bench",
            version="bench",
            send_client=lambda _envelope, _payload: SENT,
            send_worker=self._take,
            report=lambda _event, **_fields: None,
            random=Random(1),
            new_epoch=iter(range(2**62, 2**63)).__next__,
            now=NOW,
        )
        self.broker.flights.reports_requests = lambda: reports
        self.running: list[tuple[bytes, bytes]] = []
        """Routing id of the worker and head of each REQUEST that was sent and has not been ended here."""
        self.slots = workers * slots
        self._random = Random(2)
        self._models, self._clients, self._affinity = models, clients, affinity
        self._prompt = "x" * prompt_bytes
        self._rid = 0
        self._heads = m.decoder(m.ControllerHead)
        for number in range(workers):
            self.add_worker(number, slots)

    def add_worker(self, number: int, slots: int) -> None:
        """One more worker registers."""
        cards = [m.ModelCard(f"model-{each}", verbs=["generate"]) for each in range(self._models)]
        ready = m.Ready(m.PROTOCOL, f"worker-{number}", "bench", "ready", cards, slots, 1.0, TTL_MS)
        self.broker.from_worker(NOW, _routing_id(number), m.encode(m.WorkerHead(m.READY, 0)), m.encode(ready))

    def requests(self, count: int) -> list[tuple[Envelope, bytes]]:
        """New requests: who asks, and the message."""
        return [self._request() for _ in range(count)]

    def _request(self) -> tuple[Envelope, bytes]:
        self._rid += 1
        draw = self._random.randrange
        key = f"session-{draw(KEYS)}" if self._affinity else None
        message = m.Generate(self._rid, f"model-{draw(self._models)}", prompt=self._prompt, affinity=key)
        return (_routing_id(10**6 + draw(self._clients)),), bytes(memoryview(m.encode(message)))  # as long as it is, like one that came

    def ends(self, count: int) -> list[tuple[bytes, bytes, bytes]]:
        """The worker, and head and payload of DONE, for so many of those that run, drawn at random."""
        ended = []
        for _ in range(count):
            place = self._random.randrange(len(self.running))
            self.running[place], self.running[-1] = self.running[-1], self.running[place]
            identity, head_bytes = self.running.pop()
            head: m.ControllerHead = self._heads.decode(head_bytes)
            done = m.Done(head.rid, 1, ["length"], m.Usage(1, 1), m.Timings("bench"))
            ended.append((identity, m.encode(m.WorkerHead(m.DONE, head.epoch, head.client, head.rid, "length", 0, 1, 1)), m.encode(done)))
        return ended

    def ask(self, count: int) -> None:
        """So many requests come."""
        for envelope, payload in self.requests(count):
            self.broker.from_client(NOW, envelope, payload)

    @property
    def waiting(self) -> int:
        """Requests that no worker has yet."""
        return sum(len(pool.waiting) for pool in self.broker.registry.pools.values())

    def _take(self, identity: bytes, head: bytes, _payload: bytes) -> int:
        if head[1] == m.REQUEST:  # the second byte of a head is its kind; WELCOME and heartbeats are not ended
            self.running.append((identity, head))
        return SENT


def _routing_id(number: int) -> bytes:
    return b"\0" + number.to_bytes(4, "big")
