"""A worker without threads, sockets or clocks: its links, workload and desk, and controllers that hold it to the protocol."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from itertools import count
from random import Random
from types import coroutine
from typing import Any

from zmqserve import messages as m
from zmqserve.admission import by_name
from zmqserve.answers import Answer, Job
from zmqserve.desk import Desk
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.lane import Lane
from zmqserve.link import ControllerLink
from zmqserve.workload import Workload

FEW = 1

_heads = m.decoder(m.WorkerHead)
_messages = m.decoder(m.ToClient)


@coroutine
def pause() -> Generator[None, None, None]:
    """Let the others run."""
    yield


class Task:
    """A coroutine that `Loop` steps."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self.work = work
        self.cancelled = False
        self.ended = False

    def cancel(self) -> None:
        self.cancelled = True

    def step(self) -> None:
        try:
            if self.cancelled:
                self.cancelled = False
                self.work.throw(asyncio.CancelledError())
            else:
                self.work.send(None)
        except (StopIteration, asyncio.CancelledError):
            self.ended = True


class Timer:
    """What `call_at` returns."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """An event loop that takes a turn when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.soon: deque[Callable[[], object]] = deque()
        self.tasks: list[Task] = []
        self._timers: list[tuple[float, int, Timer, Callable[[], object]]] = []
        self._serial = count()

    def call_at(self, when_s: float, function: Callable[..., object], /, *arguments: Any) -> Timer:
        timer = Timer()
        heapq.heappush(self._timers, (when_s, next(self._serial), timer, lambda: function(*arguments)))
        return timer

    @property
    def waiting(self) -> int:
        """Timers that are still to come."""
        return sum(not timer.cancelled for _, _, timer, _ in self._timers)

    def spawn(self, work: Coroutine[Any, Any, None]) -> Task:
        task = Task(work)
        self.tasks.append(task)
        return task

    def turn(self) -> None:
        """Timers that are due, then what was asked for before, then a step of each task."""
        while self._timers and self._timers[0][0] <= self.now:
            _, _, timer, function = heapq.heappop(self._timers)
            if not timer.cancelled:
                function()
        for _ in range(len(self.soon)):
            self.soon.popleft()()
        for task in list(self.tasks):
            task.step()
        self.tasks = [task for task in self.tasks if not task.ended]


class Words:
    """A backend that makes one piece per turn. `in_tasks`: by a task for each job, not by a step loop of its own."""

    name, backend = "w", "words"
    honours = frozenset({"max_tokens"})

    def __init__(self, loop: Loop, *, in_tasks: bool) -> None:
        self.loop, self.in_tasks = loop, in_tasks
        self.jobs: dict[Job, int] = {}
        self.desk: Desk

    def begin(self, job: Job) -> None:
        if self.in_tasks:
            self.desk.drive(job)
        else:
            self.jobs[job] = 0
            self.loop.soon.append(lambda: self._step(job))

    def abandon(self, job: Job) -> None:
        """The step that is due already comes all the same, as one of a thread would: what it emits must not be sent."""
        self.jobs.pop(job)

    def _step(self, job: Job) -> None:
        made = self.jobs.get(job, 1)
        last = made + 1 == (job.request.params.max_tokens or 1)
        job.emit(Delta("x", (made,), finish_reason="length" if last else None))
        if job in self.jobs:
            self.jobs[job] += 1
            if last:
                del self.jobs[job]
                job.finish()
            else:
                self.loop.soon.append(lambda: self._step(job))

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        tokens = job.request.params.max_tokens or 1
        for k in range(tokens):
            yield Delta("x", (k,), finish_reason="length" if k == tokens - 1 else None)
            await pause()

    async def embed(self, request: m.Embed) -> Vectors:
        await pause()
        raise ValueError("no vectors today")

    async def count_tokens(self, request: m.CountTokens) -> int:
        await pause()
        return 1

    async def model_details(self, request: m.ModelDetails) -> m.ModelCard:
        await pause()
        return m.ModelCard("m")


