"""One run: a scenario in simulated time, from its first process to the proof that nothing is left of its faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from zmqserve.errors import ZmqserveError
from zmqserve.messages import Generate
from zmqserve.params import SamplingParams

from .causes import Chronicle
from .clients import ClientNode
from .controllers import ControllerNode
from .faults import Faults
from .load import Plan
from .network import Network
from .oracle import Ask, Oracle, Violation
from .rest import not_at_rest
from .scenario import KINDS, Scenario, draw
from .workers import WorkerNode
from .world import World

WARM_UP_S = 5.0
"""What all need to find each other before the first fault and the first request."""
QUIET_S = 120.0
"""Within so long after the last fault every request has ended ..."""
REST_S = 15.0
"""... and so long after that nothing is in use anywhere, and all are registered."""
PROBE_CONNECT_S = 5.0
"""A slow network stays slow when all else has healed: a greeting may take longer there than clients usually wait."""
PROBE_S = 40.0
"""What one more request through each controller may take then."""

MOST_NAMED = 5
"""Of what is wrong."""


@dataclass(frozen=True)
class Result:
    """What a run was like. `digest` stands for all that happened."""

    simulated_s: float
    events: int
    digest: int
    outcomes: Counter[str]
    faults: Counter[str]
    joins: int


class Run:
    """`log` gets the trace, line by line. Raises Violation, or whatever the code under test raises."""

    def __init__(self, seed: int, kinds: Collection[str] = KINDS, log: Callable[[str], object] | None = None) -> None:
        self.scenario = scenario = draw(seed, kinds)
        self.world = world = World(seed, log)
        world.note(repr(scenario))
        self.network = Network(world, room=scenario.room, delay_most_s=scenario.delay_most_s, spikes=scenario.spikes)
        self.chronicle = Chronicle(bounded="overload" in scenario.kinds, tight="full pipes" in scenario.kinds)
        self.oracle = Oracle(world, self.chronicle)
        self.controllers = [
            ControllerNode(
                world,
                self.network,
                name,
                scenario.controller_config,
                parents=[f"tcp://{parent}:5571" for parent in scenario.parents[name]],
                lag_s=scenario.lag_s,
            )
            for name in scenario.controllers
        ]
        self.workers = [
            WorkerNode(
                world,
                self.network,
                plan.config.name or "",
                plan.config,
                token_s=plan.token_s,
                load_s=plan.load_s,
                shares=plan.shares,
                lag_s=scenario.lag_s,
            )
            for plan in scenario.workers
        ]
        self.clients = [self._client(name, known, scenario) for name, known in scenario.clients.items()]
        self.faults = Faults(
            world,
            self.network,
            self.chronicle,
            scenario,
            controllers=self.controllers,
            workers=self.workers,
            clients=self.clients,
        )
        for worker in self.workers:
            worker.on_poison = self._poisoned

    def __repr__(self) -> str:
        return f"Run({self.scenario!r}, {self.world!r})"

    def _client(self, name: str, known: Collection[str], scenario: Scenario, *, connect_timeout_s: float = 0.75) -> ClientNode:
        endpoints = [f"tcp://{controller}:5570" for controller in known]
        return ClientNode(
            self.world,
            self.network,
            name,
            endpoints,
            self.oracle,
            habits=scenario.habits,
            models=scenario.models,
            buffer_bytes=scenario.buffer_bytes,
            connect_timeout_s=connect_timeout_s,
            lag_s=scenario.lag_s,
        )

    def _poisoned(self, worker: WorkerNode) -> None:
        """A poison prompt has killed this worker: somebody starts it again."""
        now = self.world.now
        again_s = self.faults.random.uniform(0.5, 8.0)
        self.chronicle.add("poison", "worker", now, worker.name, until_s=now + again_s)
        self.world.after(again_s, worker.start)

    def run(self) -> Result:
        """Let it happen."""
        world, scenario = self.world, self.scenario
        nodes = [*self.controllers, *self.workers]
        self.faults.random.shuffle(nodes)
        for node in nodes:
            world.after(self.faults.random.uniform(0.0, 1.0), node.start)
        world.run(WARM_UP_S)
        for client in self.clients:
            client.start()
        self.faults.start()
        world.run(WARM_UP_S + scenario.faulty_s)
        world.note("everything heals")
        for client in self.clients:
            client.asks = False
        self.faults.heal()
        self._wait(QUIET_S, lambda: [f"{ask!r} has not ended" for ask in self.oracle.open])
        self._wait(REST_S, self._not_at_rest)
        self._probe()
        self._wait(REST_S, self._not_at_rest)
        return Result(world.now, world.events, world.digest, self.oracle.outcomes, self.chronicle.counts, self.oracle.joins)

    def _wait(self, most_s: float, wrong: Callable[[], list[str]]) -> None:
        until_s = self.world.now + most_s
        while left := wrong():
            if self.world.now >= until_s:
                more = f"; and {len(left) - MOST_NAMED} more" if len(left) > MOST_NAMED else ""
                raise Violation(f"{most_s:g} s after everything was healed: {'; '.join(left[:MOST_NAMED])}{more}")
            self.world.run(self.world.now + 0.5)

    def _not_at_rest(self) -> list[str]:
        return [what for node in (*self.controllers, *self.workers, *self.clients) for what in not_at_rest(node)]

    def _probe(self) -> None:
        """A new request through each controller."""
        probes: list[tuple[Ask, ClientNode]] = []
        for controller in self.controllers:
            client = self._client(f"probe of {controller.name}", [controller.name], self.scenario, connect_timeout_s=PROBE_CONNECT_S)
            client.asks = False
            client.start()
            for place, model in enumerate(self.scenario.models):
                request = Generate(1 + place, model, prompt=f"are you there {controller.name}", params=SamplingParams(max_tokens=2))
                plan = Plan(request, None, None, collect=False, resume=True, retries=0, poison=False)
                probes.append((client.ask(plan), client))
        self._wait(PROBE_S, lambda: [f"{ask!r} was not answered" for ask, _ in probes if ask.ended_s is None])
        for ask, client in probes:
            if isinstance(ask.end, ZmqserveError):
                raise Violation(f"{ask!r} failed when all was well: {ask.end!r}")
            client.kill()
