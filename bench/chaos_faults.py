"""Which faults happen when: drawn from a seed before the run, so that the same seed is the same plan. Pure."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

WEIGHTS = {
    "worker killed": 6,
    "worker stopped": 4,
    "worker drained": 3,
    "controller killed": 2,
    "controller stopped": 2,
    "client killed": 1,
    "poison": 1,
}
"""How often each kind is drawn: SIGKILL, SIGSTOP then SIGCONT, and SIGTERM of a worker; SIGKILL and SIGSTOP of a controller; ..."""
BOTH = "all controllers killed"
BOTH_EVERY_S = 100.0
"""All controllers are down together once in so long, and at least once in a run."""
FIRST_S = 2.0
"""When the first fault may come."""
INTERVAL_S = (1.0, 3.0)
DOWN_S = (0.3, 2.0)
"""How long what was killed stays away before it is started again."""
STOPPED_S = (0.5, 6.0)
"""How long a stopped process stays stopped: some are given up meanwhile (after 3 s), some are not."""


class Fault(NamedTuple):
    """One thing that goes wrong at `at_s` of the run. `target` in [0, 1) picks among those that are up; `lasts_s`: until it is mended."""

    at_s: float
    kind: str
    target: float
    lasts_s: float


def plan(seed: int, seconds: float) -> list[Fault]:
    """The faults of a run, in order."""
    random = Random(seed)
    times: list[float] = []
    at_s = FIRST_S
    while at_s < seconds:
        times.append(at_s)
        at_s += random.uniform(*INTERVAL_S)
    kinds = random.choices(list(WEIGHTS), list(WEIGHTS.values()), k=len(times))
    slices = max(1, round(seconds / BOTH_EVERY_S))
    for number in range(slices if times else 0):
        kinds[int((number + random.random()) * len(times) / slices)] = BOTH
    return [
        Fault(when_s, kind, random.random(), random.uniform(*(STOPPED_S if kind.endswith("stopped") else DOWN_S)))
        for when_s, kind in zip(times, kinds, strict=True)
    ]
