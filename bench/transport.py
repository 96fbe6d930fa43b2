"""What the controller costs beside C `zmq.proxy`: round trips and relayed tokens. No model, no GPU.

    python -m bench transport [--quick] [--check] [--busy-poll US]

Both networks are up at once and measured in turn, block by block, so that the machine's noise meets both alike. `ratios`
in the last line: rtt_* are the controller's median over the proxy's (lower is better), relay_* its tokens/s over the
proxy's (higher is better): `token` with one token a message, `step` with one token of every stream a message.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from . import baseline, lean
from .lean_network import Arm, Comparison
from .result import add_out, print_last_line, rounded, table


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("transport", help="controller against C zmq.proxy: round trips and relayed tokens")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    parser.add_argument("--check", action="store_true", help="compare with bench/baseline.json: exit code 1 where a ratio is worse")
    parser.add_argument("--busy-poll", type=float, default=0.0, metavar="US", help="the controller's busy_poll_us (default 0)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    broker = functools.partial(lean.controller, busy_poll_us=args.busy_poll)
    arms = {"proxy": Arm(lean.proxy, registers=False), "controller": Arm(broker, registers=True)}
    compared = Comparison(arms, quick=args.quick)
    print(table(("", "proxy", "min..max", "controller", "min..max"), compared.rows))
    print(compared.summary)
    kept = not args.check or baseline.check("transport", compared.ratios)
    settings = compared.settings | {"busy_poll_us": args.busy_poll}
    print_last_line("transport", settings, args.out, ratios=rounded(compared.ratios), broker_cpu_s_per_1m_tokens=compared.cpu_s)
    return 0 if kept else 1
