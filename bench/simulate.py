"""The failure contract proved by simulation: real code, simulated network, clocks and faults, all from one seed.

    python -m bench simulate --seed 1 --hours 10

Run number i has the seed S + i, which decides its topology, load, faults and every delay. In each run clients check all answers
token by token and every error by whether a fault can have caused it; then everything heals, and every request must have ended,
nothing may be in use or kept anywhere, all workers must be registered, and a new request through each controller must succeed.
The first run that fails ends it, with the command that repeats that run.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import traceback
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from .simulation.plants import PLANTS, planted
from .simulation.run import Run
from .simulation.scenario import KINDS

HOUR_S = 3600.0
PROGRESS_S = 10.0


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("simulate", help="real code on a simulated network with faults: proves the failure contract")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the first run; the next has S + 1 (default 1)")
    parser.add_argument("--hours", type=float, default=1.0, metavar="H", help="simulated, over all runs (default 1)")
    parser.add_argument("--runs", type=int, default=None, metavar="N", help="stop after so many runs")
    parser.add_argument("--faults", default=",".join(KINDS), metavar="KIND,...", help=f"only these kinds, of: {', '.join(KINDS)}; or none")
    parser.add_argument("--trace", action="store_true", help="print every message and event")
    parser.add_argument("--plant", choices=sorted(PLANTS), help="put this bug into the real code: it must be found")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    kinds = _kinds(args.faults)
    total = Total()
    failed: dict[str, object] | None = None
    with quiet(), planted(args.plant):
        for seed in range(args.seed, sys.maxsize):
            if total.simulated_s >= args.hours * HOUR_S or total.runs == args.runs:
                break
            failed = total.add(seed, kinds, trace=args.trace)
            if failed is not None:
                break
    print(total.table())
    settings = {"seed": args.seed, "hours": args.hours, "runs": args.runs, "faults": sorted(kinds), "plant": args.plant}
    print(json.dumps({"benchmark": "simulate", "settings": settings, **total.figures(), "failed": failed}))
    return int(failed is not None)


def _kinds(text: str) -> frozenset[str]:
    kinds = frozenset(name.strip() for name in text.split(",")) - {"", "none"}
    unknown = kinds - set(KINDS)
    if unknown:
        raise SystemExit(f"no such fault: {', '.join(sorted(unknown))}; there are: {', '.join(KINDS)}")
    return kinds


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines: what befalls simulated workers is no news."""
    before = structlog.get_config() if structlog.is_configured() else None
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.reset_defaults()
        if before is not None:
            structlog.configure(**before)


class Total:
    """All runs together."""

    def __init__(self) -> None:
        self.runs = 0
        self.simulated_s = self.spent_s = 0.0
        self.events = self.joins = 0
        self.outcomes: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._told_s = time.monotonic()

    def __repr__(self) -> str:
        return f"Total({self.runs} runs, {self.simulated_s / HOUR_S:.2f} h)"

    def add(self, seed: int, kinds: Collection[str], *, trace: bool) -> dict[str, object] | None:
        """Do this run. Returns what is wrong with it."""
        began_s = time.process_time()
        try:
            result = Run(seed, kinds, print if trace else None).run()
        except Exception as error:  # noqa: BLE001 - whatever it is, it was found
            print(traceback.format_exc())
            chosen = "" if set(kinds) == set(KINDS) else f' --faults "{",".join(sorted(kinds)) or "none"}"'
            command = f"python -m bench simulate --seed {seed} --runs 1{chosen} --trace"
            print(f"seed {seed} failed after {self.simulated_s / HOUR_S:.2f} simulated hours: {error}\nrepeat it with: {command}")
            return {"seed": seed, "why": f"{type(error).__name__}: {error}", "command": command}
        finally:
            self.spent_s += time.process_time() - began_s
            self.runs += 1
        self.simulated_s += result.simulated_s
        self.events += result.events
        self.joins += result.joins
        self.outcomes += result.outcomes
        self.faults += result.faults
        if time.monotonic() - self._told_s > PROGRESS_S:
            self._told_s = time.monotonic()
            print(f"{self.runs} runs, {self.simulated_s / HOUR_S:.2f} h, {self.speed_up:.0f} x real time", file=sys.stderr, flush=True)
        return None

    @property
    def speed_up(self) -> float:
        """Simulated seconds per second of one core."""
        return self.simulated_s / max(self.spent_s, 1e-9)

    def figures(self) -> dict[str, object]:
        """For the last line."""
        return {
            "simulated_hours": round(self.simulated_s / HOUR_S, 3),
            "cpu_s": round(self.spent_s, 1),
            "speed_up": round(self.speed_up),
            "runs": self.runs,
            "events": self.events,
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes.most_common()),
            "joins": self.joins,
            "faults": dict(self.faults.most_common()),
        }

    def table(self) -> str:
        """For people."""
        rows = [f"{self.runs} runs, {self.simulated_s / HOUR_S:.2f} simulated hours, {self.speed_up:.0f} x real time on one core"]
        for title, counts in (("requests", self.outcomes), ("faults", self.faults)):
            rows.append(f"\n{title:34}{sum(counts.values()):>12}")
            rows += [f"  {name:32}{count:>12}" for name, count in counts.most_common()]
        return "\n".join(rows) + f"\n\n{'answers joined after a loss':34}{self.joins:>12}"
