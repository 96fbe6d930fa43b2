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
from .lean_network import Arm, Comparison
from .result import add_out, print_last_line, rounded, table


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("curve", help="what CURVE costs: round trips and relayed tokens with and without")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        keys = str(Path(folder, "keys"))
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            lean.make_keys(keys)
        arms = {"plain": Arm(lean.controller, registers=True), "curve": Arm(lean.controller, registers=True, keys=keys)}
        compared = Comparison(arms, quick=args.quick)
    print(table(("", "plain", "min..max", "curve", "min..max"), compared.rows))
    print(compared.summary)
    print_last_line("curve", compared.settings, args.out, ratios=rounded(compared.ratios), broker_cpu_s_per_1m_tokens=compared.cpu_s)
    return 0
