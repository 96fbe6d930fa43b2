"""Forms that an answer cannot be held to, whichever engine makes it, and the one sentence that a caller is told."""

from __future__ import annotations

import contextlib
import math
import re
from decimal import Decimal

from zmqserve.errors import InvalidParameter
from zmqserve.params import Guided

_MOST_SAID = 240
_NOT_OURS = re.compile(
    r"^((Grammar error|Invalid grammar specification): )?((at )?\d+\(\d+\): )?"
    r"|<non-verbose/>.*|failed to compile JSON schema: |\n *\d+ \|.*|\n *\^"
)

MOST_REMAINDERS = 100_000
"""Of all ``multipleOf`` in a schema together, powers of ten aside: so many are compiled in some tenths of a second."""
_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*([0-9][0-9.eE+-]*)')
_ASCII_ESCAPE = re.compile(r"\\u00([0-7][0-9a-fA-F])")


def kind_of(guided: Guided) -> str:
    """The field of it that is given: ``json``, ``regex``, ``choice`` or ``grammar``."""
    return next(name for name in guided.__struct_fields__ if getattr(guided, name) is not None)


def cannot_be_followed(name: str, why: str) -> InvalidParameter:
    """`name` is the parameter's, as ``guided.json``; `why` is a library's message."""
    return InvalidParameter(f"{name} cannot be followed: {shortened(why)}", data={"parameter": name})


def shortened(why: str) -> str:
    """A library's message in one line: its own last word on what is wrong, if it has one, or the beginning and the end.

    Without places in the text that it was given, which is not the request's, and the lines there.
    """
    lines = [" ".join(line.split()) for line in _NOT_OURS.sub("", why).splitlines()]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), " ".join(filter(None, lines)))
    return said if len(said) <= _MOST_SAID else f"{said[: _MOST_SAID // 3]} ... {said[-_MOST_SAID // 3 * 2 :]}"


def check_multiples(name: str, text: str) -> None:
    """Refuse JSON schemas in `text` that would take minutes: what follows ``multipleOf`` has a state for each remainder of all of them.

    No limit of the engines' library ends that.
    """
    states = 1
    for number in _MULTIPLE.findall(_ASCII_ESCAPE.sub(lambda escape: chr(int(escape[1], 16)), text)):
        with contextlib.suppress(ArithmeticError):  # no number: the library says so
            whole = Decimal(number).normalize()
            digits = whole.scaleb(-int(whole.as_tuple().exponent))
            states = math.lcm(states, int(digits) or 1) if digits <= MOST_REMAINDERS else MOST_REMAINDERS + 1
        if states > MOST_REMAINDERS:
            why = f"its multipleOf {number[:40]} would need a state for each remainder, more than {MOST_REMAINDERS} with the others in it"
            raise cannot_be_followed(name, why)
