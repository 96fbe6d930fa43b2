"""One Client for many threads beside a Client for each: tokens a second.

    python -m bench threads [--threads 32]

A controller and an echo worker in processes of their own; each thread here reads one answer after the other. The two arms take turns.
`ratios` in the last line: `shared_vs_own` is the shared client's tokens/s over those of one client per thread (1: sharing costs nothing).
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from zmqserve import Client

from .model_network import model_network
from .result import Spread, add_out, print_last_line, progress, rounded, table


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("threads", help="one Client for many threads beside a Client for each")
    parser.add_argument("--threads", type=int, default=32, metavar="N", help="at once (default 32)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="of each answer (default 200)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="of each arm (default 7)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    rates: dict[str, list[float]] = {"shared": [], "own": []}
    options = ("--slots", str(args.threads))
    with (
        model_network("m", *options, backend="echo") as endpoint,
        ThreadPoolExecutor(args.threads) as pool,
    ):
        own = [Client(endpoint) for _ in range(args.threads)]
        shared = Client(endpoint)
        arms = {"shared": [shared] * args.threads, "own": own}

        def read(client: Client) -> int:
            return sum(len(chunk.token_ids) for chunk in client.generate("m", "a b c", max_tokens=args.tokens))

        for clients in arms.values():
            sum(pool.map(read, clients))
        for _ in progress(args.repeats, "threads"):
            for name, clients in arms.items():
                began_s = time.perf_counter()
                made = sum(pool.map(read, clients))
                rates[name].append(made / (time.perf_counter() - began_s))
        for client in (shared, *own):
            client.close()
    spreads = {name: Spread.of(each) for name, each in rates.items()}
    print(table(("tokens/s", "median", "min..max"), [(name, *spread.cells()) for name, spread in spreads.items()]))
    print_last_line(
        "threads",
        {"threads": args.threads, "tokens": args.tokens, "repeats": args.repeats},
        args.out,
        tokens_per_s={name: round(spread.median) for name, spread in spreads.items()},
        ratios=rounded({"shared_vs_own": spreads["shared"].median / spreads["own"].median}),
    )
    return 0
