"""Hours at half load, with clients, workers and keys that come and go: does anything grow?

    python -m bench soak --minutes 15

Echo workers, of whose slots half are in use at any time. The controller, one worker and two client processes stay, and what they hold is
looked at: memory, descriptors, threads. A straight line is put through each, after the first ten minutes (of a run of less than fifteen:
after its first tenth). All answers are checked token by token.

The C library of Linux keeps what a thread has freed for that thread: up to seven blocks of each of 64 sizes, and arenas beside, up to
eight a core. Over hours these fill, and their heaps break into pieces, which looks like a leak: most of all in a client process, with its
thread for each stream. So a second client process runs without them (MALLOC), and what it holds is shown beside: what both gain is held by
the program. All others are as users have them, and are held to the bounds.

Prints a table and one line of JSON; exit code 1 where a line rises by more than it may, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from .chaos_network import Child, Network
from .fuzzing.sockets import Honest
from .result import add_out, print_last_line, table
from .soak_churn import Churn, Keys
from .soak_slopes import BOUNDS, Sample, sample, slopes

WORKERS, SLOTS, CLIENTS = 4, 48, 3
TOKENS, TOKEN_S, DEADLINE_S = 200, 0.02, 120.0
MALLOC = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "MALLOC_ARENA_MAX": "1"}
"""What a thread frees is every thread's at once."""
WITHOUT = "client without caches"
GRACE_S = 2.0
SAMPLE_S = 5.0
START_S = 10.0
"""For processes to come up, before anything goes."""
LONG_S, SKIPPED_S = 900.0, 600.0
"""A run of so long leaves out its first ten minutes."""
SHOWN_S = 30.0
"""Before a wrong end: the workers that went in this time are shown with it."""


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("soak", help="half load and churn for long: does anything grow?")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="M", help="(default 15)")
    parser.add_argument("--seed", type=int, default=1, help="of what comes and goes (default 1)")
    parser.add_argument(
        "--token-s", type=float, default=TOKEN_S, metavar="S", help=f"between two tokens of an answer (default {TOKEN_S}); more: less load"
    )
    parser.add_argument("--no-keys", action="store_true", help="without CURVE")
    parser.add_argument(
        "--most-mb-per-hour", type=float, default=BOUNDS["memory_mb"], metavar="MB", help="that memory may gain (default 1)"
    )
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="zmqserve-soak-") as folder:
        keys = None if args.no_keys else Keys(Path(folder))
        with _network(Path(folder), keys, args.token_s) as (network, staying, both):
            churn = Churn(network, keys, network.workers[1:], network.clients[len(both) :], Random(args.seed))
            churn.start()
            try:
                samples = _watch(staying, seconds)
                churn.stop()
                crashes = [name for name, child in staying.items() if child.ended() is not None]
                for honest in both:
                    honest.stop()
            finally:
                churn.close()
            logs = network.logs()
    skipped_s = SKIPPED_S if seconds >= LONG_S else seconds / 10
    found = []
    for name, all_ in samples.items():
        bounds = BOUNDS | {"memory_mb": inf if name == WITHOUT else args.most_mb_per_hour}
        found += slopes(name, [one for one in all_ if one.at_s >= skipped_s], bounds)
    rows = [
        (each.what, f"{each.first:.1f}", f"{each.last:.1f}", f"{each.per_hour:+.2f}", f"{each.error:.2f}", "over" if each.is_over else "")
        for each in found
    ]
    print(table(("what", "first", "last", "an hour", "+-", ""), rows))
    ended = [each for honest in both for each in honest.ended]
    bad = [each for each in ended if each.code or each.wrong]
    minutes = {name: [round(each.memory_mb, 2) for each in all_[:: round(60 / SAMPLE_S)]] for name, all_ in samples.items()}
    figures: dict[str, Any] = {
        "memory each minute, MB": minutes,
        "came and went": dict(churn.counts),
        "streams that ended": len(ended),
        "of these resumed": sum(each.resumed > 0 for each in ended),
        "of these wrong or with an error": len(bad),
        "wrong in the churn": churn.wrong[:5],
        "crashes": crashes,
    }
    for name, value in figures.items():
        print(f"{name:40} {value}")
    for each in bad[:5]:
        print(f"bad: {each}")
        for gone in churn.gone:
            if 0 <= each.at_s - gone.at_s < SHOWN_S:
                print(f"  {each.at_s - gone.at_s:.1f} s before it: {gone.worker} {'killed' if gone.killed else 'told to drain'}")
    if bad or crashes:
        for name, text in logs.items():
            print(f"--- {name} said (last lines)\n{text[-2000:]}", file=sys.stderr)
    ok = not any(each.is_over for each in found) and not bad and not churn.wrong and not crashes and bool(ended)
    settings = {"minutes": args.minutes, "seed": args.seed, "token_s": args.token_s, "keys": keys is not None, "left out, s": skipped_s}
    print_last_line("soak", settings, args.out, ok=ok, slopes=[msgspec.to_builtins(each) for each in found], **figures)
    return 0 if ok else 1


@contextmanager
def _network(folder: Path, keys: Keys | None, token_s: float) -> Iterator[tuple[Network, dict[str, Child], list[Honest]]]:
    """All processes, running; those that stay by name; and what the client processes that stay say."""
    guarded = [] if keys is None else ["--curve-dir", str(keys.folder)]
    known = [] if keys is None else keys.arguments(keys.worker, "workers")
    worker = ["--slots", str(SLOTS), "--delay-per-token", str(token_s), "--grace", str(GRACE_S), *known]
    with Network(folder, controller=guarded, worker=worker) as network:
        for number in range(WORKERS):
            network.add_worker(f"worker-{number}")
        streams = WORKERS * SLOTS // 2 // CLIENTS
        shape = ["--streams", str(streams), "--tokens", str(TOKENS), "--deadline", str(DEADLINE_S), "--retries", "10"]
        for number in range(CLIENTS):
            network.add_client(f"client-{number}", "bench.chaos_client", *shape, "--seed", f"{number}/{{start}}")
        both = [Honest(child) for child in network.clients[:2]]
        with _environment({} if keys is None else keys.environment(keys.client)):
            for child in (*network.controllers, *network.workers):
                child.start()
            time.sleep(START_S)
            both[0].start()
            with _environment(MALLOC):
                both[1].start()
            for child in network.clients[2:]:
                child.start()
            staying = (network.controllers[0], network.workers[0], *network.clients[:2])
            yield network, dict(zip(("controller", "worker", "client", WITHOUT), staying, strict=True)), both


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What is started meanwhile finds these there."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _watch(staying: dict[str, Child], seconds: float) -> dict[str, list[Sample]]:
    """What they hold, every SAMPLE_S, for so long or until one of them is gone."""
    samples: dict[str, list[Sample]] = {name: [] for name in staying}
    began_s = time.monotonic()
    while (at_s := time.monotonic() - began_s) < seconds:
        for name, child in staying.items():
            one = sample(child, at_s)
            if one is None:
                return samples
            samples[name].append(one)
        time.sleep(SAMPLE_S)
    return samples
