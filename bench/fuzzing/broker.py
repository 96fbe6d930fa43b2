"""The controller's state machine between an honest pair and peers who say anything at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.access import Access
from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.delivery import FULL, GONE, SENT
from zmqserve.flight import Envelope
from zmqserve.rules import parse_rules

from .decoders import FROM_CLIENT
from .mutator import Mutator
from .target import Input, golden

HONEST_CLIENT, HONEST_WORKER, HONEST_MODEL = (b"\0honest",), b"\0good", "honest model"
CLIENTS: tuple[Envelope, ...] = ((b"\0one",), (b"\0two",), (b"\0proxy", b"a"), (b"\0proxy", b"b", b""), (b"",))
WORKERS = (b"\0w1", b"\0w2", b"\0w3", b"chosen")
MODELS = ("m", "n", "other")
CLIENT_KEYS = tuple(letter * 40 for letter in "ABCD")
WORKER_KEYS = tuple(letter * 40 for letter in "XYZ")
RULES = """
[defaults.client]
requests_in_flight = 5
[defaults.worker]
models = ["m", "n"]
[keys.cA]
deny = ["m:embed", "o*:*"]
requests_per_s = 100
[keys.cB]
tokens_per_s = 10
[keys.wZ]
models = ["*"]
names = ["w*"]
"""
RIDS = 8
BEAT_S = 0.5
MOST_COUNTERS = 150
MOST_TIMERS = 20_000
MOST_REPORT = 4000
"""Characters of one log line."""
OVER_S = 700.0
"""More than the default deadline of a client that never Pings."""

_to_client = m.decoder(m.ToClient)
_controller_head = m.decoder(m.ControllerHead)


class BrokerTarget:
    """One Broker, an honest client with its honest worker, and hostile ones on both sides who also behave well half of the time."""

    def __init__(self, random: Random, access: Access | None = None) -> None:
        self._random = random
        self._access = access
        self._requests = Mutator(golden(*FROM_CLIENT), random)
        self._heads = Mutator(golden("WorkerHead"), random)
        self._payloads = Mutator((*golden("Ready", "Load"), *golden("Chunk", "Chunks", "Done", "Error")), random)
        self._epoch = 1000
        self._now = self._beat_s = 1000.0
        self._epochs = dict.fromkeys((*WORKERS, HONEST_WORKER), 0)
        self._tasks: dict[bytes, list[tuple[int, int]]] = {worker: [] for worker in WORKERS}
        self._honest_task: m.ControllerHead | None = None
        self._got: list[bytes] = []
        self._rid = 10**6
        self._gone = self._unruly = False
        self._broker = Broker(
            ControllerConfig(stall_s=6.0, cancel_timeout_s=1.0, orphan_grace_s=2.0, queue_requests=50, client_requests=20),
            controller_id="here",
            version="0",
            send_client=self._to_client,
            send_worker=self._to_worker,
            report=self._report,
            random=Random(random.getrandbits(32)),
            new_epoch=self._new_epoch,
            now=self._now,
            access=access,
        )
        self._say(HONEST_WORKER, m.READY, self._ready("honest worker", HONEST_MODEL), epoch=0)
        assert self._epochs[HONEST_WORKER], "the honest worker was not welcomed"
        for number, worker in enumerate(WORKERS):
            self._say(worker, m.READY, self._ready(f"w{number}", MODELS[number % len(MODELS)]), epoch=0)

    # --- what the broker does

    def _new_epoch(self) -> int:
        self._epoch += 1
        return self._epoch

    def _report(self, event: str, **fields: object) -> None:
        size = len(event) + sum(len(str(value)) for value in fields.values())
        assert size <= MOST_REPORT, f"a log line of {size} characters: {event} {fields!r:.300}"

    def _to_client(self, envelope: Envelope, payload: bytes) -> int:
        if envelope == HONEST_CLIENT:
            self._got.append(payload)
            return SENT
        return self._status()

    def _to_worker(self, identity: bytes, head: bytes, _payload: bytes) -> int:
        message = _controller_head.decode(head)
        if identity == HONEST_WORKER:
            assert message.kind in (m.WELCOME, m.REQUEST, m.BEAT), f"the honest worker was sent {message}"
            if message.kind == m.WELCOME:
                self._epochs[identity] = message.epoch
            elif message.kind == m.REQUEST:
                self._honest_task = message
            return SENT
        if self._gone:
            return GONE
        tasks = self._tasks.setdefault(identity, [])
        if message.kind in (m.WELCOME, m.REREGISTER):
            self._epochs[identity] = message.epoch
            tasks.clear()
        elif message.kind == m.REQUEST:
            tasks.append((message.client, message.rid))
        return self._status()

    def _status(self) -> int:
        if self._gone:
            return GONE
        dice = self._random.random() if self._unruly else 1.0
        return GONE if dice < 0.002 else FULL if dice < 0.01 else SENT

    # --- what peers say

    def _ready(self, name: str, model: str) -> bytes:
        verbs = ["generate", "chat", "embed", "count_tokens", "model_details"]
        return m.encode(m.Ready(m.PROTOCOL, name, "fuzzed", "ready", [m.ModelCard(model, verbs=verbs)], 4, 1.0, 3000))

    def _say(self, worker: bytes, kind: int, payload: bytes = b"", *, epoch: int | None = None, **fields: Any) -> None:
        head = m.WorkerHead(kind, self._epochs[worker] if epoch is None else epoch, **fields)
        user = None if worker == HONEST_WORKER else self._user(worker, WORKER_KEYS)
        self._broker.from_worker(self._now, worker, m.encode(head), payload, user=user)

    def draw(self) -> Input:
        """As Target says: ``("client", envelope, payload)`` or ``("worker", routing id, head, payload, certain)``."""
        random = self._random
        if random.random() < 0.5:
            return "client", random.choice(CLIENTS), self._request()
        worker = random.choice(WORKERS)
        head, payload = self._head(worker), self._payload()
        if random.random() < 0.3:
            head = self._heads.change(head)
        return "worker", worker, head, payload, random.random() < 0.8

    def _request(self) -> bytes:
        random = self._random
        if random.random() < 0.5:
            return self._requests.draw()
        rid, model = random.randrange(1, RIDS), random.choice(MODELS)
        fields: Any = {
            "deadline_ms": random.choice((None, 1, 900)),
            "attempts": random.choice((0, 0, 1)),
            "priority": random.choice((0, 1, -100)),
        }
        made: tuple[Any, ...] = (
            m.Generate(rid, model, **fields, affinity=random.choice((None, "a")), prompt="hello"),
            m.Generate(rid, model, **fields, stream=False, prompt="hello"),
            m.Embed(rid, model, **fields, texts=["hello"]),
            m.CountTokens(rid, model, **fields, prompt="hello"),
            m.Cancel(rid),
            m.Ping(random.choice((1, 3000, 2**53)), [rid, rid + 1]),
            m.Status(rid),
            m.ListModels(rid),
            m.Drain(rid, f"w{random.randrange(6)}"),
        )
        data = m.encode(random.choice(made))
        return self._requests.change(data) if random.random() < 0.3 else data

    def _head(self, worker: bytes) -> bytes:
        random = self._random
        if random.random() < 0.1:
            return self._heads.draw()
        kind = random.choice((m.READY, m.LOAD, m.BUSY, m.DRAINING, m.BYE, *[m.FIRST, m.MORE, m.DONE, m.FAILED] * 4, 0, 200))
        epochs = (*[self._epochs[worker]] * 8, 0, self._epoch, self._epochs[random.choice(WORKERS)], random.getrandbits(63))
        task = random.choice(
            self._tasks[random.choice((worker, worker, worker, *WORKERS))] or [(random.randrange(20), random.randrange(RIDS))]
        )
        outcome, code = random.choice(("", "stop", "cancelled", "x" * 256)), random.choice((0, 50001, 40801, -1))
        tokens = random.choice((0, 5, 2**63 - 1))
        return m.encode(m.WorkerHead(kind, random.choice(epochs), *task, outcome, code, tokens, tokens))

    def _payload(self) -> bytes:
        random = self._random
        dice = random.random()
        if dice < 0.2:
            model = random.choice((*MODELS, f"new {random.randrange(50)}"))
            return self._ready(f"w{random.randrange(6)}", model)
        if dice < 0.4:
            return m.encode(m.Load(random.randrange(5), random.randrange(5), random.randrange(5), random.choice((0.0, 7000.0))))
        return self._payloads.draw()

    # --- as Target says

    def feed(self, given: Input) -> None:
        """As Target says."""
        self._unruly = True
        if given[0] == "client":
            _, envelope, payload = given
            self._broker.from_client(self._now, envelope, payload, self._user(envelope[0], CLIENT_KEYS))
        else:
            _, worker, head, payload, certain = given
            self._broker.from_worker(self._now, worker, head, payload, certain, self._user(worker, WORKER_KEYS))
            del self._tasks[worker][:-20]
        self._unruly = False
        self._pass(self._random.choice((0.0, 0.0, 0.0, 0.0005, 0.005)))

    def _user(self, peer: bytes, keys: tuple[str, ...]) -> str | None:
        """The key of a peer, now and then another's: somebody else may have its routing id by now."""
        if self._access is None:
            return None
        return self._random.choice(keys) if self._random.random() < 0.01 else keys[sum(peer) % len(keys)]

    def _pass(self, seconds: float) -> None:
        """Time passes; the honest worker beats."""
        until = self._now + seconds
        while self._now < until:
            self._now = min(until, self._now + BEAT_S / 2)
            self._unruly = True
            self._broker.tick(self._now)
            self._unruly = False
            if self._now >= self._beat_s:
                self._beat_s = self._now + BEAT_S
                self._say(HONEST_WORKER, m.LOAD, m.encode(m.Load(0, 0, 0)))

    def check(self) -> None:
        """An honest exchange goes as it should, and nothing that peers can name or make more of has grown."""
        self._rid += 1
        rid = self._rid
        chunks = [m.encode(m.Chunk(rid, seq, 0, f"word {seq}", b"")) for seq in range(2)]
        words = [*chunks, m.encode(m.Done(rid, 2, ["stop"], m.Usage(1, 2), m.Timings("honest")))]
        self._broker.from_client(self._now, HONEST_CLIENT, m.encode(m.Generate(rid, HONEST_MODEL, prompt="hi")))
        task = self._honest_task
        assert task is not None, f"an honest request did not reach its worker; its client got {self._got!r:.300}"
        assert task.rid == rid, f"the honest worker was sent {task}"
        self._say(HONEST_WORKER, m.FIRST, words[0], client=task.client, rid=rid)
        self._broker.from_worker(self._now, HONEST_WORKER, m.more_head(self._epochs[HONEST_WORKER], task.client), words[1])
        self._say(HONEST_WORKER, m.DONE, words[2], client=task.client, rid=rid, outcome="stop")
        assert self._got == words, f"the honest client got {self._got!r:.300}"
        self._got.clear()
        self._honest_task = None
        state = self._state()
        for worker in state.workers:
            assert worker.running >= 0, worker
            assert 0 <= worker.free <= worker.slots, worker
        assert len(state.counters) < MOST_COUNTERS, sorted(state.counters)
        named = [name for name in state.counters if not re.fullmatch(r"[A-Za-z0-9 ,:'()_-]{1,60}", name)]
        assert not named, f"counters named by a peer: {named!r:.300}"
        assert len(self._broker.agenda) < MOST_TIMERS, len(self._broker.agenda)

    def _state(self) -> m.ControllerStatus:
        self._broker.from_client(self._now, HONEST_CLIENT, m.encode(m.Status(self._rid)))
        reply = _to_client.decode(self._got.pop())
        assert isinstance(reply, m.StatusReply), reply
        assert not self._got
        return reply.status

    def finish(self) -> None:
        """As Target says."""
        self._gone = True
        self._pass(OVER_S)
        self.check()
        state = self._state()
        names = [worker.name for worker in state.workers]
        assert names == ["honest worker"], f"left: {names}"
        left = {"clients": state.clients, "running": state.running, "waiting": state.waiting}
        assert not any(left.values()), f"left: {left}"
        models = [model.card.name for model in state.models]
        assert models == [HONEST_MODEL], f"left: {models}"


class GuardedBrokerTarget(BrokerTarget):
    """The same with keys and rules, some of which allow little. The honest pair has none: it counts as of this process."""

    def __init__(self, random: Random) -> None:
        self._ring = _Ring(_peers("client", CLIENT_KEYS), _peers("worker", WORKER_KEYS))
        super().__init__(random, Access(self._ring, parse_rules(RULES, "access.toml")))

    def check(self) -> None:
        """As BrokerTarget does; then keys come and go."""
        super().check()
        random = self._random
        self._ring.clients = _peers("client", [key for key in CLIENT_KEYS if random.random() < 0.9])
        self._ring.workers = _peers("worker", [key for key in WORKER_KEYS if random.random() < 0.9])
        rules = parse_rules(RULES, "access.toml") if random.random() < 0.3 else None
        self._broker.keys_changed(self._now, self._ring, rules)


def _peers(role: str, keys: Iterable[str]) -> dict[str, _Peer]:
    return {key: _Peer(key, f"{role[0]}{key[0]}", role) for key in keys}


@dataclass(frozen=True)
class _Peer:
    key: str
    name: str
    role: str


@dataclass
class _Ring:
    clients: Mapping[str, _Peer]
    workers: Mapping[str, _Peer]
