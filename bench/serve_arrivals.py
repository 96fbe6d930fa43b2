"""When an open loop sends its requests."""

from __future__ import annotations

import math

import numpy as np


def arrivals(count: int, request_rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each of `count` requests is due; all 0 for an infinite rate.

    As in `vllm bench serve`, with the same numbers for the same seed: gaps are drawn from a gamma distribution with shape `burstiness`
    and mean 1 / `request_rate` (shape 1: a Poisson process; infinite: even gaps), and stretched so that the last request is due at
    `count` / `request_rate`: seeds differ in the pattern, not in the rate.
    """
    if math.isinf(request_rate):
        return [0.0] * count
    if math.isinf(burstiness):
        gaps = np.full(count, 1 / request_rate)
    else:
        gaps = np.random.RandomState(seed).gamma(burstiness, 1 / (request_rate * burstiness), count)
    due = np.cumsum(gaps)
    return [float(each) for each in due * (count / request_rate / due[-1])]
