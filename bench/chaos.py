"""Nothing is lost: real processes die, stop and come back at random under load, and every request still ends once, whole or with an error.

    python -m bench chaos --seconds 600 --seed 1

Echo workers, controllers that share nothing, and client processes whose threads each hold a stream open. Every 1-3 s a fault
of the seed's plan strikes; the oracle compares each answer token by token. At the end all is mended, the streams finish, and
every controller must be idle with all slots free. Prints a table and one line of JSON; exit code 1 if a requirement is not met.

`--plant drop|duplicate|skip|leak` breaks the controllers or workers of this run in that way: it must then fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

from .chaos_faults import plan
from .chaos_ledger import Ledger
from .chaos_network import Network
from .chaos_plants import PLANTS
from .chaos_report import print_table, requirements, summary
from .chaos_run import Run


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("chaos", help="random faults under load: is anything lost?")
    parser.add_argument("--seconds", type=float, default=600.0, help="of faults (default 600); start and healing come on top")
    parser.add_argument("--seed", type=int, default=1, help="of the plan of faults (default 1)")
    parser.add_argument("--streams", type=int, default=500, help="open at any time, over all clients (default 500)")
    parser.add_argument("--clients", type=int, default=4, help="processes that ask (default 4)")
    parser.add_argument("--workers", type=int, default=6, help="(default 6)")
    parser.add_argument("--controllers", type=int, default=2, help="(default 2)")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer (default 200)")
    parser.add_argument("--token-delay", type=float, default=0.1, metavar="S", help="between tokens of a stream (default 0.1)")
    parser.add_argument("--slots", type=int, default=256, help="of each worker (default 256)")
    parser.add_argument("--deadline", type=float, default=120.0, metavar="S", help="of each request (default 120)")
    parser.add_argument("--retries", type=int, default=10, help="that clients allow before a first chunk (default 10)")
    parser.add_argument("--grace", type=float, default=2.0, metavar="S", help="what a drained worker gets to finish (default 2)")
    parser.add_argument("--plant", choices=sorted(PLANTS), default="none", help="a bug that the run must find")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    ledger = Ledger()
    with tempfile.TemporaryDirectory(prefix="zmqserve-chaos-") as folder:
        worker = ["--slots", str(args.slots), "--delay-per-token", str(args.token_delay), "--faults", "--grace", str(args.grace)]
        with Network(Path(folder), controllers=args.controllers, worker=worker, plant=args.plant) as network:
            for number in range(args.workers):
                network.add_worker(f"worker-{number}")
            per_client = [args.streams // args.clients + (number < args.streams % args.clients) for number in range(args.clients)]
            for number, streams in enumerate(per_client):
                shape = ["--streams", str(streams), "--tokens", str(args.tokens), "--deadline", str(args.deadline)]
                asks = [*shape, "--retries", str(args.retries), "--seed", f"{args.seed}/{number}/{{start}}"]
                network.add_client(f"client-{number}", "bench.chaos_client", *asks)
            chaos = Run(network, ledger, plan(args.seed, args.seconds), Random(args.seed))
            started_s = time.monotonic()
            chaos.go(args.seconds, args.deadline)
            took_s = time.monotonic() - started_s
            logs = network.logs()
    checks = requirements(chaos)
    print_table(chaos, checks, args, took_s)
    unmet = [check.name for check in checks if not check.met]
    if unmet:
        for name, text in logs.items():
            print(f"--- {name} said (last lines)\n{''.join(text.splitlines(keepends=True)[-20:])}", file=sys.stderr)
    print(json.dumps({"benchmark": "chaos", "settings": _settings(args), "ok": not unmet, "unmet": unmet, **summary(chaos)}))
    return 1 if unmet else 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name != "run"}
