"""A worker: the real links, Workload and Desk of zmqserve, with echo's own steps as the engine, made in simulated time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from random import Random
from typing import Any

from msgspec.structs import replace

from zmqserve.admission import by_name
from zmqserve.answers import Answer, Job
from zmqserve.backends.echo import EchoWorker, take_step
from zmqserve.desk import Desk
from zmqserve.jobs import Delta, Vectors
from zmqserve.lane import Lane
from zmqserve.link import ControllerLink
from zmqserve.linkthread import FRAMES, PASSED
from zmqserve.messages import CountTokens, Embed, ModelCard
from zmqserve.worker import WorkerConfig
from zmqserve.workload import Workload

from .answers import DIMENSIONS, words_of
from .load import POISON
from .network import Network
from .node import Node
from .sockets import DealerSocket, serve_link
from .tasks import Task, Timer, sleep
from .world import World

THREADS_S = 0.001
"""Up to so long passes between the engine's thread and the sockets' one."""


class _Echo(EchoWorker):  # type: ignore[misc]
    """Echo, with the sleeps and the steps of its node."""

    def __init__(self, node: WorkerNode, config: WorkerConfig) -> None:
        super().__init__(config, dimensions=DIMENSIONS)
        self._node = node

    def load(self) -> list[ModelCard]:
        cards: list[ModelCard] = super().load()
        shares = self._node.shares
        return [replace(cards[0], name=model, slots=slots) for model, slots in shares.items()] if shares else cards

    def begin(self, job: Job) -> None:
        self._node.begin_job(job, self._steps(job))

    def abandon(self, job: Job) -> None:
        self._node.jobs.pop(job, None)

    async def embed(self, request: Embed) -> Vectors:
        await sleep(self._node.token_s)
        vectors: Vectors = await super().embed(request)
        return vectors

    async def count_tokens(self, request: CountTokens) -> int:
        await sleep(self._node.token_s / 4)
        count: int = await super().count_tokens(request)
        return count

    def step_age_s(self) -> float:
        return self._node.desk.age_s() if self._node.workload.running else 0.0

    def complete(self) -> None:
        """Load."""
        self.cards = [self._completed(card) for card in self.load()]


class WorkerNode(Node):
    """`token_s`: from one token of all its answers to the next. `load_s`: what loading its models takes. `shares`: those models with their
    slots; empty: one, which may have all slots. `hung`: its engine does nothing while its links beat. It leaves by itself when it was
    drained, and when all refuse it."""

    def __init__(
        self,
        world: World,
        network: Network,
        name: str,
        config: WorkerConfig,
        *,
        token_s: float,
        load_s: float,
        shares: Mapping[str, int],
        lag_s: float = 0.0,
    ) -> None:
        super().__init__(world, network, name, lag_s=lag_s)
        self.config = config
        self.token_s = token_s
        self.load_s = load_s
        self.shares = shares
        self.hung = False
        self.on_poison: Callable[[WorkerNode], object] = lambda _node: None
        self.on_left: Callable[[WorkerNode], object] = lambda _node: None

    def begin(self) -> None:
        self.hung = False
        self.jobs: dict[Job, Iterator[Sequence[Delta]]] = {}
        self.worker = _Echo(self, self.config)
        self._frames: deque[tuple[Lane, bytes, bytes, Answer | None]] = deque()
        self._for_engine: list[tuple[Any, ...]] = []
        self._held: deque[Callable[[], object]] = deque()
        self._soon: list[Callable[[], None]] = []
        self._engine_s = 0.0
        self._stepping = self._rung = False
        self.workload = Workload(
            self.worker,
            self,
            grace_s=self.config.grace_s,
            message_bytes=self.config.limits.message_bytes,
            now=lambda: self.clock_s,
            hand=lambda *call: self._for_engine.append(call),
            fresh_socket=self._fresh_socket,
        )
        self.desk = self.workload.desk = Desk(
            self.worker,
            self,
            now=lambda: self.clock_s,
            call_soon=self._soon.append,
            call_at=self._call_at,
            spawn=lambda coroutine: Task(self.soon, coroutine),
        )
        self.dealers: dict[ControllerLink, DealerSocket] = {}
        for endpoint in self.config.controllers:
            self._open(endpoint)
        self.soon(self.load_s, self._loaded)

    def finish(self) -> None:
        for dealer in self.dealers.values():
            dealer.close(graceful=self.workload.ending)

    def terminate(self) -> None:
        """SIGTERM: drain, then leave."""
        if self.alive and not self.paused:
            self.world.note(f"{self.name} is told to leave")
            self.workload.drain(None)
            self.stir()

    def hang(self, hung: bool) -> None:
        """The engine stops stepping, or goes on."""
        if self.alive and self.hung != hung:
            self.world.note(f"the engine of {self.name} {'hangs' if hung else 'goes on'}")
            self.hung = hung
            self._catch_up()

    def resume(self) -> None:
        super().resume()
        self._catch_up()

    # --- the sockets' thread ----------------------------------------------------------------------

    def _open(self, endpoint: str) -> None:
        def send(head: bytes, payload: bytes) -> bool:
            return self.dealers[link].send(head, payload)

        link = ControllerLink(
            endpoint, self.workload, send, ttl_s=self.config.ttl_s, random=Random(self.random.getrandbits(64)), now=self.clock_s
        )
        self.dealers[link] = DealerSocket(self.network, self, endpoint)
        self.workload.add(link)

    def _fresh_socket(self, link: ControllerLink) -> None:
        self.dealers[link].close()
        self.dealers[link] = DealerSocket(self.network, self, link.endpoint)

    def turn(self, now: float) -> float:
        workload = self.workload
        self._rung = False
        for _ in range(min(PASSED, len(self._frames))):
            workload.pass_on(*self._frames.popleft())
        for link in list(self.dealers):
            serve_link(link, self.dealers, link, now)
        if workload.finished(now, len(self._frames)):
            self._end()
            return inf
        due_s = workload.tick(now)
        for lane in workload.links.values():
            if lane is not None and lane.congested and not self.pauses(lane):
                self._for_engine.append((lane.relieved,))
        if self._for_engine:
            calls, self._for_engine = self._for_engine, []
            self.soon(THREADS_S * self.random.random(), self._run_calls, calls)
        return now if self._frames else due_s

    def _end(self) -> None:
        self.world.note(f"{self.name} leaves: {self.workload.failure or 'it was drained'}")
        for link in self.dealers:
            link.close()
        self.workload.ending = True
        self.leave()
        self.on_left(self)

    # --- Outbound, from the engine's thread

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        self._frames.append((lane, head, payload, ended))

    def behind(self, lane: Lane) -> bool:
        return len(self._frames) > FRAMES or lane.posted_bytes - lane.gone_bytes > self.config.outbox_bytes

    def pauses(self, lane: Lane) -> bool:
        waiting_bytes = lane.posted_bytes - lane.gone_bytes
        return lane.congested and (2 * len(self._frames) > FRAMES or 2 * waiting_bytes > self.config.outbox_bytes)

    def wake(self) -> None:
        if not self._rung:
            self._rung = True
            self.world.after(THREADS_S * self.random.random(), self._ring, self.life)

    def _ring(self, life: int) -> None:
        if life == self.life:
            self.stir()

    # --- the engine's thread ----------------------------------------------------------------------

    def soon(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Run it on the engine's thread, after what was given to it before for that time."""
        self._engine_s = max(self._engine_s, self.world.now + delay_s) if delay_s <= THREADS_S else self._engine_s
        when_s = self._engine_s if delay_s <= THREADS_S else self.world.now + delay_s
        self.world.at(when_s, self._engine, self.life, action, arguments)

    def _call_at(self, when_s: float, function: Callable[..., object], /, *arguments: Any) -> Timer:
        timer = Timer(lambda: function(*arguments))
        self.world.at(when_s - self.skew_s, self._engine, self.life, timer, ())
        return timer

    def _engine(self, life: int, action: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        if life != self.life or not self.alive:
            return
        if self.paused or self.hung:
            self._held.append(lambda: action(*arguments))
            return
        action(*arguments)
        while self._soon and self.alive:
            soon, self._soon[:] = list(self._soon), []
            for function in soon:
                function()

    def _catch_up(self) -> None:
        while self._held and self.alive and not self.paused and not self.hung:
            self._engine(self.life, self._held.popleft(), ())

    def _run_calls(self, calls: list[tuple[Any, ...]]) -> None:
        for function, *arguments in calls:
            function(*arguments)

    def _loaded(self) -> None:
        self.worker.complete()
        self.desk.cards = by_name(self.worker.cards)
        self.workload.announce(self.worker.slots, self.worker.cards)
        self.stir()

    def begin_job(self, job: Job, steps: Iterator[Sequence[Delta]]) -> None:
        """All jobs make a token in each step."""
        self.jobs[job] = steps
        if not self._stepping:
            self._stepping = True
            self.soon(self.token_s, self._step)

    def _step(self) -> None:
        for job, steps in list(self.jobs.items()):
            if job.congested:
                continue
            if _dies(job):
                self.kill()
                self.on_poison(self)
                return
            if not take_step(job, steps):
                self.jobs.pop(job, None)
        self._stepping = bool(self.jobs)
        if self._stepping:
            self.soon(self.token_s, self._step)


def _dies(job: Job) -> bool:
    """Whether the next token is the poison."""
    words = words_of(job.request)
    return POISON in words and words[job.completion_tokens % len(words)] == POISON
