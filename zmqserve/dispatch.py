"""Which worker gets a request. Policies are told of changes and asked for a pick; none scans its workers to answer.

A policy holds one model's workers, and asks `free` how many slots one has left for it. `pick` returns one that has a free slot,
or None. Its `allowed` narrows the choice (a resume needs equal fingerprints, a second try another worker); that rare path may scan.
"""

from __future__ import annotations

import bisect
import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from hashlib import blake2b
from operator import attrgetter
from random import Random
from typing import Generic, Protocol, TypeAlias, TypeVar


class Candidate(Protocol):
    """What a policy reads of a worker. `load` counts requests, `free` slots (0 when it must get no work), `speed` is relative.

    All are the worker's. Of its slots a model may have fewer: `free` given to a policy says how many are left for that.
    """

    @property
    def name(self) -> str: ...
    @property
    def speed(self) -> float: ...
    @property
    def slots(self) -> int: ...
    @property
    def load(self) -> int: ...
    @property
    def free(self) -> int: ...


W = TypeVar("W", bound=Candidate)
Allowed: TypeAlias = Callable[[W], bool] | None
_all_free: Callable[[object], int] = attrgetter("free")


class Policy(ABC, Generic[W]):
    """A dispatch method over the workers of one model. `free`: a worker's slots that are left for it."""

    def __init__(self, free: Callable[[W], int] = _all_free) -> None:
        self._free = free

    @abstractmethod
    def add(self, worker: W) -> None:
        """A worker has come; its load may be anything."""

    @abstractmethod
    def remove(self, worker: W) -> None:
        """A worker has gone; harmless when it is not held."""

    @abstractmethod
    def changed(self, worker: W) -> None:
        """A worker's load or state, or what it has left for this model, is another now."""

    @abstractmethod
    def pick(self, random: Random, allowed: Allowed[W] = None) -> W | None:
        """A worker with a free slot, or None. Changes nothing."""


class ShortestQueue(Policy[W]):
    """The least load / speed among workers with a free slot, ties broken at random (the default).

    Workers lie in buckets of equal load / speed, and a heap holds the buckets' keys: every call is O(log buckets).
    """

    def __init__(self, free: Callable[[W], int] = _all_free) -> None:
        super().__init__(free)
        self._buckets: dict[float, _Bucket[W]] = {}
        self._heap: list[float] = []
        self._key_of: dict[W, float] = {}

    def __repr__(self) -> str:
        return f"ShortestQueue({len(self._key_of)} with free slots)"

    def add(self, worker: W) -> None:
        self.changed(worker)

    def remove(self, worker: W) -> None:
        key = self._key_of.pop(worker, None)
        if key is not None:
            self._leave(key, worker)

    def changed(self, worker: W) -> None:
        if self._free(worker) <= 0:
            self.remove(worker)
            return
        key = worker.load / worker.speed
        buckets, old = self._buckets, self._key_of.get(worker)
        if key == old:
            return
        self._key_of[worker] = key
        bucket = buckets.get(key)
        if bucket is None:
            heapq.heappush(self._heap, key)
            if old is not None and len(buckets[old].members) == 1:  # alone there, as here: it takes its bucket along
                buckets[key] = buckets.pop(old)
                self._tidy()
                return
            bucket = buckets[key] = _Bucket()
        if old is not None:
            self._leave(old, worker)
        bucket.add(worker)

    def pick(self, random: Random, allowed: Allowed[W] = None) -> W | None:
        heap, buckets = self._heap, self._buckets
        while heap:
            bucket = buckets.get(heap[0])
            if bucket is not None:
                break
            heapq.heappop(heap)
        else:
            return None
        worker = bucket.choose(random)
        if allowed is None or allowed(worker):
            return worker
        for key in sorted(buckets):
            fitting = [worker for worker in buckets[key].members if allowed(worker)]
            if fitting:
                return random.choice(fitting)
        return None

    def _leave(self, key: float, worker: W) -> None:
        bucket = self._buckets[key]
        bucket.discard(worker)
        if not bucket.members:
            del self._buckets[key]
            self._tidy()

    def _tidy(self) -> None:
        """Keys without a bucket leave the heap when they are its larger part."""
        if len(self._heap) > 2 * len(self._buckets) + 64:
            self._heap[:] = self._buckets
            heapq.heapify(self._heap)


class _Bucket(Generic[W]):
    """A set with O(1) random choice."""

    __slots__ = ("_place", "members")

    def __init__(self) -> None:
        self.members: list[W] = []
        self._place: dict[W, int] = {}

    def add(self, worker: W) -> None:
        self._place[worker] = len(self.members)
        self.members.append(worker)

    def discard(self, worker: W) -> None:
        place = self._place.pop(worker)
        last = self.members.pop()
        if last is not worker:
            self.members[place] = last
            self._place[last] = place

    def choose(self, random: Random) -> W:
        members = self.members
        return members[0] if len(members) == 1 else members[int(random.random() * len(members))]


