"""Hours at half load, with clients, workers and keys that come and go: does anything grow?

    python -m bench soak --minutes 15

Echo workers, of whose slots half are in use at any time; one client process, one worker and the controller stay, and what they hold is
looked at: memory, descriptors, threads. A straight line is put through each after the first tenth of the run (ten minutes, where that is
more and the run has half an hour). All answers are checked token by token.

Prints a table and one line of JSON; exit code 1 where a line rises by more than it may, or an answer was wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from .chaos_network import Child, Network
from .fuzzing.sockets import Honest
from .result import add_out, print_last_line, table
from .soak_churn import Churn, Keys
from .soak_slopes import BOUNDS, Sample, sample, slopes

WORKERS, SLOTS, CLIENTS = 4, 48, 2
TOKENS, TOKEN_S, DEADLINE_S = 200, 0.02, 120.0
GRACE_S = 2.0
SAMPLE_S = 5.0
START_S = 10.0
"""For processes to come up, before anything goes."""
LONG_S = 1800.0
"""A run of so long leaves out its first ten minutes."""


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("soak", help="half load and churn for long: does anything grow?")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="M", help="(default 15)")
    parser.add_argument("--seed", type=int, default=1, help="of what comes and goes (default 1)")
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
        with _network(Path(folder), keys) as (network, staying, honest):
            churn = Churn(network, keys, network.workers[1:], network.clients[1:], Random(args.seed))
            churn.start()
            try:
                samples = _watch(staying, seconds)
            finally:
                churn.stop()
            crashes = [name for name, child in staying.items() if child.ended() is not None]
            honest.stop()
            logs = network.logs()
    skipped_s = max(seconds / 10, 600.0 if seconds >= LONG_S else 0.0)
    bounds = BOUNDS | {"memory_mb": args.most_mb_per_hour}
    found = [each for name, all_ in samples.items() for each in slopes(name, [one for one in all_ if one.at_s >= skipped_s], bounds)]
    rows = [
        (each.what, f"{each.first:.1f}", f"{each.last:.1f}", f"{each.per_hour:+.2f}", f"{each.error:.2f}", "over" if each.is_over else "")
        for each in found
    ]
    print(table(("what", "first", "last", "an hour", "+-", ""), rows))
    bad = [each for each in honest.ended if each.code or each.wrong]
    resumed = sum(each.resumed for each in honest.ended)
    minutes = {name: [round(each.memory_mb, 2) for each in all_[:: round(60 / SAMPLE_S)]] for name, all_ in samples.items()}
    figures: dict[str, Any] = {
        "memory each minute, MB": minutes,
        "came and went": dict(churn.counts),
        "streams that ended": len(honest.ended),
        "of these resumed": resumed,
        "of these wrong or with an error": len(bad),
        "wrong in the churn": churn.wrong[:5],
        "crashes": crashes,
    }
    for name, value in figures.items():
        print(f"{name:40} {value}")
    for each in bad[:5]:
        print(f"bad: {each}")
    if bad or crashes:
        for name, text in logs.items():
            print(f"--- {name} said (last lines)\n{text[-2000:]}", file=sys.stderr)
    ok = not any(each.is_over for each in found) and not bad and not churn.wrong and not crashes and bool(honest.ended)
    settings = {"minutes": args.minutes, "seed": args.seed, "keys": keys is not None, "left out, s": skipped_s}
    print_last_line("soak", settings, args.out, ok=ok, slopes=[msgspec.to_builtins(each) for each in found], **figures)
    return 0 if ok else 1


@contextmanager
def _network(folder: Path, keys: Keys | None) -> Iterator[tuple[Network, dict[str, Child], Honest]]:
    """All processes, running; those that stay by name; and what the client process that stays says."""
    guarded = [] if keys is None else ["--curve-dir", str(keys.folder)]
    known = [] if keys is None else keys.arguments(keys.worker, "workers")
    worker = ["--slots", str(SLOTS), "--delay-per-token", str(TOKEN_S), "--grace", str(GRACE_S), *known]
    with Network(folder, controller=guarded, worker=worker) as network:
        for number in range(WORKERS):
            network.add_worker(f"worker-{number}")
        streams = WORKERS * SLOTS // 2 // CLIENTS
        shape = ["--streams", str(streams), "--tokens", str(TOKENS), "--deadline", str(DEADLINE_S), "--retries", "10"]
        for number in range(CLIENTS):
            network.add_client(f"client-{number}", "bench.chaos_client", *shape, "--seed", f"{number}/{{start}}")
        with _environment(keys):
            for child in (*network.controllers, *network.workers):
                child.start()
            time.sleep(START_S)
            honest = Honest(network.clients[0])
            honest.start()
            for child in network.clients[1:]:
                child.start()
            yield network, {"controller": network.controllers[0], "worker": network.workers[0], "client": network.clients[0]}, honest


@contextmanager
def _environment(keys: Keys | None) -> Iterator[None]:
    """Client processes find their keys there."""
    from zmqserve.credentials import CONTROLLER_KEY_VARIABLE, KEY_VARIABLE

    found = {} if keys is None else keys.options(keys.client)
    names = dict(zip(("key", "controller_key"), (KEY_VARIABLE, CONTROLLER_KEY_VARIABLE), strict=True))
    os.environ.update({names[name]: path for name, path in found.items()})
    try:
        yield
    finally:
        for name in found:
            os.environ.pop(names[name], None)


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
