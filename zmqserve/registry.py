"""The workers that a controller knows, the models that they serve, and who has room. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .liveness import Lease, Timer
from .messages import Load, Ready
from .need import Need
from .pool import NewPolicy, Pool
from .share import Share
from .waiting import WaitingRoom

if TYPE_CHECKING:
    from .flight import Flight


MOST_LIGHT = 64
"""Requests without a slot that a worker gets at once: a flood of them must not fill its pipe, or it would count as dead."""


QUIET_SHARE = 0.5
"""Of its ttl: a worker beats every third of it."""


class Worker:
    """A registered worker. `running` is this controller's own exact count of slots in use, `others` what it reports of others'.

    `shares`: the same for each model that it offers, or that it does not offer any more and still answers. `user` is its key, where it
    has one, and `key` that one's name.
    `change`: its offer as it is to be, where that has come too soon after others.
    `watching`: those of its pools that know its load and state as they are, and must be told when they change.
    `stalled_s`: since when it gets no new work. `hangs`: its last heartbeat says that its engine hangs. `hung_s`: since when, until that
    has made something again. A worker whose engine has nothing to do can't tell, so it is tried with one request at a time until then.
    """

    def __init__(self, identity: bytes, ready: Ready, epoch: int, now: float, user: str | None = None, key: str = "") -> None:
        self.identity = identity
        self.user = user
        self.key = key
        self.epoch = epoch
        self.name = ready.name
        self.lease = Lease(ready.ttl_ms / 1000, now)
        self.shares: dict[str, Share] = {}
        self.update(ready)
        self.draining = False
        self.stalled_s: float | None = None
        self.hung_s: float | None = None
        self.hangs = False
        self.pools: list[Pool] = []
        self.watching: dict[Pool, None] = {}
        self.timers: list[Timer] = []
        self.change: bytes | None = None
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
    def trusted(self) -> int:
        """Of its slots, how many it may get work for at a time."""
        return self.slots if self.hung_s is None else min(1, self.slots)

    @property
    def free(self) -> int:
        """Slots that dispatch may use now."""
        if self.loading or self.draining or self.stalled_s is not None:
            return 0
        return max(0, min(self.trusted, self.slots - self.others) - self.running)

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


class Registry:
    """All workers and pools. A worker's load changes through `take`, `give_back` and `touch`, which tell its pools.

    `changes` counts those of who offers what, `moves` those of loads and states: who tells others of the whole looks again then.
    """

    def __init__(self, new_policy: NewPolicy, new_waiting: Callable[[], WaitingRoom]) -> None:
        self.workers: dict[bytes, Worker] = {}
        self.by_name: dict[str, Worker] = {}
        self.pools: dict[str, Pool] = {}
        self.changes = 0
        self.moves = 0
        self.partial: frozenset[str] = frozenset()
        """Aliases that not all workers of their models know: who asks by one must be sent to a worker that does."""
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
        if pool.orphan_timer is not None:
            pool.orphan_timer.cancel()
        self._name_aliases()

    def find(self, model: str) -> Pool | None:
        """The pool of a model, by its name or an alias."""
        return self.pools.get(model) or self.pools.get(self._aliases.get(model, ""))

    @property
    def names(self) -> int:
        """How many models and aliases there are."""
        return len(self.pools) + len(self._aliases)

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

    def steps(self, worker: Worker) -> None:
        """Its engine has made something: it does not hang, or no more."""
        worker.hung_s = None
        self.touch(worker)

    def touch(self, worker: Worker) -> None:
        """Its load or state has changed: tell the pools that have not heard yet."""
        self.moves += 1
        if worker.watching:
            for pool in worker.watching:
                pool.moved[worker] = None
            worker.watching.clear()

    def _name_aliases(self) -> None:
        self.changes += 1
        self.moves += 1
        self._aliases = {alias: pool.model for pool in self.pools.values() for alias in pool.aliases}
        self.partial = frozenset(alias for pool in self.pools.values() for alias in pool.partial if self.find(alias) is pool)
