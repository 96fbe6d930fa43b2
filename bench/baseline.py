"""Ratios that no change may make worse: `bench/baseline.json` holds them, `python -m bench transport --check` compares.

Ratios and not times: both arms of a ratio are measured in turn in one run, on one machine, so what the machine is like cancels out for
the most part. What does not is the tolerance, which is stated and explained for each ratio.

    python -m bench.baseline RESULT...

puts the medians of these results into it (files that hold what a benchmark printed); tolerances and reasons stay.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct

from .report_results import Result, read
from .result import Spread, machine, table

PATH = Path(__file__).with_name("baseline.json")


class Bound(Struct, frozen=True, forbid_unknown_fields=True):
    """What one ratio was, which way is better, and by which part of it it may be worse, with the reason."""

    ratio: float
    better: Literal["lower", "higher"]
    tolerance: float
    why: str

    @property
    def limit(self) -> float:
        """The worst that it may be."""
        return round(self.ratio * (1 + self.tolerance if self.better == "lower" else 1 - self.tolerance), 6)

    def kept_by(self, ratio: float) -> bool:
        """Whether it is not worse than it may be."""
        return ratio <= self.limit if self.better == "lower" else ratio >= self.limit


class Baseline(Struct, frozen=True, forbid_unknown_fields=True):
    """Of one benchmark. `measured`: how and on what."""

    measured: str
    ratios: dict[str, Bound]


def check(benchmark: str, ratios: Mapping[str, float], path: Path = PATH) -> bool:
    """Print a table of what was measured beside the baseline; whether all ratios are kept. One that is missing on either side is not."""
    bounds = msgspec.json.decode(path.read_bytes(), type=dict[str, Baseline])[benchmark].ratios
    rows = []
    kept = True
    for name in dict.fromkeys([*bounds, *ratios]):
        bound, ratio = bounds.get(name), ratios.get(name)
        good = bound is not None and ratio is not None and bound.kept_by(ratio)
        kept = kept and good
        rows.append((name, *_cells(bound), "not measured" if ratio is None else f"{ratio:.3f}", "kept" if good else "WORSE"))
    load, cores = machine()["load"], machine()["cores"]
    if load > cores / 2:
        print(f"the machine was busy (load {load:g} on {cores} cores): a worse ratio may be noise, so measure again when it is not")
    print(table(("ratio", "baseline", "better", "tolerance", "limit", "now", ""), rows))
    return kept


def renew(results: Sequence[Result], path: Path = PATH) -> None:
    """Write the medians of what these results have of the baseline's ratios. ValueError where they have none of one."""
    baselines = msgspec.json.decode(path.read_bytes(), type=dict[str, Baseline])
    for benchmark in dict.fromkeys(str(result.data["benchmark"]) for result in results):
        some = [result.data for result in results if result.data["benchmark"] == benchmark]
        if benchmark not in baselines:
            raise ValueError(f"the baseline has no benchmark {benchmark!r}, only {', '.join(baselines)}")
        ratios = {}
        for name, bound in baselines[benchmark].ratios.items():
            values = [data["ratios"][name] for data in some if name in data["ratios"]]
            if not values:
                raise ValueError(f"no result of {benchmark} has {name}")
            ratios[name] = msgspec.structs.replace(bound, ratio=round(Spread.of(values).median, 4))
        facts = some[0]["machine"]
        measured = (
            f"medians of {len(some)} runs, {facts['cores']} cores of {facts['cpu']}, Python {facts['python']}, libzmq {facts['libzmq']}"
        )
        baselines[benchmark] = Baseline(measured, ratios)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(baselines), indent=2) + b"\n")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.baseline", description=__doc__)
    parser.add_argument("results", nargs="+", metavar="RESULT")
    try:
        renew(read(parser.parse_args().results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _cells(bound: Bound | None) -> tuple[str, str, str, str]:
    if bound is None:
        return "not there", "", "", ""
    return f"{bound.ratio:.3f}", bound.better, f"{bound.tolerance:.0%}", f"{bound.limit:.3f}"


if __name__ == "__main__":
    sys.exit(main())
