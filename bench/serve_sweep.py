"""The highest request rate that a network serves well: looked for by doubling, then by halving the gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPAN = 2.0**10
"""How far from the first rate it is looked for, up and down."""
ALONE = 0.5
"""Where fewer requests than this are open on average, each is as good as alone: a lower rate makes none better."""


@dataclass(frozen=True)
class Trial:
    """One rate that was tried. `share`: of all requests that were sent, those that kept the goodput; `open`: requests, on average."""

    request_rate: float
    share: float
    open: float
    result: dict[str, Any]

    def kept(self, wanted: float) -> bool:
        """Whether enough of them did."""
        return self.share >= wanted


@dataclass(frozen=True)
class Sweep:
    """What was found. `request_rate`: the highest that kept the goodput, 0 if none did; `above`: the lowest above it that did not,
    None if none was tried that did not."""

    request_rate: float
    above: float | None
    trials: list[Trial]


def sweep(measure: Callable[[float], Trial], start: float, wanted: float, tolerance: float, most: float = math.inf) -> Sweep:
    """Try `start`; double it while the goodput is kept (up to `most`), or halve it until it is (or requests are alone and it still is
    not); then bisect between the last two.

    It ends when the lowest rate that failed is at most 1 + `tolerance` times the highest that passed. Bisection takes the geometric
    mean, since it is a ratio that is looked for. A rate is tried once: what noise does to one trial stays in the result, and every
    trial stands in it.
    """
    trials: list[Trial] = []

    def passes(rate: float) -> bool:
        trials.append(measure(rate))
        return trials[-1].kept(wanted)

    rate = min(_short(start), most)
    low, high = (rate, None) if passes(rate) else (0.0, rate)
    while high is None and low < min(most, start * SPAN):
        rate = min(low * 2, most)
        low, high = (rate, None) if passes(rate) else (low, rate)
    while not low and high is not None and high > start / SPAN and trials[-1].open > ALONE:
        rate = high / 2
        low, high = (rate, high) if passes(rate) else (0.0, rate)
    while low and high is not None and high > low * (1 + tolerance):
        rate = _short(math.sqrt(low * high))
        low, high = (rate, high) if passes(rate) else (low, rate)
    return Sweep(low, high, trials)


def _short(rate: float) -> float:
    """With four digits: it stands in names of files, and no trial tells two rates apart that differ by less."""
    return float(f"{rate:.4g}")
