"""What processes hold over time, and how fast that grows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from .chaos_network import Child

MB = 1e6


class Sample(Struct):
    """What one process held at a time: seconds since the start of the run, resident memory in MB, descriptors, threads."""

    at_s: float
    memory_mb: float
    descriptors: int
    threads: int


class Slope(Struct):
    """A straight line through the samples of one figure: how much it gains in an hour, give or take `error` (two standard errors).

    `first` and `last`: its ends. `bound`: what it may gain; it is over that where even `per_hour - error` is, since the line through
    noise has some slope, too.
    """

    what: str
    per_hour: float
    error: float
    first: float
    last: float
    bound: float

    @property
    def is_over(self) -> bool:
        """Whether it grows by more than it may."""
        return self.per_hour - self.error > self.bound


BOUNDS = {"memory_mb": 1.0, "descriptors": 2.0, "threads": 1.0}
"""What each figure may gain in an hour."""


def sample(child: Child, at_s: float) -> Sample | None:
    """Of a process that lives; None of one that does not."""
    import psutil

    if child.process is None:
        return None
    try:
        process = psutil.Process(child.process.pid)
        with process.oneshot():
            return Sample(at_s, process.memory_info().rss / MB, process.num_fds(), process.num_threads())
    except psutil.NoSuchProcess:
        return None


def slopes(name: str, samples: Sequence[Sample], bounds: dict[str, float]) -> list[Slope]:
    """One for each figure of a process; of at least three samples."""
    times_h = [each.at_s / 3600 for each in samples]
    found = []
    for figure, bound in bounds.items():
        values = [float(getattr(each, figure)) for each in samples]
        per_hour, error = line(times_h, values)
        found.append(Slope(f"{name}: {figure}", per_hour, error, values[0], values[-1], bound))
    return found


def line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Least squares: the slope, and two of its standard errors."""
    count = len(xs)
    mean_x, mean_y = sum(xs) / count, sum(ys) / count
    spread = sum((x - mean_x) ** 2 for x in xs)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread
    rest = sum((y - mean_y - slope * (x - mean_x)) ** 2 for x, y in zip(xs, ys, strict=True))
    return slope, 2 * math.sqrt(rest / max(1, count - 2) / spread)
