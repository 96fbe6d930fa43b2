"""A worker's link to a controller that says anything at all."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.admission import admit
from zmqserve.errors import ZmqserveError
from zmqserve.link import ControllerLink

from .mutator import Mutator
from .target import Input, golden

STATES = ("registering", "registered", "refused", "closed")
OVER_S = 100.0
TTL_S = 3.0
CARD = m.ModelCard("m", verbs=["generate", "chat", "embed", "count_tokens", "model_details"])
HONOURS = frozenset({"max_tokens", "stop", "n"})

_requests = m.decoder(m.Request)


class _Host:
    """The worker: takes requests as one does, by reading them and asking whether it can answer."""

    def __init__(self, random: Random) -> None:
        self.taken: list[tuple[int, int, int]] = []
        self._random = random

    def ready(self) -> m.Ready:
        return m.Ready(m.PROTOCOL, "w", "fuzzed", "ready", [CARD], 4, 1.0, int(TTL_S * 1000))

    def load(self, _link: ControllerLink) -> m.Load:
        return m.Load(len(self.taken), 0, len(self.taken))

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        with suppress(ZmqserveError):
            admit(m.read(_requests, payload), {"m": CARD}, "fuzzed", HONOURS)
        if len(self.taken) >= 4:
            return False
        self.taken.append((link.epoch, head.client, head.rid))
        return True

    def cancel(self, _link: ControllerLink, client: int, rid: int) -> None:
        self.taken = [each for each in self.taken if each[1:] != (client, rid)]

    def abort(self, _link: ControllerLink) -> None:
        self.taken.clear()

    def drain(self, grace_s: float | None) -> None:
        assert grace_s is None or grace_s > 0, grace_s

    def fresh_socket(self, link: ControllerLink) -> None:
        pass

    def changed(self, link: ControllerLink) -> None:
        assert link.state in STATES, link.state


class LinkTarget:
    """One ControllerLink with a worker that has four slots; refused for good, it is made anew."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._heads = Mutator(golden("ControllerHead"), random)
        self._payloads = Mutator(golden("WorkerWelcome", "Refused", "Generate", "Embed", "CountTokens", "ModelDetails"), random)
        self._now = 1000.0
        self._sent = 0
        self._renew()

    def _renew(self) -> None:
        self._host = _Host(self._random)
        random = Random(self._random.getrandbits(32))
        self._link = ControllerLink("tcp://a:1", self._host, self._send, ttl_s=TTL_S, random=random, now=self._now)
        self._due_s = self._link.tick(self._now)

    def _send(self, _head: bytes, _payload: bytes) -> bool:
        self._sent += 1
        return self._random.random() < 0.98

    def draw(self) -> Input:
        """As Target says: head and payload."""
        random = self._random
        epochs = (*[self._link.epoch or 5] * 8, 0, random.getrandbits(63))
        kind = random.choice((m.WELCOME, m.REFUSED, *[m.REQUEST] * 6, m.CANCEL, m.BEAT, m.REREGISTER, 0, 65))
        deadline_ms = random.choice((None, 1, 2**53))
        made = m.ControllerHead(kind, random.choice(epochs), random.randrange(4), random.randrange(4), deadline_ms, random.randrange(3))
        head = self._heads.draw() if random.random() < 0.1 else m.encode(made)
        if random.random() < 0.3:
            head = self._heads.change(head)
        return head, self._payload(kind)

    def _payload(self, kind: int) -> bytes:
        random = self._random
        if kind == m.WELCOME and random.random() < 0.8:
            return m.encode(m.WorkerWelcome(1, "here", random.choice((1, 3000, 2**53)), "", random.choice((0, 1, 10**6))))
        if kind == m.REFUSED and random.random() < 0.8:
            return m.encode(m.Refused(40103, "no", random.choice((1, 100, 2**53))))
        made: tuple[Any, ...] = (m.Generate(1, "m", prompt="hi"), m.Embed(1, "m", texts=["a"]), m.ModelDetails(1, "m"))
        data = m.encode(random.choice(made)) if random.random() < 0.3 else self._payloads.draw()
        return self._payloads.change(data) if random.random() < 0.3 else data

    def feed(self, given: Input) -> None:
        """As Target says."""
        head, payload = given
        if self._link.state in ("refused", "closed"):
            self._renew()
        link = self._link
        link.received(self._now, head, payload)
        if self._host.taken and self._random.random() < 0.5:
            epoch, client, rid = self._host.taken.pop()
            link.post(epoch, m.encode(m.WorkerHead(m.DONE, epoch, client, rid, "stop")), b"done")
        if link.blocked and self._random.random() < 0.5:
            link.writable(self._now)
        if self._random.random() < 0.002:
            link.disconnected(self._now)
        self._now += self._random.choice((0.0, 0.0, 0.001, 0.05))
        self._due_s = link.tick(self._now)

    def check(self) -> None:
        """What waits is bounded by what was taken, and time goes on."""
        assert self._link.outbox_bytes < 10**6, self._link
        assert self._due_s > self._now - 1.0, (self._due_s, self._now)
        assert self._sent < 10**6
        self._sent = 0

    def finish(self) -> None:
        """As Target says: left alone, a worker that was not refused asks to be registered again and again."""
        if self._link.state in ("refused", "closed"):
            return
        before = self._sent
        until_s = self._now + OVER_S
        while self._now < until_s and self._due_s < until_s:
            self._now = max(self._now + 0.001, self._due_s)
            self._due_s = self._link.tick(self._now)
            if self._link.blocked:
                self._link.writable(self._now)
        assert self._sent > before, f"silent for good: {self._link}"
