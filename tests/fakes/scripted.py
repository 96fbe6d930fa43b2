"""A client and a worker that say to a Network's broker what their test lets them say."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from zmqserve import messages as m
from zmqserve.flight import Envelope
from zmqserve.registry import Worker

if TYPE_CHECKING:
    from .network import Network


class ScriptedClient:
    """Sends what it is told to, and keeps what comes."""

    def __init__(self, network: Network, envelope: Envelope, user: str | None = None) -> None:
        self.user = user
        self.network = network
        self.envelope = envelope
        self.got: list[Any] = []
        self.asked: Counter[int] = Counter()

    def take(self, message: Any) -> None:
        self.got.append(message)

    def send(self, message: Any) -> None:
        """Any message, or raw bytes."""
        payload = message if isinstance(message, bytes) else m.encode(message)
        self.network.broker.from_client(self.network.now, self.envelope, payload, self.user)

    def generate(self, rid: int, model: str = "m", **fields: Any) -> None:
        """Ask for an answer."""
        self.request(m.Generate(rid, model, **{"prompt": "hello", **fields}))

    def request(self, request: Any) -> None:
        """Any request with a rid that must end once."""
        self.asked[request.rid] += 1
        self.send(request)

    def cancel(self, rid: int) -> None:
        self.send(m.Cancel(rid))

    def ping(self, ttl_ms: int = 3000, rids: list[int] | None = None) -> m.Pong:
        """Ping with these rids (those that are open); returns the answer."""
        open_rids = [rid for rid in self.asked if len(self.ends(rid)) < self.asked[rid]]
        self.send(m.Ping(ttl_ms, open_rids if rids is None else rids))
        pong = self.got.pop()
        assert isinstance(pong, m.Pong)
        return pong

    def ends(self, rid: int) -> list[Any]:
        """What ended the request: not chunks."""
        return [message for message in self.got if getattr(message, "rid", None) == rid and not isinstance(message, m.Chunk)]

    def end(self, rid: int) -> Any:
        """The one message that ended it."""
        ends = self.ends(rid)
        assert len(ends) == 1, f"rid {rid} ended with {ends}"
        return ends[0]

    def error(self, rid: int) -> m.Error:
        """The one error that ended it."""
        end = self.end(rid)
        assert isinstance(end, m.Error), end
        return end


class Task:
    """A request as its worker has it."""

    def __init__(self, worker: ScriptedWorker, head: m.ControllerHead, payload: bytes) -> None:
        self.worker, self.head, self.payload = worker, head, payload
        self.rid, self.client = head.rid, head.client
        self.seq = 0
        self.cancelled = False

    def _say(self, kind: int, payload: bytes, **fields: Any) -> None:
        self.worker.say(kind, payload, epoch=self.head.epoch, client=self.client, rid=self.rid, **fields)

    def _chunk(self, text: str) -> bytes:
        self.seq += 1
        return m.encode(m.Chunk(self.rid, self.seq - 1, 0, text, b""))

    def first(self, text: str = "a") -> None:
        self._say(m.FIRST, self._chunk(text))

    def more(self, text: str = "b") -> None:
        """A chunk that takes the relay's slow path through the broker."""
        self.worker.say(m.MORE, self._chunk(text), epoch=self.head.epoch, client=self.client)

    def done(self, outcome: str = "stop") -> None:
        self.worker.forget(self)
        done = m.Done(self.rid, self.seq, [outcome], m.Usage(1, self.seq), m.Timings(self.worker.name))
        self._say(m.DONE, m.encode(done), outcome=outcome, prompt_tokens=1, completion_tokens=self.seq)

    def failed(self, code: int = 50001) -> None:
        self.worker.forget(self)
        self._say(m.FAILED, m.encode(m.Error(self.rid, code, "it broke")), code=code)

    def busy(self) -> None:
        self.worker.forget(self)
        self._say(m.BUSY, b"")


class ScriptedWorker:
    """Registers, keeps the requests that it gets in `tasks`, and answers them as it is told to."""

    def __init__(
        self, network: Network, identity: bytes, name: str, cards: list[m.ModelCard], offer: dict[str, Any], user: str | None = None
    ) -> None:
        self.user = user
        self.network, self.identity, self.name, self.cards = network, identity, name, cards
        self.offer = {"slots": 1, "speed": 1.0, "ttl_ms": 3000, "state": "ready", **offer}
        self.epoch = 0
        self.most_slots = 0
        """Offered in this registration: what began on slots that are not offered any more runs on."""
        self.tasks: list[Task] = []
        self.got: list[tuple[m.ControllerHead, bytes]] = []

    def take(self, head: m.ControllerHead, payload: bytes) -> None:
        self.got.append((head, payload))
        if head.kind == m.WELCOME:
            if head.epoch != self.epoch:
                self.tasks.clear()
            self.epoch = head.epoch
        elif head.kind == m.REREGISTER:
            self.tasks.clear()
        elif head.kind == m.REQUEST:
            self.tasks.append(Task(self, head, payload))
        elif head.kind == m.CANCEL:
            for task in self.tasks:
                task.cancelled = task.cancelled or (task.client, task.rid) == (head.client, head.rid)

    def say(self, kind: int, payload: bytes = b"", *, epoch: int | None = None, certain: bool = True, **fields: Any) -> None:
        """Any message, with the present epoch."""
        head = m.WorkerHead(kind, self.epoch if epoch is None else epoch, **fields)
        self.network.broker.from_worker(self.network.now, self.identity, m.encode(head), payload, certain, self.user)

    def ready(
        self, epoch: int = 0, *, certain: bool = True, protocol: int = m.PROTOCOL, controllers: list[str] | None = None, **offer: Any
    ) -> None:
        """Register, with changes to what is offered."""
        self.offer |= offer
        fields = self.offer
        self.most_slots = max(fields["slots"], self.most_slots if epoch and epoch == self.epoch else 0)
        ready = m.Ready(
            protocol,
            self.name,
            "scripted",
            fields["state"],
            self.cards,
            fields["slots"],
            fields["speed"],
            fields["ttl_ms"],
            controllers or [],
        )
        self.say(m.READY, m.encode(ready), epoch=epoch, certain=certain)

    def load(self, running: int | None = None, waiting: int = 0, yours: int | None = None, step_age_ms: float = 0.0) -> None:
        """A heartbeat; by default what is true of a worker with one controller."""
        own = len(self.tasks)
        figures = m.Load(own if running is None else running, waiting, own if yours is None else yours, step_age_ms)
        self.say(m.LOAD, m.encode(figures))

    def kinds(self) -> list[int]:
        """The kinds of all that came."""
        return [head.kind for head, _ in self.got]

    def told(self) -> list[int]:
        """The numbers that came with REREGISTER."""
        return [head.epoch for head, _ in self.got if head.kind == m.REREGISTER]

    def task(self, rid: int) -> Task:
        """The request with this rid that it has."""
        return next(task for task in self.tasks if task.rid == rid)

    def forget(self, task: Task) -> None:
        if task in self.tasks:
            self.tasks.remove(task)

    @property
    def seen(self) -> Worker:
        """What the broker holds of it."""
        return self.network.broker.registry.workers[self.identity]

    def is_registered(self) -> bool:
        """Whether the broker holds this very registration or a later one."""
        return self.identity in self.network.broker.registry.workers

    def die(self) -> None:
        """The process is gone: the next send to it finds out."""
        self.network.gone.add(self.identity)
        self.tasks.clear()
