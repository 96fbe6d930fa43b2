"""One model: its workers, who of them has room, and the requests that wait for it. Pure: no sockets, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import ceil
from random import Random
from typing import TYPE_CHECKING, TypeAlias

from .dispatch import Affinity, Allowed, Policy
from .liveness import Timer
from .messages import ModelCard
from .need import Need
from .waiting import FairQueue, WaitingRoom

if TYPE_CHECKING:
    from .registry import Worker

TRIAL_ROUNDS = 16
"""About so many turns until all suspects have been tried, however many there are: isolation must not cost more than it saves."""
NewPolicy: TypeAlias = "Callable[[Callable[[Worker], int]], Policy[Worker]]"
"""Makes a pool's policy, which is told how to ask for a worker's free slots."""


class Pool:
    """One model: the workers that serve it, their policy and the requests that wait for it.

    It outlives its last worker for a while, so that requests survive a restart of it. `moved`: the workers whose load or state has
    changed since its policy last heard of them. It hears of that when it is next asked, and not of each change, nor of those of a
    worker's other models.
    """

    def __init__(self, model: str, new_policy: NewPolicy, waiting: WaitingRoom) -> None:
        self.model = model
        self.policy = new_policy(self.free)
        self.waiting = waiting
        self.workers: dict[bytes, Worker] = {}
        self.moved: dict[Worker, None] = {}
        self.card = ModelCard(model)
        """As its first ready worker offers it (or a loading one, or the last that there was)."""
        self.aliases: frozenset[str] = frozenset()
        self.partial: frozenset[str] = frozenset()
        """Those of its aliases that not all of its workers know."""
        self.unheeded: frozenset[str] = frozenset()
        """Aliases that all knew, and not all do any more; what asked by one of these before does not say so yet (Need.alias)."""
        self.running = 0
        self.orphan_timer: Timer | None = None
        self.orphans: dict[Need, float] = {}
        """Since when nobody can answer what waits, by need, as `note_orphans` has found it."""
        self.empty_s: float | None = None
        """Since when there is no worker at all, likewise."""
        self._orphaned: dict[FairQueue, float] = {}
        self._affinity: Affinity[Worker] | None = None
        self._met: frozenset[Need] = frozenset()
        self._counted: dict[bytes, tuple[ModelCard, bool]] = {}
        """Each worker's card as it is counted, and whether it loads: with each that comes or goes only its own is looked at."""
        self._verbs: Counter[str] = Counter()
        self._aliases: Counter[str] = Counter()
        self._loaded = 0

    def __repr__(self) -> str:
        return f"Pool({self.model!r}, {len(self.workers)} workers, {len(self.waiting)} waiting)"

    @property
    def state(self) -> str:
        """ready, loading, or ``no worker``."""
        if not self.workers:
            return "no worker"
        return "loading" if all(map(self.loads, self.workers.values())) else "ready"

    @property
    def names(self) -> tuple[str, ...]:
        """Its own, and its aliases."""
        return self.model, *self.aliases

    def loads(self, worker: Worker) -> bool:
        """Whether this worker has not loaded the model yet. A controller below may be ready for others: its card names no verbs then."""
        return worker.loading or not worker.cards[self.model].verbs

    def add(self, worker: Worker) -> None:
        """A worker of this model has come."""
        self.workers[worker.identity] = worker
        self.policy.add(worker)
        worker.watching[self] = None
        if self._affinity is not None:
            self._affinity.add(worker)
        self._count(worker.identity, (worker.cards[self.model], self.loads(worker)))

    def remove(self, worker: Worker) -> None:
        """A worker of this model has gone."""
        del self.workers[worker.identity]
        self.policy.remove(worker)
        worker.watching.pop(self, None)
        self.moved.pop(worker, None)
        if self._affinity is not None:
            self._affinity.remove(worker)
        self._count(worker.identity, None)

    def update(self, worker: Worker) -> None:
        """A worker of this model offers it in another way."""
        self.policy.changed(worker)
        self._count(worker.identity, (worker.cards[self.model], self.loads(worker)))

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
        if need in self._met:
            return True
        return any(not self.loads(worker) and need.met_by(worker.cards[self.model]) for worker in self.workers.values())

    def hopeless(self, need: Need) -> bool:
        """Whether no worker there is, loading ones included, will ever meet the need."""
        return not any(self.loads(worker) or need.met_by(worker.cards[self.model]) for worker in self.workers.values())

    def note_orphans(self, now: float) -> None:
        """Look again at what waits in vain, and whether there are workers. What was found before keeps its time."""
        began_s = now if self.empty_s is None else self.empty_s
        self.empty_s = None if self.workers else began_s
        hopeless = {need: queue for need, queue in self.waiting.queues.items() if self.hopeless(need)}
        self._orphaned = {queue: self._orphaned.get(queue, began_s) for queue in hopeless.values()}
        self.orphans = {need: self._orphaned[queue] for need, queue in hopeless.items()}

    def has_hope(self, need: Need, avoid: frozenset[str]) -> bool:
        """Whether a worker that has slots for such work now meets the need, free or not, and is none of those."""
        able = (worker for worker in self.workers.values() if worker.usable and worker.shares[self.model].of(worker.slots))
        others = (worker for worker in able if worker.name not in avoid)
        return any(need.met_by(worker.cards[self.model]) for worker in others)

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
        if len(self.workers) == 1:  # no choice, so no policy need know how loaded it is
            (only,) = self.workers.values()
            able = self.free(only) > 0 if need in self._met else self.serves(only, need)
            return only if able else None
        if self.moved:
            self._look_again()
        allowed: Allowed[Worker] = None
        if need not in self._met:
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

    def _look_again(self) -> None:
        for worker in self.moved:
            self.policy.changed(worker)
            worker.watching[self] = None
        self.moved.clear()

    def _count(self, identity: bytes, offer: tuple[ModelCard, bool] | None) -> None:
        """A worker offers this now, None: nothing any more. What all of them offer together is kept up, and not made anew."""
        before = self._counted.get(identity)
        if offer == before:
            return
        if before is not None:
            self._add(*before, -1)
        if offer is None:
            del self._counted[identity]
        else:
            self._counted[identity] = offer
            self._add(*offer, 1)
        verbs = (verb for verb, workers in self._verbs.items() if workers == self._loaded)
        self._met = frozenset(map(Need, verbs))  # what any of them can do needs no check
        if self._counted:
            first = next(iter(self._counted.values()))
            self.card = next((card for card, loads in self._counted.values() if not loads), first[0])
            common = self.aliases - self.partial
            self.aliases = frozenset(self._aliases)
            self.partial = frozenset(alias for alias, workers in self._aliases.items() if workers < len(self._counted))
            self.unheeded |= common - (self.aliases - self.partial)

    def _add(self, card: ModelCard, loads: bool, sign: int) -> None:
        for counts, names in ((self._aliases, card.aliases), (self._verbs, () if loads else card.verbs)):
            for name in set(names):
                counts[name] += sign
                if not counts[name]:
                    del counts[name]
        self._loaded += 0 if loads else sign
