"""`python -m bench NAME [options]`."""

from __future__ import annotations

import argparse
import sys

from . import (
    backpressure,
    batching,
    chaos,
    embeddings,
    frontends,
    latency,
    peers,
    recovery,
    report,
    roundtrips,
    serve,
    simulate,
    streams,
    threads,
    transport,
)
from .result import machine


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    serve.add_arguments(names)
    report.add_arguments(names)
    transport.add_arguments(names)
    chaos.add_arguments(names)
    frontends.add_arguments(names)
    latency.add_arguments(names)
    peers.add_arguments(names)
    roundtrips.add_arguments(names)
    streams.add_arguments(names)
    threads.add_arguments(names)
    recovery.add_arguments(names)
    embeddings.add_arguments(names)
    batching.add_arguments(names)
    backpressure.add_arguments(names)
    simulate.add_arguments(names)
    args = parser.parse_args()
    machine()  # its load is the one before the benchmark
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
