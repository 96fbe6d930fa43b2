"""What is fuzzed: something that takes bytes of a stranger, and must end with an answer or an error that it promises."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Protocol, TypeAlias

VECTORS = Path(__file__).parents[2] / "tests" / "vectors" / "v1.json"
"""The golden messages: one of each kind at least, with and without its defaults."""


Input: TypeAlias = tuple[Any, ...]
"""What is fed at once: bytes, and for a target with peers also whose they are. Its `repr` repeats it."""


class Target(Protocol):
    """One target in one of its lives: made anew for each round, from a `random` that decides all that happens in it."""

    def draw(self) -> Input:
        """The next input."""

    def feed(self, given: Input) -> None:
        """Take one. Raises only where there is a bug."""

    def check(self) -> None:
        """Raises AssertionError where something is wrong that no single input shows: a book that does not add up, an honest peer that
        was disturbed, something that grows without bound."""

    def finish(self) -> None:
        """The round is over: everybody who was hostile leaves, time passes, and nothing may be left over. Raises AssertionError."""


class NewTarget(Protocol):
    """How a target is made."""

    def __call__(self, random: Random) -> Target: ...


@cache
def golden(*types: str) -> tuple[bytes, ...]:
    """The golden messages of these types (all without one), each once."""
    entries = json.loads(VECTORS.read_text())["messages"]
    texts = [entry.get(key, "") for entry in entries if not types or entry["type"] in types for key in ("hex", "short")]
    return tuple(bytes.fromhex(text) for text in dict.fromkeys(texts) if text)
