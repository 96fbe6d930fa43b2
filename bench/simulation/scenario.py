"""What one run is like: who is there, who knows whom, how they ask, what goes wrong. All of it is drawn from the run's seed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from zmqserve.config import ControllerConfig
from zmqserve.worker import WorkerConfig

from .load import Habits

KINDS = (
    "worker killed",
    "worker paused",
    "worker drained",
    "worker doubled",
    "engine hung",
    "controller killed",
    "controller paused",
    "controller left",
    "client killed",
    "client paused",
    "client slow",
    "connection broken",
    "link stopped",
    "links stopped one by one",
    "clock leapt",
    "poison",
    "overload",
    "full pipes",
    "slow network",
)
"""All that can go wrong. Each run draws some of them."""
CONDITIONS = frozenset({"poison", "overload", "full pipes", "slow network"})
"""Those that are there all the time, and not at moments."""

LONGEST_S = (4.0, 8.0, 20.0)
"""What the longest answer takes at most: one of these."""
TTLS_S = (2.0, 3.0, 3.0, 6.0)
"""Of controllers and workers."""
UTILISATION = 0.4
"""Of the slots for a model, about, so that queues empty again after faults; three times as much where there is overload."""


@dataclass(frozen=True)
class WorkerPlan:
    """A worker and its pace, in seconds. `shares`: the models that it serves, with how many of its slots each may have; empty: one."""

    config: WorkerConfig
    token_s: float
    load_s: float
    shares: Mapping[str, int] = field(default_factory=dict)

    def slots(self, model: str) -> float:
        """Its slots for that model, about, when all of its models are asked for."""
        slots = self.config.slots or 1
        if not self.shares:
            return slots if model == self.config.model else 0
        return min(self.shares.get(model, 0), slots / len(self.shares))


@dataclass(frozen=True)
class Scenario:
    """One run. `parents`: for each controller, in order, the controllers that it is a worker of."""

    seed: int
    roots: tuple[str, ...]
    faulty_s: float
    kinds: tuple[str, ...]
    gap_s: float
    controllers: tuple[str, ...]
    parents: dict[str, tuple[str, ...]]
    controller_config: ControllerConfig
    workers: tuple[WorkerPlan, ...]
    clients: dict[str, tuple[str, ...]]
    habits: Habits
    models: tuple[str, ...]
    room: int
    delay_most_s: float
    spikes: float
    lag_s: float
    buffer_bytes: int = 16 * 2**20

    def __repr__(self) -> str:
        known = ", ".join(f"{name} under {'+'.join(parents)}" for name, parents in self.parents.items() if parents)
        return (
            f"Scenario({self.seed}: {len(self.controllers)} controllers{f' ({known})' if known else ''}, {len(self.workers)} workers, "
            f"{len(self.clients)} clients, {self.faulty_s:.0f} s of {', '.join(self.kinds) or 'nothing'})"
        )


def draw(seed: int, allowed: Collection[str] = KINDS) -> Scenario:
    """The run of this seed, with faults of the kinds allowed."""
    random = Random(f"{seed}/scenario")
    chosen = random.sample(KINDS, random.randrange(1, len(KINDS) // 2)) if random.random() < 0.9 else []
    kinds = tuple(kind for kind in KINDS if kind in chosen and kind in allowed)
    overload, full = "overload" in kinds, "full pipes" in kinds
    controllers, parents = _controllers(random)
    roots = tuple(name for name in controllers if not parents[name])
    inner = {parent for names in parents.values() for parent in names}
    leaves = [name for name in controllers if name not in inner]
    models = ("m", "n")[: random.choice((1, 1, 1, 2))]
    config = ControllerConfig(
        dispatch=random.choice(("shortest_queue", "shortest_queue", "lottery")),
        ttl_s=random.choice(TTLS_S),
        stall_s=random.uniform(4.0, 10.0),
        cancel_timeout_s=random.uniform(1.0, 5.0),
        orphan_grace_s=random.uniform(5.0, 10.0),
        outbox_bytes=random.randrange(2000, 8000) if full else 16 * 2**20,
        **_bounds(random) if overload else {},
    )
    longest = random.choice((6, 20, 60))
    slowest_s = random.choice(LONGEST_S) / longest
    workers = tuple(
        _worker(random, f"w{number}", leaves, models[number % len(models)], everywhere=number < len(models), slowest_s=slowest_s)
        for number in range(max(len(models), random.randrange(1, 5)))
    )
    workers = _shared(Random(f"{seed}/shares"), workers, models)
    clients = {f"u{number}": tuple(_known_to_client(random, roots, controllers)) for number in range(random.choice((1, 1, 2, 3)))}
    habits = Habits(
        gap_s=max(random.uniform(3.0, 12.0), len(clients) * _seconds_per_request(workers, longest) / UTILISATION) / (3 if overload else 1),
        longest=longest,
        poison=0.04 if "poison" in kinds else 0.0,
        bursts=0.1 if overload else 0.01,
    )
    return Scenario(
        seed=seed,
        roots=roots,
        faulty_s=random.uniform(40.0, 240.0),
        kinds=kinds,
        gap_s=random.choice((3.0, 6.0, 12.0, 24.0)),
        controllers=controllers,
        parents=parents,
        controller_config=config,
        workers=workers,
        clients=clients,
        habits=habits,
        models=models,
        room=random.randrange(3, 12) if full else 512,
        delay_most_s=random.choice((0.05, 0.2)) if "slow network" in kinds else random.choice((0.0005, 0.002, 0.01)),
        spikes=0.01 if "slow network" in kinds else 0.0,
        lag_s=random.choice((0.0, 0.0, 0.005)),
    )


def _bounds(random: Random) -> dict[str, Any]:
    return {"queue_requests": random.randrange(3, 12), "client_requests": random.randrange(2, 8)}


def _controllers(random: Random) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Names, and the parents of each."""
    shape = random.random()
    if shape < 0.7:
        names = tuple(f"c{number}" for number in range(random.choice((1, 1, 2, 2, 3))))
        return names, dict.fromkeys(names, ())
    roots = ("c0", "c1")[: random.choice((1, 1, 2))]
    children = ("c2", "c3")[: random.choice((1, 2))]
    parents: dict[str, tuple[str, ...]] = {**dict.fromkeys(roots, ()), **dict.fromkeys(children, roots)}
    if shape > 0.9:
        parents["c4"] = (random.choice(children),)
    return tuple(parents), parents


