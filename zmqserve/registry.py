"""The workers that a controller knows, the models that they serve, and who has room. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from .dispatch import Affinity, Allowed, Policy
from .liveness import Lease, Timer
from .messages import Load, ModelCard, Ready
from .need import Need
from .share import Share
from .waiting import WaitingRoom

if TYPE_CHECKING:
    from .flight import Flight


MOST_LIGHT = 64
"""Requests without a slot that a worker gets at once: a flood of them must not fill its pipe, or it would count as dead."""


QUIET_SHARE = 0.5
"""Of its ttl: a worker beats every third of it."""
TRIAL_ROUNDS = 16
"""About so many turns until all suspects have been tried, however many there are: isolation must not cost more than it saves."""


class Worker:
    """A registered worker. `running` is this controller's own exact count of slots in use, `others` what it reports of others'.

    `shares`: the same for each model that it offers, or that it does not offer any more and still answers.
    """

    def __init__(self, identity: bytes, ready: Ready, epoch: int, now: float) -> None:
        self.identity = identity
        self.epoch = epoch
        self.name = ready.name
        self.lease = Lease(ready.ttl_ms / 1000, now)
        self.shares: dict[str, Share] = {}
        self.update(ready)
        self.draining = False
        self.stalled_s: float | None = None
        self.pools: list[Pool] = []
        self.timers: list[Timer] = []
        self.flights: dict[tuple[int, int], Flight] = {}
        self.running = 0
        self.trials = 0
        self.others = 0
        self.waiting = 0
        self.step_age_ms = 0.0
        self.registered_s = now
        self.finished = 0

    def update(self, ready: Ready) -> None:
        """What it offers, first or anew; it keeps its name. `controllers`: the ids of those below, where it is one itself."""
        self.backend = ready.backend
        self.version = ready.version
        self.speed = ready.speed
        self.slots = ready.slots
        self.loading = ready.state == "loading"
        self.cards = {card.name: card for card in ready.models}
        self.shares = {model: share for model, share in self.shares.items() if share.running or model in self.cards}
        for model, card in self.cards.items():
            self.shares.setdefault(model, Share()).offer(card.slots, ready.slots)
        self.controllers = ready.controllers
        self.lease.ttl_s = ready.ttl_ms / 1000

    def __repr__(self) -> str:
        return f"Worker({self.name!r}, {self.state}, load={self.load}, slots={self.slots})"

    @property
    def state(self) -> str:
        """loading, ready, stalled or draining."""
        if self.loading:
            return "loading"
        if self.draining:
            return "draining"
        return "stalled" if self.stalled_s is not None else "ready"

    @property
    def load(self) -> int:
        """Slots in use, by this controller and by others."""
        return self.running + self.others

    @property
    def usable(self) -> bool:
        """Whether it may get new work at all."""
        return not self.loading and not self.draining and self.stalled_s is None

    def quiet(self, now: float) -> bool:
        """Whether it has missed a heartbeat: it may live, but others are the better choice."""
        return now - self.lease.heard_s > QUIET_SHARE * self.lease.ttl_s

    @property
    def free(self) -> int:
        """Slots that dispatch may use now."""
        return max(0, self.slots - self.running - self.others) if self.usable else 0

    def has_room(self, need: Need) -> bool:
        """Whether it may get one more request of that kind now."""
        return self.free > 0 if need.slotted else self.usable and len(self.flights) - self.running < MOST_LIGHT

    def report(self, load: Load) -> bool:
        """Take its heartbeat's figures; returns whether its free slots, or a model's, are others than before."""
        before = self.others
        self.others = max(0, load.running + load.waiting - load.yours)
        self.waiting = load.waiting
        self.step_age_ms = load.step_age_ms
        relented = [share.relent(self.others) for share in self.shares.values()]
        return self.others != before or any(relented)


NewPolicy: TypeAlias = Callable[[Callable[[Worker], int]], Policy[Worker]]
"""Makes a pool's policy, which is told how to ask for a worker's free slots."""


class Pool:
    """One model: the workers that serve it, their policy and the requests that wait for it.

    It outlives its last worker for a while, so that requests survive a restart of it.
    """

    def __init__(self, model: str, new_policy: NewPolicy, waiting: WaitingRoom) -> None:
        self.model = model
        self.policy = new_policy(self.free)
        self.waiting = waiting
        self.workers: dict[bytes, Worker] = {}
        self.card = ModelCard(model)
        """As its first ready worker offers it (or a loading one, or the last that there was)."""
        self.aliases: frozenset[str] = frozenset()
        self.running = 0
        self.orphan_timer: Timer | None = None
        self._affinity: Affinity[Worker] | None = None
        self._verbs: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"Pool({self.model!r}, {len(self.workers)} workers, {len(self.waiting)} waiting)"

    @property
    def state(self) -> str:
        """ready, loading, or ``no worker``."""
        if not self.workers:
            return "no worker"
        return "loading" if all(map(self.loads, self.workers.values())) else "ready"

    def loads(self, worker: Worker) -> bool:
        """Whether this worker has not loaded the model yet. A controller below may be ready for others: its card names no verbs then."""
        return worker.loading or not worker.cards[self.model].verbs

    def add(self, worker: Worker) -> None:
        """A worker of this model has come."""
        self.workers[worker.identity] = worker
        self.policy.add(worker)
        if self._affinity is not None:
            self._affinity.add(worker)
        self._members_changed()

    def remove(self, worker: Worker) -> None:
        """A worker of this model has gone."""
        del self.workers[worker.identity]
        self.policy.remove(worker)
        if self._affinity is not None:
            self._affinity.remove(worker)
        self._members_changed()

    def update(self, worker: Worker) -> None:
        """A worker of this model offers it in another way."""
        self.policy.changed(worker)
        self._members_changed()

    @property
    def slots(self) -> int:
        """How many requests of this model its workers take at a time, all together."""
        return sum(worker.shares[self.model].of(worker.slots) for worker in self.workers.values())

    def free(self, worker: Worker) -> int:
        """Slots of this worker that dispatch may use now for this model."""
        share = worker.shares[self.model]
        if share.slots is None and not share.others:  # as most: for each request this is asked several times
            return worker.free
        return share.free(worker.free, worker.slots)

    def can(self, need: Need) -> bool:
        """Whether any worker that has loaded the model meets the need, free or not."""
        return any(not self.loads(worker) and need.met_by(worker.cards[self.model]) for worker in self.workers.values())

    def hopeless(self, need: Need) -> bool:
        """Whether no worker there is, loading ones included, will ever meet the need."""
        return not any(self.loads(worker) or need.met_by(worker.cards[self.model]) for worker in self.workers.values())

    def serves(self, worker: Worker, need: Need) -> bool:
        """Whether this worker meets the need, has a slot for this model if it takes one, and may try one more suspect if it is one."""
        able = need.met_by(worker.cards[self.model]) and not (need.slotted and self.free(worker) <= 0)
        return able and not (need.trial and worker.trials >= self.trials_at_once)

    @property
    def trials_at_once(self) -> int:
        """How many suspects a worker may try at the same time."""
        return max(1, ceil(self.waiting.suspects / (TRIAL_ROUNDS * max(1, len(self.workers)))))

    def pick(self, need: Need, random: Random, affinity: str | None = None, avoid: frozenset[str] = frozenset()) -> Worker | None:
        """A worker with a free slot that meets the need, rather not one named in `avoid`; None when there is none."""
        allowed: Allowed[Worker] = None
        if need.verb not in self._verbs or need.fingerprint is not None or need.trial:
            allowed = lambda worker: self.serves(worker, need)  # noqa: E731 - chosen at run time, read at once
        if avoid:
            worker = self.policy.pick(random, lambda w: w.name not in avoid and (allowed is None or allowed(w)))
            if worker is not None:
                return worker
        worker = self.policy.pick(random, allowed)
        if worker is None or affinity is None:
            return worker
        if self._affinity is None:
            self._affinity = Affinity(self.free)
            for member in self.workers.values():
                self._affinity.add(member)
        return self._affinity.pick(affinity, worker, allowed)

    def any_usable(self, need: Need, random: Random) -> Worker | None:
        """A worker that may get a request which takes no slot, whether its slots are full or not."""
        fitting = [worker for worker in self.workers.values() if worker.has_room(need) and self.serves(worker, need)]
        return random.choice(fitting) if fitting else None

    def _members_changed(self) -> None:
        offers = [frozenset(worker.cards[self.model].verbs) for worker in self.workers.values() if not self.loads(worker)]
        self._verbs = frozenset.intersection(*offers) if offers else frozenset()  # what any of them can do needs no check
        if self.workers:
            self.card = min(self.workers.values(), key=self.loads).cards[self.model]
            self.aliases = frozenset(alias for worker in self.workers.values() for alias in worker.cards[self.model].aliases)


class Registry:
    """All workers and pools. A worker's load changes through `take`, `give_back` and `touch`, which tell the policies.

    `changes` counts those of who offers what, `moves` those of loads and states: who tells others of the whole looks again then.
    """

    def __init__(self, new_policy: NewPolicy, new_waiting: Callable[[], WaitingRoom]) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.by_name: dict[str, Worker] = {}
        self.pools: dict[str, Pool] = {}
        self.changes = 0
        self.moves = 0
        self._aliases: dict[str, str] = {}
        self._new_policy = new_policy
        self._new_waiting = new_waiting

    def __repr__(self) -> str:
        return f"Registry({len(self.workers)} workers, {len(self.pools)} models)"

    def __iter__(self) -> Iterator[Worker]:
        return iter(self.workers.values())

    def add(self, worker: Worker) -> None:
        """Register a worker whose identity and name are free."""
        self.workers[worker.identity] = worker
        self.by_name[worker.name] = worker
        for model in worker.cards:
            self._join(worker, model)
        self._name_aliases()

    def update(self, worker: Worker, ready: Ready) -> list[Pool]:
        """A registered worker offers something else; what runs on it runs on. Returns the pools that it has left, as `remove` does."""
        before, worker.pools = worker.pools, []
        models = {card.name for card in ready.models}
        left = [pool for pool in before if pool.model not in models]
        for pool in left:
            pool.remove(worker)
        worker.update(ready)
        kept = {pool.model: pool for pool in before if pool not in left}
        for model in worker.cards:
            if model in kept:
                worker.pools.append(kept[model])
                kept[model].update(worker)
            else:
                self._join(worker, model)
        self._name_aliases()
        return left

    def _join(self, worker: Worker, model: str) -> None:
        pool = self.pools.get(model)
        if pool is None:
            pool = self.pools[model] = Pool(model, self._new_policy, self._new_waiting())
        worker.pools.append(pool)
        pool.add(worker)

    def remove(self, worker: Worker) -> list[Pool]:
        """Forget a worker; returns the pools that it was in. Those without workers stay until `discard`."""
        del self.workers[worker.identity]
        del self.by_name[worker.name]
        pools, worker.pools = worker.pools, []
        for pool in pools:
            pool.remove(worker)
        for timer in worker.timers:
            timer.cancel()
        self._name_aliases()
        return pools

    def discard(self, pool: Pool) -> None:
        """Forget a model that has neither workers nor waiting requests."""
        del self.pools[pool.model]
        self._name_aliases()

    def find(self, model: str) -> Pool | None:
        """The pool of a model, by its name or an alias."""
        return self.pools.get(model) or self.pools.get(self._aliases.get(model, ""))

    def known_models(self) -> list[str]:
        """Every model's name, sorted."""
        return sorted(self.pools)

    def take(self, worker: Worker, model: str) -> None:
        """One more of its slots is in use, for this model."""
        worker.running += 1
        worker.shares[model].running += 1
        self.touch(worker)

    def give_back(self, worker: Worker, model: str) -> None:
        """One of its slots is free again."""
        worker.running -= 1
        worker.shares[model].running -= 1
        self.touch(worker)

    def refused(self, worker: Worker, model: str) -> None:
        """It said BUSY to a request for this model: others fill what it has, until a heartbeat tells by how much.

        That is the model's own share, where it has one: behind a controller below are workers of other models.
        """
        share = worker.shares[model]
        if worker.controllers or share.slots is not None:
            share.refused(worker.slots)
        else:
            worker.others = max(worker.others, worker.slots - worker.running)
        self.touch(worker)

    def touch(self, worker: Worker) -> None:
        """Its load or state has changed: tell the policies."""
        self.moves += 1
        for pool in worker.pools:
            pool.policy.changed(worker)

    def _name_aliases(self) -> None:
        self.changes += 1
        self.moves += 1
        self._aliases = {alias: pool.model for pool in self.pools.values() for alias in pool.aliases}
