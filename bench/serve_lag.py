"""How late a client is itself: what it measures is later by so much, and its requests leave later."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TICK_S = 0.02
"""Between two looks at each kind of lag."""
LEAST_MS = 2.0
"""Lag below it is not worth a warning, whatever it is compared with."""
PART = 0.1
"""More lag than this part of the median time to first token is worth one."""
BUSY = 0.9
"""So is a client process that uses more than so much of a core."""


@dataclass
class Lag:
    """Of one client process, in seconds. `timers`: from when its event loop was to be woken to when it was. `reads`: from when another
    process wrote to it to when it had read that. `arrivals`: of its requests, behind the plan. `cpu_share`: of one core."""

    timers: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    cpu_share: float = 0.0


def summary(lags: Sequence[Lag], *, planned: bool, median_ttft_ms: float | None) -> dict[str, Any]:
    """Of all client processes together, in ms. `median_ttft_ms`: None where nothing was answered.

    `limits` says why the results show the client, too, in sentences; it is empty when they do not.
    """
    found: dict[str, Any] = {
        "timers_ms": _quantiles([lag for each in lags for lag in each.timers]),
        "reads_ms": _quantiles([lag for each in lags for lag in each.reads]),
        "arrivals_ms": _quantiles([lag for each in lags for lag in each.arrivals]) if planned else None,
        "cpu_share": [round(each.cpu_share, 3) for each in lags],
    }
    bound_ms = max(LEAST_MS, PART * (median_ttft_ms or 0))
    why = []
    if median_ttft_ms is not None and found["reads_ms"]["p99"] > bound_ms:
        why.append(f"one read in a hundred was {found['reads_ms']['p99']:.1f} ms late, beside a median TTFT of {median_ttft_ms:.1f} ms")
    if planned and found["arrivals_ms"]["p99"] > bound_ms:
        why.append(f"one request in a hundred left {found['arrivals_ms']['p99']:.1f} ms after its time")
    if max(found["cpu_share"], default=0.0) > BUSY:
        why.append(f"a client process used {max(found['cpu_share']):.0%} of a core")
    return found | {"limits": why}


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"p50": 0.0, "p99": 0.0, "max": 0.0}
    p50, p99, most = np.percentile(values, [50, 99, 100]) * 1000
    return {"p50": _digits(p50), "p99": _digits(p99), "max": _digits(most)}


def _digits(value: float) -> float:
    return round(float(value), 3) if math.isfinite(value) else 0.0