def _worker(random: Random, name: str, leaves: list[str], model: str, *, everywhere: bool, slowest_s: float) -> WorkerPlan:
    known = leaves if everywhere or random.random() < 0.8 else random.sample(leaves, random.randrange(1, len(leaves) + 1))
    config = WorkerConfig(
        model=model,
        name=name,
        controllers=tuple(f"tcp://{leaf}:5571" for leaf in known),
        slots=random.randrange(1, 5),
        ttl_s=random.choice(TTLS_S),
        speed=random.choice((1.0, 1.0, 2.0)),
        grace_s=random.uniform(1.0, 8.0),
    )
    return WorkerPlan(config, token_s=slowest_s * random.uniform(0.1, 1.0), load_s=random.choice((0.0, 0.5, 3.0)))


def _shared(random: Random, workers: tuple[WorkerPlan, ...], models: tuple[str, ...]) -> tuple[WorkerPlan, ...]:
    """Some workers serve all models, and some give a model only a part of their slots."""
    if random.random() < 0.5:
        return workers

    def shares(plan: WorkerPlan) -> dict[str, int]:
        served = models if random.random() < 0.7 else (plan.config.model,)
        return {model: random.randrange(1, 1 + (plan.config.slots or 1)) for model in served}

    return tuple(replace(plan, shares=shares(plan)) for plan in workers)


def _seconds_per_request(workers: tuple[WorkerPlan, ...], longest: int) -> float:
    """What one more request takes of the scarcest model's workers together. Lengths are squares of even draws: a third on average."""
    models = {plan.config.model for plan in workers}
    rates = [sum(plan.slots(model) / plan.token_s for plan in workers) for model in models]
    return longest / 3 / min(rates)


def _known_to_client(random: Random, roots: tuple[str, ...], controllers: tuple[str, ...]) -> list[str]:
    known = list(roots if random.random() < 0.8 else controllers)
    random.shuffle(known)
    return known if random.random() < 0.8 else known[:1]
