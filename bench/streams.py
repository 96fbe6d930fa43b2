"""Thousands of streams at once in one AsyncClient: that all are whole, how soon they begin, and what each costs in memory.

    python -m bench streams [--streams 10000] [--tokens 20]

A controller and echo workers in processes of their own; the client is alone in this one. All streams are opened at once, each is read
by a task of its own and must be exactly what an echo is. One more is opened before them and read by nobody until they have ended: it
must have held nobody up, and be whole too. In the last line: wall time, tokens/s, time to the first chunk, and the growth of this
process's memory per stream.
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from typing import Any

from zmqserve import AsyncClient

from .model_network import model_network
from .result import add_out, print_last_line, rounded, table

WORDS = ("alpha", "beta", "gamma", "delta")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("streams", help="thousands of streams at once in one AsyncClient")
    parser.add_argument("--streams", type=int, default=10_000, metavar="N", help="at once (default 10000)")
    parser.add_argument("--tokens", type=int, default=20, metavar="N", help="of each (default 20)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    with model_network("m", "--slots", str(args.streams + 1), backend="echo") as endpoint:
        figures = asyncio.run(_measure(endpoint, args.streams, args.tokens))
    print(table(("", "value"), [(name, f"{value:,.1f}") for name, value in figures.items()]))
    print_last_line("streams", {"streams": args.streams, "tokens": args.tokens}, args.out, figures=rounded(figures, 3))
    return 0


async def _measure(endpoint: str, streams: int, tokens: int) -> dict[str, float]:
    firsts: list[float] = []

    async def read(number: int) -> bool:
        began_s = time.perf_counter()
        texts: list[str] = []
        async for chunk in client.generate("m", f"{number} {' '.join(WORDS)}", max_tokens=tokens):
            if not texts:
                firsts.append(time.perf_counter() - began_s)
            texts.append(chunk.text)
        return "".join(texts).split() == [*[str(number), *WORDS] * tokens][:tokens]

    async with AsyncClient(endpoint) as client:
        await client.generate("m", "warm up", stream=False, max_tokens=2)
        ignored = await client.generate("m", "x", max_tokens=5000)
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began_s = time.perf_counter()
        whole = await asyncio.gather(*[read(number) for number in range(streams)])
        wall_s = time.perf_counter() - began_s
        grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb
        if not all(whole) or (await ignored.text()).split() != ["x"] * 5000:
            raise RuntimeError(f"{whole.count(False)} of {streams} streams are not what they should be, or the ignored one is not")
    return {
        "wall_s": wall_s,
        "tokens_per_s": streams * tokens / wall_s,
        "first_p50_ms": statistics.median(firsts) * 1000,
        "first_p99_ms": statistics.quantiles(firsts, n=100)[98] * 1000,
        "kb_per_stream": grown_kb / streams,
    }