class Lottery(Policy[W]):
    """Each worker holds speed x free slots tickets, and one ticket is drawn.

    The tickets lie in a Fenwick tree (P. Fenwick, "A new data structure for cumulative frequency tables", 1994) of
    integers, which cannot drift as sums of floats do: every call is O(log workers).
    """

    TICKETS_PER_SPEED = 1000
    """Tickets of one free slot at speed 1: speeds are told apart to a thousandth."""

    def __init__(self, free: Callable[[W], int] = _all_free) -> None:
        super().__init__(free)
        self._size = 16
        self._tree = [0] * (self._size + 1)
        self._total = 0
        self._place: dict[W, int] = {}
        self._holders: list[W | None] = [None] * self._size
        self._tickets = [0] * self._size
        self._vacant = list(range(self._size - 1, -1, -1))

    def __repr__(self) -> str:
        return f"Lottery({len(self._place)} workers, {self._total} tickets)"

    def add(self, worker: W) -> None:
        if worker not in self._place:
            if not self._vacant:
                self._grow()
            place = self._vacant.pop()
            self._place[worker] = place
            self._holders[place] = worker
        self.changed(worker)

    def remove(self, worker: W) -> None:
        place = self._place.pop(worker, None)
        if place is not None:
            self._set(place, 0)
            self._holders[place] = None
            self._vacant.append(place)

    def changed(self, worker: W) -> None:
        self._set(self._place[worker], self._worth(worker))

    def pick(self, random: Random, allowed: Allowed[W] = None) -> W | None:
        if self._total == 0:
            return None
        worker = self._holders[self._find(random.randrange(self._total))]
        if worker is None or allowed is None or allowed(worker):
            return worker
        fitting = [worker for worker in self._place if self._free(worker) > 0 and allowed(worker)]
        return random.choices(fitting, [self._worth(worker) for worker in fitting])[0] if fitting else None

    def _worth(self, worker: W) -> int:
        free = self._free(worker)
        return max(1, round(worker.speed * free * self.TICKETS_PER_SPEED)) if free > 0 else 0

    def _set(self, place: int, tickets: int) -> None:
        difference = tickets - self._tickets[place]
        if difference == 0:
            return
        self._tickets[place] = tickets
        self._total += difference
        node = place + 1
        while node <= self._size:
            self._tree[node] += difference
            node += node & -node

    def _find(self, ticket: int) -> int:
        """The place that holds the ticket: the largest prefix of places whose tickets sum to at most `ticket`."""
        place, step = 0, self._size
        while step:
            if place + step <= self._size and self._tree[place + step] <= ticket:
                place += step
                ticket -= self._tree[place]
            step >>= 1
        return place

    def _grow(self) -> None:
        tickets, holders, old = self._tickets, self._holders, self._size
        self._size = old * 2
        self._tree = [0] * (self._size + 1)
        self._total = 0
        self._tickets = [0] * self._size
        self._holders = holders + [None] * old
        self._vacant = list(range(self._size - 1, old - 1, -1))
        for place, count in enumerate(tickets):
            self._set(place, count)


class Affinity(Generic[W]):
    """Keeps requests with one key on one worker, unless it is too loaded: consistent hashing with bounded loads
    (V. Mirrokni, M. Thorup, M. Zadimoghaddam, 2016).

    Every worker has `POINTS` points on a ring, by its name: a worker that comes or goes moves only its own keys, and one
    that returns under its name gets them back. A rendezvous hash would read every worker for every request.
    """

    POINTS = 64
    OVERLOAD = 1.5
    SLACK = 0.25
    """The choice stands while its load is at most OVERLOAD x the least plus SLACK of its slots: beside an idle worker
    1.5 x the least alone would move a session at its second request."""

    def __init__(self, free: Callable[[W], int] = _all_free) -> None:
        self._free = free
        self._ring: list[tuple[int, str]] = []
        self._workers: dict[str, W] = {}

    def __repr__(self) -> str:
        return f"Affinity({len(self._workers)} workers)"

    def add(self, worker: W) -> None:
        """A worker has come."""
        if worker.name not in self._workers:
            for point in _points(worker.name, self.POINTS):
                bisect.insort(self._ring, (point, worker.name))
        self._workers[worker.name] = worker

    def remove(self, worker: W) -> None:
        """A worker has gone; harmless when it is not held."""
        if self._workers.get(worker.name) is worker:
            del self._workers[worker.name]
            for point in _points(worker.name, self.POINTS):
                del self._ring[bisect.bisect_left(self._ring, (point, worker.name))]

    def pick(self, key: str, least: W, allowed: Allowed[W] = None) -> W:
        """The key's worker, or the next on the ring that has a free slot and is not overloaded; `least` (what the policy
        would pick) when there is none."""
        ring, size = self._ring, len(self._ring)
        start = bisect.bisect(ring, (_hash(key), ""))
        seen: set[str] = set()
        for step in range(size):
            name = ring[(start + step) % size][1]
            if name in seen:
                continue
            seen.add(name)
            worker = self._workers[name]
            bound = self.OVERLOAD * least.load / least.speed * worker.speed + self.SLACK * worker.slots
            if self._free(worker) > 0 and worker.load <= bound and (allowed is None or allowed(worker)):
                return worker
            if len(seen) == len(self._workers):
                break
        return least


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


def _points(name: str, count: int) -> list[int]:
    return [_hash(f"{name}#{number}") for number in range(count)]


POLICIES: Mapping[str, type[Policy[Candidate]]] = {"shortest_queue": ShortestQueue, "lottery": Lottery}
"""The dispatch methods by name; a new one is an entry here."""
