"""What a chaos run must fulfil, and its figures as a table and as JSON."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from .chaos_faults import BOTH
from .chaos_ledger import median, quantile
from .chaos_run import Run

WHOLE_SHARE = 0.995
"""Of the requests whose client lived, so many must come whole and exact."""
KILLED_BY_ONE = 3
"""Workers that one poison may take: two in a row, and one before them if it had let the poison make progress."""


class Check(NamedTuple):
    """A requirement: what was seen, what it must be, and whether it is."""

    name: str
    seen: str
    wanted: str
    met: bool


def requirements(run: Run) -> list[Check]:
    """Each requirement of a run."""
    ledger = run.ledger
    zeros = {
        "requests lost (neither answer nor error)": ledger.lost,
        "wrong or duplicated tokens": len(ledger.wrong),
        "chunks lost or doubled on the way": ledger.gaps,
        "hung over 10 s beyond the deadline": ledger.hung,
        "slots leaked": run.leaked,
        "left over when all is idle": len(run.leftover),
        "processes that crashed": len(run.crashes),
    }
    share = Check(
        "completed whole and exact",
        f"{ledger.share_whole:.4%}",
        f">= {WHOLE_SHARE:.1%}",
        ledger.settled > 0 and ledger.share_whole >= WHOLE_SHARE,
    )
    answered = ledger.poison["answered"]
    return [
        share,
        *(Check(name, str(value), "0", value == 0) for name, value in zeros.items()),
        Check("poison answered", str(answered), "0", answered == 0),
        Check(
            "workers killed by poison",
            str(run.poisoned),
            f"<= {KILLED_BY_ONE * ledger.poisons}",
            run.poisoned <= KILLED_BY_ONE * ledger.poisons,
        ),
    ]


def print_table(run: Run, checks: list[Check], args: argparse.Namespace, took_s: float) -> None:
    """The figures, for people."""
    ledger = run.ledger
    print(
        f"{args.workers} workers, {args.controllers} controllers, {args.clients} clients, {args.streams} streams of {args.tokens} tokens "
        f"every {args.token_delay:g} s; {args.seconds:g} s of faults, seed {args.seed}, plant {args.plant}; took {took_s:.0f} s"
    )
    print(f"\nfaults: {', '.join(f'{count} {kind}' for kind, count in sorted(run.strikes.items()))}; {run.skipped} found nothing to strike")
    rows = [
        ("requests started", str(ledger.started)),
        ("of clients that were killed", str(ledger.forgotten)),
        ("whole and exact", f"{ledger.whole} of {ledger.settled}"),
        *((f"  failed: {name}", str(count)) for name, count in ledger.failed.most_common() if count),
        ("poison", f"{ledger.poisons}: " + ", ".join(f"{count} {name}" for name, count in ledger.poison.most_common())),
        ("tokens delivered", str(ledger.tokens)),
        ("answers joined, joins", f"{ledger.joined}, {ledger.joins}"),
        ("gap at a join, s: p50, p99, most", _gaps(ledger.join_gaps_s)),
        ("longest gap of a whole stream, s: p50, p99, most", _gaps(ledger.longest_gaps_s)),
        *((f"{name}, MiB: start, most, end", ", ".join(f"{each / 2**20:.1f}" for each in sizes)) for name, sizes in run.memory.items()),
        *(("  left over", line) for line in run.leftover),
        *(("  crash", line) for line in run.crashes),
        *(("  wrong", line) for line in ledger.wrong[:10]),
    ]
    for title, text in rows:
        print(f"{title:52} {text}")
    print()
    for check in checks:
        print(f"{'ok  ' if check.met else 'FAIL'} {check.name:47} {check.seen:>10}   wanted {check.wanted}")


def summary(run: Run) -> dict[str, Any]:
    """The figures, for programs."""
    ledger = run.ledger
    return {
        "faults": dict(sorted(run.strikes.items())),
        "all_controllers_down": run.strikes[BOTH],
        "started": ledger.started,
        "forgotten": ledger.forgotten,
        "whole": ledger.whole,
        "share_whole": round(ledger.share_whole, 6),
        "failed": {name: count for name, count in ledger.failed.items() if count},
        "lost": ledger.lost,
        "wrong": len(ledger.wrong),
        "gaps": ledger.gaps,
        "hung": ledger.hung,
        "poison": {"asked": ledger.poisons, "workers_killed": run.poisoned, **ledger.poison},
        "tokens": ledger.tokens,
        "joins": ledger.joins,
        "join_gap_s": _quantiles(ledger.join_gaps_s),
        "longest_gap_s": _quantiles(ledger.longest_gaps_s),
        "controller_memory_mib": {name: [round(each / 2**20, 1) for each in sizes] for name, sizes in run.memory.items()},
        "leaked": run.leaked,
        "leftover": run.leftover,
        "crashes": run.crashes,
    }


def _quantiles(values: list[float]) -> dict[str, float]:
    return {"p50": round(median(values), 3), "p99": round(quantile(values, 0.99), 3), "max": round(max(values, default=0.0), 3)}


def _gaps(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in _quantiles(values).values())
