"""A token bucket. Pure: `now` is passed in, in seconds of a monotonic clock."""

from __future__ import annotations


class Bucket:
    """Units come at `rate` a second, up to `most`. It begins full, and a charge may leave less than nothing in it."""

    __slots__ = ("_level", "_seen_s", "most", "rate")

    def __init__(self, rate: float, most: float, now: float) -> None:
        self.rate = rate
        self.most = most
        self._level = most
        self._seen_s = now

    def __repr__(self) -> str:
        return f"Bucket({self._level:g} of {self.most:g}, {self.rate:g} a second)"

    def level(self, now: float) -> float:
        """What is in it."""
        self._level = min(self.most, self._level + (now - self._seen_s) * self.rate)
        self._seen_s = now
        return self._level

    def take(self, now: float, units: float, *, least: float = float("-inf")) -> None:
        """Take so many, whether they are there or not, but not so many that less than `least` is left."""
        level = self.level(now)
        self._level = max(min(least, level), level - units)

    def wait_s(self, now: float, units: float = 0.0) -> float:
        """Seconds until it holds so many; 0 when it does."""
        return max(0.0, (units - self.level(now)) / self.rate)

    def change(self, rate: float, most: float, now: float) -> None:
        """Go on at another rate. A debt stays."""
        level = self.level(now)
        self.rate, self.most, self._level = rate, most, min(most, level)
