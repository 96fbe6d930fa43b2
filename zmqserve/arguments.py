"""Values on a command line."""

from __future__ import annotations

import argparse
import math


def filled(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def positive(text: str) -> int:
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def key_options(parser: argparse.ArgumentParser, peers: str) -> None:
    """What `peers` (clients or workers) prove themselves with."""
    parser.add_argument("--key", metavar="FILE", help="for CURVE: the own pair of keys, NAME.key_secret as `zmqserve keys new` makes it")
    parser.add_argument(
        "--controller-key",
        action="append",
        metavar="FILE",
        help=f"for CURVE: the controller's public key, its {peers}-port.key; one for all controllers, or one for each, in their order",
    )


def curve_options(parser: argparse.ArgumentParser) -> None:
    """Whom a controller lets in."""
    parser.add_argument(
        "--curve-dir",
        metavar="DIR",
        help="let in, by CURVE, only those whose keys lie in this folder; `zmqserve keys init DIR` makes it",
    )
    # None, not false: what the file says stays.
    parser.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="without --curve-dir: bind endpoints that other machines may reach all the same, and serve whoever does",
    )


def seconds(text: str) -> float:
    """A time from 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, got {text!r}")
    return number
