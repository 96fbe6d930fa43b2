"""`python -m bench NAME [options]`."""

from __future__ import annotations

import argparse
import sys

from . import (
    admission,
    attempts,
    backpressure,
    batching,
    chaos,
    curve,
    dispatch_load,
    embeddings,
    frontends,
    fuzz,
    latency,
    memory,
    peers,
    recovery,
    report,
    roundtrips,
    serve,
    simulate,
    soak,
    streams,
    threads,
    transport,
)
from .result import machine


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    attempts.add_arguments(names)
    serve.add_arguments(names)
    report.add_arguments(names)
    transport.add_arguments(names)
    dispatch_load.add_arguments(names)
    memory.add_arguments(names)
    chaos.add_arguments(names)
    curve.add_arguments(names)
    frontends.add_arguments(names)
    fuzz.add_arguments(names)
    latency.add_arguments(names)
    peers.add_arguments(names)
    roundtrips.add_arguments(names)
    streams.add_arguments(names)
    threads.add_arguments(names)
    recovery.add_arguments(names)
    embeddings.add_arguments(names)
    admission.add_arguments(names)
    batching.add_arguments(names)
    backpressure.add_arguments(names)
    simulate.add_arguments(names)
    soak.add_arguments(names)
    args = parser.parse_args()
    machine()  # its load is the one before the benchmark
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
