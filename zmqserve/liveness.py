"""Time, without a clock: leases on silent peers, beats, backoff and an agenda of things to do. `now` is always passed in.

Every time here is in seconds of a monotonic clock that the caller reads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

BEATS_PER_TTL = 3
"""A peer is given up after three missed heartbeats (Paranoid Pirate)."""


class Lease:
    """How long a peer may stay silent. Any traffic renews it: set `heard_s`, an attribute because the relay does it per message."""

    __slots__ = ("heard_s", "ttl_s")

    def __init__(self, ttl_s: float, now: float) -> None:
        self.ttl_s = ttl_s
        self.heard_s = now

    def __repr__(self) -> str:
        return f"Lease(ttl_s={self.ttl_s}, heard_s={self.heard_s})"

    @property
    def ends_s(self) -> float:
        """When the peer is given up if nothing more is heard."""
        return self.heard_s + self.ttl_s

    def expired(self, now: float) -> bool:
        """Whether the peer has been silent for its whole ttl."""
        return now >= self.ends_s


class Backoff:
    """Waiting times that grow from `first_s` by doubling up to `most_s`, each with jitter: 50-100 % of its length."""

    def __init__(self, first_s: float, most_s: float, random: Random) -> None:
        self.first_s, self.most_s = first_s, most_s
        self._random = random
        self._tries = 0

    def __repr__(self) -> str:
        return f"Backoff(first_s={self.first_s}, most_s={self.most_s}, tries={self._tries})"

    def next_s(self) -> float:
        """How long to wait now."""
        length = min(self.most_s, self.first_s * 2.0 ** min(self._tries, 60))
        self._tries += 1
        return length * self._random.uniform(0.5, 1.0)

    def reset(self) -> None:
        """It worked: start from `first_s` again."""
        self._tries = 0


class Timer:
    """Something that an Agenda will do; `cancel` it when it need not."""

    __slots__ = ("_agenda", "action", "when_s")

    def __init__(self, when_s: float, action: Callable[[float], Any], agenda: Agenda) -> None:
        self.when_s = when_s
        self.action: Callable[[float], Any] | None = action
        self._agenda = agenda

    def __repr__(self) -> str:
        return f"Timer(when_s={self.when_s}, {'pending' if self.action else 'over'})"

    def cancel(self) -> None:
        """Don't do it. Harmless when it is done."""
        if self.action is not None:
            self.action = None
            self._agenda._forget()


class Agenda:
    """Timers in order. Cancelled ones are dropped lazily, and all at once when they are the larger half."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._serial = 0
        self._cancelled = 0

    def __repr__(self) -> str:
        return f"Agenda({len(self)} pending)"

    def __len__(self) -> int:
        return len(self._heap) - self._cancelled

    def at(self, when_s: float, action: Callable[[float], Any]) -> Timer:
        """Call `action(now)` at the first `run` from `when_s` on. Equal times keep their order."""
        timer = Timer(when_s, action, self)
        self._serial += 1
        heapq.heappush(self._heap, (when_s, self._serial, timer))
        return timer

    def next_s(self) -> float | None:
        """When the next timer is due; None when there is none."""
        heap = self._heap
        while heap and heap[0][2].action is None:
            heapq.heappop(heap)
            self._cancelled -= 1
        return heap[0][0] if heap else None

    def run(self, now: float) -> None:
        """Do what is due. An action may add and cancel timers; one that it adds for a time already due runs too."""
        heap = self._heap
        while heap and heap[0][0] <= now:
            timer = heapq.heappop(heap)[2]
            action, timer.action = timer.action, None
            if action is None:
                self._cancelled -= 1
            else:
                action(now)

    def _forget(self) -> None:
        self._cancelled += 1
        if self._cancelled > 64 and self._cancelled * 2 > len(self._heap):
            self._heap[:] = [entry for entry in self._heap if entry[2].action is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0
