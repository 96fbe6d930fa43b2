"""The same work on zmqserve and on other ways to serve, in one run: who relays, answers and embeds how fast, and at which cost in CPU.

    python -m bench peers [--quick] [--fastchat-python PATH] [--vllm-python PATH]

Each peer is started here, its broker (or server), worker and client in processes of their own; one that is not installed is left out,
with the reason. All are up at once and take turns, block by block. Medians, with the least and the most beside them. Workloads:
`token`: streams of 20-byte tokens, one token a message, a client that counts; `step`: the same with the tokens of all streams at one
position in one message. `token_decoded`, `step_decoded`: every token is decoded, and by an SDK delivered to its stream. `requests`:
answers of one chunk, so many in flight. `paced_*`: streams at 50 tokens/s; ms from send to hand. `embed`: vectors of 384 floats, 32 a
request, as arrays; over HTTP they are JSON, the standard library's (`embed`) or msgspec's (`embed_fast_json`).
`ratios` in the last line are named for what they compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from bench.result import machine, print_last_line, rounded, table, to_json

from .catalogue import Peer, peers, versions
from .loads import Scale
from .ratios import ratios
from .results import Block, Results
from .running import Running

CALLS: dict[str, tuple[str, tuple[bool, ...]]] = {
    "token": ("tokens", (False, False)),
    "token_decoded": ("tokens", (False, True)),
    "step": ("tokens", (True, False)),
    "step_decoded": ("tokens", (True, True)),
    "requests": ("requests", ()),
    "paced_token": ("paced", (False,)),
    "paced_step": ("paced", (True,)),
    "embed": ("embedded", (False,)),
    "embed_fast_json": ("embedded", (True,)),
}
"""Workload: the client's method, and what it gets after the scale."""


class Up(NamedTuple):
    """A peer that was started."""

    peer: Peer
    running: Running


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("peers", help="the same work on zmq.proxy, NATS, gRPC, FastAPI, FastChat and vLLM's server")
    parser.add_argument("--quick", action="store_true", help="two repeats of less work, to see that all runs")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="blocks of each workload (default 5)")
    parser.add_argument("--only", nargs="+", metavar="PEER", help="these peers (and none that is not installed)")
    parser.add_argument("--workloads", nargs="+", choices=list(CALLS), default=list(CALLS), metavar="NAME", help=f"of {', '.join(CALLS)}")
    parser.add_argument("--fastchat-python", type=os.path.abspath, metavar="PATH", help="a Python that has fschat")
    parser.add_argument("--vllm-python", type=os.path.abspath, metavar="PATH", help="a Python that has vllm")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the result and all blocks there, in peers.json")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    machine()  # the load as it was before this began
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was started ends, too
    scale = Scale(tokens=64, run_s=0.5, paced_s=1.0) if args.quick else Scale()
    repeats = 2 if args.quick else args.repeats
    known = peers(args)
    for name in set(args.only or ()) - {peer.name for peer in known}:
        raise SystemExit(f"--only: there is no peer {name!r}, only {', '.join(peer.name for peer in known)}")
    chosen = [peer for peer in known if not args.only or peer.name in args.only]
    results = Results({peer.name: peer.absent for peer in chosen if peer.absent})
    up: list[Up] = []
    try:
        for peer in chosen:
            if peer.absent is None:
                _start(peer, up, results)
        for workload in args.workloads:
            for block in range(-1, repeats):
                _say(f"{workload}, block {block + 1} of {repeats}" if block >= 0 else f"{workload}, warm-up")
                for each in tuple(up):
                    if workload in each.peer.can:
                        _measure(each, workload, scale, up, results, counts=block >= 0)
    finally:
        for _, running in up:
            running.close()
        _say("")
    results.show()
    found = ratios(results)
    print(table(("ratio", ""), [(name, f"{value:.3f}") for name, value in found.items()]))
    settings = {"repeats": repeats, **dataclasses.asdict(scale)}
    figures = {
        "load_after": round(os.getloadavg()[0], 2),
        "peers": {peer.name: peer.about for peer in chosen},
        "versions": versions(args),
        "skipped": results.skipped,
        "figures": results.figures(),
        "ratios": rounded(found),
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        whole = {"benchmark": "peers", "settings": settings, "machine": machine(), **figures, "blocks": results.raw()}
        (args.out / "peers.json").write_text(to_json(whole) + "\n")
    print_last_line("peers", settings, **figures)
    return 0


def _start(peer: Peer, up: list[Up], results: Results) -> None:
    _say(f"starting {peer.name}")
    running = Running()
    try:
        peer.start(running)
    except BaseException as error:
        running.close()
        if not isinstance(error, Exception):
            raise
        results.skipped[peer.name] = f"did not start: {error}"  # the others can still be measured
    else:
        up.append(Up(peer, running))


def _measure(each: Up, workload: str, scale: Scale, up: list[Up], results: Results, *, counts: bool) -> None:
    method, options = CALLS[workload]
    before, began_s = each.running.cpu_s(), time.perf_counter()
    delays: list[float] = []
    made, spent_s = 0, 0.0
    try:
        if method == "paced":
            delays = each.running.ask(method, scale, *options)
        else:
            # A fast peer streams it several times, or its block would be over before the machine's noise is.
            while spent_s < scale.run_s / 2:
                more, more_s = each.running.ask(method, scale, *options)
                made, spent_s = made + more, spent_s + more_s
    except Exception as error:  # noqa: BLE001 - the same
        each.running.close()
        up.remove(each)
        results.skipped[each.peer.name] = f"failed in {workload}: {error}"
        return
    if not counts:
        return
    wall_s = time.perf_counter() - began_s
    cpu_s = {role: used - before[role] for role, used in each.running.cpu_s().items()}
    if method == "paced":
        delays_ms = sorted(1000 * delay for delay in delays)
        block = Block(statistics.median(delays_ms), delays_ms[int(0.99 * len(delays_ms))], wall_s, len(delays_ms), cpu_s)
    else:
        block = Block(made / spent_s, 0.0, wall_s, made, cpu_s)
    results.add(workload, each.peer.name, block)


def _say(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
