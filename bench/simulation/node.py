"""A process on a host of its own: it is killed and started again, stopped and continued, and its clock is nobody else's."""

from __future__ import annotations

from math import inf

from .connection import HEARTBEAT_S
from .network import Network
from .world import World

LEAST_SLEEP_S = 0.001
"""What is due sooner is done in the next turn, as with a poll in whole milliseconds."""


class Node:
    """Runs `turn` when something has arrived and when it is due. `lag_s`: up to so much later, for several things at once.

    `skew_s` is how far its monotonic clock is from the world's. `life` counts its starts.
    """

    def __init__(self, world: World, network: Network, name: str, *, lag_s: float = 0.0) -> None:
        self.world, self.network, self.name = world, network, name
        self.random = world.random_for(name)
        self.lag_s = lag_s
        self.alive = False
        self.paused = False
        self.life = 0
        self.skew_s = self.random.uniform(0.0, 1e6)
        self._due_s = inf
        self._pauses = 0

    def __repr__(self) -> str:
        state = "dead" if not self.alive else "paused" if self.paused else "up"
        return f"{type(self).__name__}({self.name!r}, {state})"

    @property
    def clock_s(self) -> float:
        """What its monotonic clock shows."""
        return self.world.now + self.skew_s

    # --- what befalls it

    def start(self) -> None:
        """A new process."""
        if not self.alive:
            self.alive, self.paused = True, False
            self.life += 1
            self._due_s = inf
            self.world.note(f"{self.name} starts")
            self.begin()
            self._run()

    def kill(self) -> None:
        """SIGKILL: all that it knew is gone."""
        if self.alive:
            self.world.note(f"{self.name} is killed")
            self.leave()

    def leave(self) -> None:
        """The process ends."""
        self.alive = self.paused = False
        self.finish()

    def pause(self) -> None:
        """SIGSTOP: nothing is lost yet; what comes waits."""
        if self.alive and not self.paused:
            self.world.note(f"{self.name} is stopped")
            self.paused = True
            self._pauses += 1
            self.world.after(self.random.uniform(*HEARTBEAT_S), self._starved, self._pauses)

    def resume(self) -> None:
        """SIGCONT."""
        if self.paused:
            self.world.note(f"{self.name} goes on")
            self.paused = False
            self._run()

    def jump(self, seconds: float) -> None:
        """Its clock leaps, as after a suspend."""
        self.world.note(f"the clock of {self.name} leaps by {seconds:.1f} s")
        self.skew_s += seconds
        self._due_s = inf
        self.stir()

    def _starved(self, pauses: int) -> None:
        if self.paused and self._pauses == pauses:
            self.network.starve(self.name)

    # --- what it does

    def begin(self) -> None:
        """Make what a new process has."""
        raise NotImplementedError

    def finish(self) -> None:
        """Let go of sockets."""
        raise NotImplementedError

    def turn(self, now: float) -> float:
        """Do all that is to do; returns when there is more, by its own clock."""
        raise NotImplementedError

    def stir(self) -> None:
        """Something has arrived."""
        if self.alive and not self.paused:
            if self.lag_s:
                self._wake_at(self.world.now + self.lag_s * self.random.random())
            else:
                self._run()

    def _run(self) -> None:
        when_s = self.turn(self.clock_s)
        if self.alive and when_s < inf:
            self._wake_at(max(when_s - self.skew_s, self.world.now + LEAST_SLEEP_S))

    def _wake_at(self, when_s: float) -> None:
        # An earlier one that is no longer needed costs a turn in which nothing happens: less than to forget it.
        if when_s < self._due_s:
            self._due_s = when_s
            self.world.at(when_s, self._woken, when_s, self.life)

    def _woken(self, when_s: float, life: int) -> None:
        if when_s == self._due_s and life == self.life:
            self._due_s = inf
            if self.alive and not self.paused:
                self._run()