class Peer:
    """A controller: registers the worker under a new epoch each time, and checks every frame that comes."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.link: ControllerLink
        self.epoch = 0
        self.connected = True
        self.ready: m.Ready | None = None
        self.load: m.Load | None = None
        self.open: dict[tuple[int, int], int] = {}
        self.ended = 0
        self.left: list[m.WorkerHead] = []

    def send(self, head_bytes: bytes, payload: bytes) -> bool:
        """What the worker says."""
        if not self.connected:
            return False
        head = _heads.decode(head_bytes)
        self.left.append(head)
        if head.kind == m.READY:
            self.ready = m.decoder(m.Ready).decode(payload)
            return True
        assert head.epoch == self.epoch, f"{head} after its registration was over"
        if head.kind == m.LOAD:
            self.load = m.decoder(m.Load).decode(payload)
        elif head.kind == m.MORE:
            message: Any = _messages.decode(payload)
            for chunk in getattr(message, "chunks", [message]):
                assert self.open[head.client, chunk.rid] == chunk.seq > 0, f"{chunk} at seq {self.open}"
                self.open[head.client, chunk.rid] += 1
        elif head.kind == m.FIRST:
            assert self.open[head.client, head.rid] == 0
            self.open[head.client, head.rid] = 1
        elif head.kind in (m.DONE, m.FAILED, m.BUSY):
            del self.open[head.client, head.rid]
            self.ended += 1
        return True

    def say(self, now: float, kind: int, payload: bytes = b"", **head: Any) -> None:
        """What the controller says, with its present epoch unless told."""
        self.link.received(now, m.encode(m.ControllerHead(kind, **{"epoch": self.epoch, **head})), payload)

    def welcome(self, now: float, epoch: int) -> None:
        """Take the worker in. What ran before is forgotten."""
        self.epoch, self.ready = epoch, None
        self.open.clear()
        self.say(now, m.WELCOME, m.encode(m.WorkerWelcome(m.PROTOCOL, self.name, 3000)))

    def forget(self, now: float, number: int) -> None:
        """Ask the worker to register anew."""
        self.epoch = 0
        self.open.clear()
        self.say(now, m.REREGISTER, epoch=number)

    def disconnect(self, now: float) -> None:
        """The connection breaks."""
        self.epoch, self.connected = 0, False
        self.open.clear()
        self.link.disconnected(now)


class Desktop:
    """A worker of ``m`` and of ``few``, which may have FEW of its slots. What its engine posts waits in `frames` until `pass_on`."""

    def __init__(self, controllers: int, slots: int, *, in_tasks: bool, loaded: bool = True) -> None:
        self.loop = Loop()
        self.times_taken = 0
        self.frames: deque[tuple[Lane, bytes, bytes, Answer | None]] = deque()
        self.full: set[ControllerLink] = set()
        """Whose controllers take nothing, so that what runs for them pauses."""
        self.for_desk: deque[tuple[Any, ...]] = deque()
        backend = Words(self.loop, in_tasks=in_tasks)
        self.desk = backend.desk = Desk(
            backend, self, now=self.now, call_soon=self.loop.soon.append, call_at=self.loop.call_at, spawn=self.loop.spawn
        )
        verbs = ["generate", "embed", "count_tokens", "model_details"]
        cards = [m.ModelCard("m", verbs=verbs), m.ModelCard("few", aliases=["alias"], verbs=verbs, slots=FEW)]
        self.desk.cards = by_name(cards)
        self.name = "w"
        self.queued = 0
        self.workload = Workload(self, self, grace_s=5.0, message_bytes=10_000, now=self.now, hand=self._hand, fresh_socket=lambda _: None)
        self.workload.desk = self.desk
        self.peers = [Peer(f"c{k}") for k in range(controllers)]
        for peer in self.peers:
            peer.link = ControllerLink(f"tcp://{peer.name}:1", self.workload, peer.send, ttl_s=1e6, random=Random(1), now=self.loop.now)
            self.workload.add(peer.link)
        if loaded:
            self.workload.announce(slots, cards)

    def now(self) -> float:
        return self.loop.now

    def _hand(self, *call: Any) -> None:
        self.for_desk.append(call)

    # As Served: what the worker says of itself.

    def registration(self, state: str, slots: int) -> m.Ready:
        return m.Ready(m.PROTOCOL, self.name, "words", state, [m.ModelCard("m")], slots, 1.0, 3000)

    def step_age_s(self) -> float:
        return self.desk.age_s()

    def waiting(self) -> int:
        return self.queued

    def taken(self) -> None:
        self.times_taken += 1

    # As Outbound: what its engine posts.

    def behind(self, lane: Lane) -> bool:
        return False

    def pauses(self, lane: Lane) -> bool:
        return lane.link in self.full

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        self.frames.append((lane, head, payload, ended))

    def wake(self) -> None:
        pass

    # What may happen in any order.

    def tick(self) -> None:
        self.workload.tick(self.loop.now)

    def take_calls(self) -> None:
        """The engine hears what the links were told."""
        while self.for_desk:
            function, *arguments = self.for_desk.popleft()
            function(*arguments)

    def pass_on(self, most: int = 1000) -> None:
        """The socket thread takes what the engine made."""
        for _ in range(min(most, len(self.frames))):
            self.workload.pass_on(*self.frames.popleft())

    def run_out(self) -> None:
        """Let all that was asked come to its end."""
        for _ in range(20):
            self.take_calls()
            self.loop.turn()
            self.pass_on()
