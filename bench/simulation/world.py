"""Simulated time: what happens when, decided by one seed, and a hash of all of it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from struct import Struct
from typing import Any
from zlib import crc32

from .trace import describe

_time = Struct("<d").pack


class World:
    """An agenda of events in order of time. `now` is in simulated seconds since the start.

    `digest` is a running checksum of all messages that arrived and all that was noted: equal seeds give equal digests.
    `log` gets a line for each of them when it is set.
    """

    def __init__(self, seed: int, log: Callable[[str], object] | None = None) -> None:
        self.seed = seed
        self.now = 0.0
        self.digest = 0
        self.events = 0
        self.log = log
        self._heap: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []
        self._serial = 0

    def __repr__(self) -> str:
        return f"World(seed={self.seed}, now={self.now:.3f}, {len(self._heap)} events to come)"

    def random_for(self, noun: str) -> Random:
        """Draws of its own for each noun: what one draws changes nothing for another."""
        return Random(f"{self.seed}/{noun}")

    def at(self, when_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Call `action(*arguments)` when it is time."""
        self._serial += 1
        heapq.heappush(self._heap, (when_s, self._serial, action, arguments))

    def after(self, delay_s: float, action: Callable[..., object], *arguments: Any) -> None:
        """Call `action(*arguments)` so much later."""
        self.at(self.now + delay_s, action, *arguments)

    def run(self, until_s: float) -> None:
        """Let time pass."""
        heap, pop = self._heap, heapq.heappop
        before = self._serial
        while heap and heap[0][0] <= until_s:
            when_s, _, action, arguments = pop(heap)
            self.now = max(self.now, when_s)
            action(*arguments)
        self.now = until_s
        self.events += self._serial - before

    def arrived(self, way: str, frames: tuple[bytes, ...]) -> None:
        """A message has arrived."""
        digest = crc32(_time(self.now), self.digest)
        for frame in frames:
            digest = crc32(frame, digest)
        self.digest = digest
        if self.log is not None:
            self.log(f"{self.now:10.4f}  {way}  {describe(frames)}")

    def note(self, text: str) -> None:
        """Something else has happened."""
        self.digest = crc32(f"{self.now:.9f}{text}".encode(), self.digest)
        self.say(text)

    def say(self, text: str) -> None:
        """For readers of the trace only."""
        if self.log is not None:
            self.log(f"{self.now:10.4f}  {text}")
