"""`python -m bench NAME [options]`."""

from __future__ import annotations

import argparse
import sys

from . import backpressure, batching, chaos, embeddings, recovery, simulate, transport


def main() -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    names = parser.add_subparsers(title="benchmarks", required=True, metavar="NAME")
    transport.add_arguments(names)
    chaos.add_arguments(names)
    recovery.add_arguments(names)
    embeddings.add_arguments(names)
    batching.add_arguments(names)
    backpressure.add_arguments(names)
    simulate.add_arguments(names)
    args = parser.parse_args()
    result: int = args.run(args)
    return result


if __name__ == "__main__":
    sys.exit(main())
