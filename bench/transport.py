"""What the controller costs beside C `zmq.proxy`: round trips and relayed tokens. No model, no GPU.

    python -m bench transport [--quick] [--check]

Both networks are up at once and measured in turn, block by block, so that the machine's noise meets both alike. `ratios`
in the last line: rtt_* are the controller's median over the proxy's (lower is better), relay_* its tokens/s over the
proxy's (higher is better): `token` with one token a message, `step` with one token of every stream a message.
"""

from __future__ import annotations

import argparse
from typing import Any

from . import baseline, lean
from .lean_network import Arm, relay, round_trips
from .result import Spread, add_out, print_last_line, rounded, table

ARMS = {"proxy": Arm(lean.proxy, registers=False), "controller": Arm(lean.controller, registers=True)}


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("transport", help="controller against C zmq.proxy: round trips and relayed tokens")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    parser.add_argument("--check", action="store_true", help="compare with bench/baseline.json: exit code 1 where a ratio is worse")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    blocks, repeats = (5, 3) if args.quick else (25, 7)
    settings = {"trips_per_arm": blocks * 200, "repeats": repeats, "streams": 256, "tokens": 512, "token_bytes": 20}
    ratios: dict[str, float] = {}
    rows: list[tuple[str, str, str, str, str]] = []
    for transport in ("tcp", "ipc"):
        figures = round_trips(ARMS, transport, blocks)
        ratios[f"rtt_{transport}_vs_proxy"] = _compare(rows, f"round trip {transport}, us", figures, 1e6)
    for name, step in (("token", False), ("step", True)):
        figures, cpu = relay(ARMS, step, repeats, settings["streams"], settings["tokens"])
        ratios[f"relay_{name}_vs_proxy"] = _compare(rows, f"relay, one {name} a message, tokens/s", figures, 1)
        rows.append((f"  CPU s per 1M tokens, broker, {name}", f"{cpu['proxy']:.2f}", "", f"{cpu['controller']:.2f}", ""))
    print(table(("", "proxy", "min..max", "controller", "min..max"), rows))
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    kept = not args.check or baseline.check("transport", ratios)
    print_last_line("transport", settings, args.out, ratios=rounded(ratios))
    return 0 if kept else 1


def _compare(rows: list[tuple[str, str, str, str, str]], title: str, figures: dict[str, list[float]], scale: float) -> float:
    proxy, controller = (Spread.of([value * scale for value in figures[arm]]) for arm in ARMS)
    rows.append((title, *proxy.cells(), *controller.cells()))
    return controller.median / proxy.median
