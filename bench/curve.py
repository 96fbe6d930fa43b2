"""What CURVE costs: round trips and relayed tokens, with encryption and authentication on both hops and without.

    python -m bench curve [--quick]

Both networks are up at once and measured in turn, block by block; each is a controller, a lean worker and a lean client, as in
`transport`. `ratios` in the last line: rtt_* is the median with CURVE over that without (lower is better), relay_* the tokens/s with it
over those without (higher is better): `token` with one token a message, `step` with one token of every stream a message. libzmq seals
each message by itself, in its own threads, so what is paid goes by messages more than by bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from . import lean
from .lean_network import Arm, relay, round_trips
from .result import Spread, add_out, print_last_line, rounded, table

NAMES = ("plain", "curve")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("curve", help="what CURVE costs: round trips and relayed tokens with and without")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    blocks, repeats = (5, 3) if args.quick else (25, 7)
    settings = {"trips_per_arm": blocks * 200, "repeats": repeats, "streams": 256, "tokens": 512, "token_bytes": 20}
    ratios: dict[str, float] = {}
    cpu_s: dict[str, dict[str, float]] = {}
    rows: list[tuple[str, str, str, str, str]] = []
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        keys = str(Path(folder, "keys"))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            lean.make_keys(keys)
        arms = {"plain": Arm(lean.controller, registers=True), "curve": Arm(lean.controller, registers=True, keys=keys)}
        for transport in ("tcp", "ipc"):
            trips = round_trips(arms, transport, blocks)
            ratios[f"rtt_{transport}_vs_plain"] = _compare(rows, f"round trip {transport}, us", trips, 1e6)
        for name, step in (("token", False), ("step", True)):
            rates, cpu = relay(arms, step, repeats, settings["streams"], settings["tokens"])
            ratios[f"relay_{name}_vs_plain"] = _compare(rows, f"relay, one {name} a message, tokens/s", rates, 1)
            rows.append((f"  CPU s per 1M tokens, broker, {name}", f"{cpu['plain']:.2f}", "", f"{cpu['curve']:.2f}", ""))
            cpu_s[name] = rounded(cpu)
    print(table(("", "plain", "min..max", "curve", "min..max"), rows))
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    print_last_line("curve", settings, args.out, ratios=rounded(ratios), broker_cpu_s_per_1m_tokens=cpu_s)
    return 0


def _compare(rows: list[tuple[str, str, str, str, str]], title: str, figures: dict[str, list[float]], scale: float) -> float:
    plain, curve = (Spread.of([value * scale for value in figures[name]]) for name in NAMES)
    rows.append((title, *plain.cells(), *curve.cells()))
    return curve.median / plain.median
