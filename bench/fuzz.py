"""Nothing that a peer sends may end a process, or cost an honest peer anything.

    python -m bench fuzz --inputs 1000000 --seed 1
    python -m bench fuzz --sockets --messages 1000000

Without `--sockets`: each decoder and each state machine is fed with golden messages that were changed, by value and by byte, and with
made up ones. State machines have honest peers beside the hostile ones, who are served all the while, and at the end of each round
nothing may be left over. A round of a target is decided by the seed: `--target NAME --round R --inputs N` repeats it.

With `--sockets`: see `bench/fuzzing/sockets.py`.

Prints a table, every input that broke something as a line for a test, and one line of JSON; exit code 1 if anything broke.
"""

from __future__ import annotations

import argparse
import sys
from multiprocessing import get_context
from typing import Any

import msgspec

from .fuzzing.broker import BrokerTarget, GuardedBrokerTarget
from .fuzzing.decoders import DECODERS
from .fuzzing.link import LinkTarget
from .fuzzing.run import Result, fuzz
from .fuzzing.session import SessionTarget
from .fuzzing.sockets import fuzz_sockets
from .fuzzing.target import NewTarget
from .fuzzing.texts import TEXTS
from .result import add_out, print_last_line, table
from .simulate import quiet

TARGETS: dict[str, NewTarget] = {
    **DECODERS,
    **TEXTS,
    "broker": BrokerTarget,
    "broker with keys": GuardedBrokerTarget,
    "session": SessionTarget,
    "link": LinkTarget,
}


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("fuzz", help="hostile bytes: decoders, state machines and sockets")
    parser.add_argument("--inputs", type=int, default=100_000, metavar="N", help="for each target (default 100000)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="(default 1)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be given several times")
    parser.add_argument("--round", type=int, default=0, metavar="R", help="the first round, to repeat one (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at a time (default 1)")
    parser.add_argument("--sockets", action="store_true", help="fuzz the sockets of a real controller instead")
    parser.add_argument("--messages", type=int, default=100_000, metavar="N", help="of hostile peers, with --sockets (default 100000)")
    parser.add_argument("--streams", type=int, default=50, help="with --sockets: honest ones at any time (default 50)")
    parser.add_argument(
        "--chosen",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of these peers that take a routing id which others have, too (default 0)",
    )
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    if args.sockets:
        return fuzz_sockets(args)
    names = args.target or list(TARGETS)
    work = [(name, args.inputs, args.seed, args.round) for name in names]
    if args.jobs > 1:
        # A process for each target: its memory is then its own.
        with get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
            results = pool.starmap(_fuzz_one, work, chunksize=1)
    else:
        results = [_fuzz_one(*each) for each in work]
    header = ("target", "inputs", "us each", "longest, ms", "grown, MB", "crashes")
    print(table(header, [_row(result) for result in results]))
    crashes = [crash for result in results for crash in result.crashes]
    for crash in crashes:
        print(f"\n{crash.target}, round {crash.round}, input {crash.number}: {crash.error}")
        print(f"{crash.where}    {crash.given}")
    settings = {"inputs": args.inputs, "seed": args.seed, "targets": names}
    figures = {result.target: msgspec.to_builtins(result) for result in results}
    print_last_line("fuzz", settings, args.out, ok=not crashes, crashes=len(crashes), results=figures)
    return 1 if crashes else 0


def _fuzz_one(name: str, inputs: int, seed: int, first_round: int) -> Result:
    with quiet():
        result = fuzz(name, TARGETS[name], inputs=inputs, seed=seed, first_round=first_round)
    print(f"{name}: {result.inputs:,} inputs, {len(result.crashes)} crashes", file=sys.stderr, flush=True)
    return result


def _row(result: Result) -> tuple[str, ...]:
    each_us = 1e6 * result.took_s / max(1, result.inputs)
    return (
        result.target,
        f"{result.inputs:,}",
        f"{each_us:.0f}",
        f"{1000 * result.longest_s:.2f}",
        f"{result.grown_mb:.1f}",
        str(len(result.crashes)),
    )
