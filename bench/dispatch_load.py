"""What one request costs a controller's state machine, with 1,000 workers against 10: from its arrival to its end, without sockets.

    python -m bench dispatch [--quick]

In `full` all slots are taken and ten times as many requests wait as there are workers: each end gives a slot to one that waits, each
arrival joins the queue. In `half` half of the slots are free: each arrival is dispatched at once. Both sizes are up at once and take turns,
block by block. `ratios` in the last line: the large network's CPU time per request over the small one's; lower is better, and with
1.0 nothing depends on how many workers and requests there are.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any, NamedTuple

from zmqserve.dispatch import POLICIES

from .pure_broker import NOW, PureBroker
from .result import Spread, add_out, print_last_line, progress, rounded, table

SLOTS = 8
WAITING_PER_WORKER = 10
BLOCK = 32
"""Requests between two turns of the other size: less than half of the small network's slots."""


class Case(NamedTuple):
    """One load. `models`: so many, all served by every worker."""

    full: bool
    dispatch: str
    affinity: bool
    models: int

    @property
    def name(self) -> str:
        """As the ratios name it."""
        parts = ["full" if self.full else "half", self.dispatch, *(["affinity"] if self.affinity else [])]
        return "_".join([*parts, f"{self.models}_models"] if self.models > 1 else parts)


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("dispatch", help="a request's cost with 1,000 workers and 10,000 waiting, against 10 and 100")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--small", type=int, default=10, metavar="N", help="workers of the small network (default 10)")
    parser.add_argument("--large", type=int, default=1000, metavar="N", help="of the large one (default 1000)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    repeats, blocks = (5, 20) if args.quick else (9, 60)
    cases = [Case(full, name, affinity, models) for full in (True, False) for name in POLICIES for affinity, models in _MIXTURES]
    sizes = {"small": args.small, "large": args.large}
    figures: dict[str, dict[str, float]] = {}
    ratios: dict[str, float] = {}
    rows = []
    for number in progress(len(cases), "dispatch"):
        case = cases[number]
        times = measure(case, sizes, repeats, blocks)
        spreads = {size: Spread.of(each) for size, each in times.items()}
        ratio = Spread.of([large / small for small, large in zip(times["small"], times["large"], strict=True)])
        ratios[case.name] = ratio.median
        figures[case.name] = {f"{size}_us": spread.median for size, spread in spreads.items()}
        rows.append((case.name, *spreads["small"].cells(1), *spreads["large"].cells(1), *ratio.cells(2)))
    print(table(("us per request", f"{args.small} workers", "min..max", f"{args.large} workers", "min..max", "ratio", "min..max"), rows))
    settings = {**sizes, "slots": SLOTS, "waiting_per_worker": WAITING_PER_WORKER, "repeats": repeats, "requests": blocks * BLOCK}
    print_last_line("dispatch", settings, args.out, ratios=rounded(ratios), figures={name: rounded(each) for name, each in figures.items()})
    return 0


_MIXTURES = ((False, 1), (True, 1), (False, 8))


def measure(case: Case, sizes: dict[str, int], repeats: int, blocks: int) -> dict[str, list[float]]:
    """Microseconds of CPU per request: one mean of `blocks` blocks for each repetition, by size."""
    networks = {size: loaded(case, workers) for size, workers in sizes.items()}
    times: dict[str, list[float]] = {size: [] for size in sizes}
    for network in networks.values():
        _block(network)
    gc.collect()
    gc.disable()  # what it costs grows with all that this process holds, the other network included
    try:
        for _ in range(repeats):
            spent: dict[str, list[float]] = {size: [] for size in sizes}
            for _ in range(blocks):
                for size, network in networks.items():
                    spent[size].append(_block(network))
            for size, each in spent.items():
                times[size].append(statistics.fmean(each) * 1e6)
    finally:
        gc.enable()
    return times


def loaded(case: Case, workers: int) -> PureBroker:
    """A network under this load."""
    network = PureBroker(workers, slots=SLOTS, models=case.models, dispatch=case.dispatch, affinity=case.affinity)
    network.ask(network.slots + WAITING_PER_WORKER * workers if case.full else network.slots // 2)
    return network


def _block(network: PureBroker) -> float:
    """CPU seconds per request, while as many end as come."""
    from_client, from_worker = network.broker.from_client, network.broker.from_worker
    pairs = list(zip(network.ends(BLOCK), network.requests(BLOCK), strict=True))
    began_s = time.thread_time()
    for (identity, head, done), (envelope, payload) in pairs:
        from_worker(NOW, identity, head, done)
        from_client(NOW, envelope, payload)
    return (time.thread_time() - began_s) / BLOCK
