"""Inputs that are nearly right: known messages with bytes or values changed, and values made up."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

INTEGERS = (0, 1, -1, 2, 7, 33, 46, 65, 73, 97, 103, 127, 128, 255, 256, 65_535, 65_536, 100_000, 2**31 - 1, 2**31, 2**32 - 1, 2**32)
EXTREMES = (2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**31), -(2**53), -(2**63))
FLOATS = (0.0, -0.0, 0.1, 1.0, 1e308, -1e308, 5e-324, math.inf, -math.inf, math.nan)
SCALARS = (*INTEGERS, *EXTREMES, *FLOATS, None, True, False)
TEXTS = ("", "\0", "\x1b[2J\n", "m", "é" * 300, "a" * 256, "a" * 257, "🎈", "\ufeff", "../../x", "%s{0}$(x)", "a" * 5000)
BLOBS = (b"", b"\0", b"\xff\xff\xff\xff", b"\1\0\0\0", b"x" * 5, b"\0" * 1000)
CLAIMS = tuple(bytes.fromhex(text) for text in ("ddffffffff", "dfffffffff", "c6ffffffff", "dbffffffff", "c9ffffffff01", "dcffff", "deffff"))
"""Heads of msgpack values that promise far more than follows: 4 GiB, or 65,535 elements."""
BYTES = bytes.fromhex("00 7f 80 81 90 91 9f a0 a1 bf c0 c1 c2 c3 c4 c7 ca cb cc cf d0 d3 d4 d9 dc de e0 ff")
NESTINGS = (b"\x91", b"\x81\xa0", b"\x92\x01", b"\xdc\x00\x01")
DEEP_SHARE = 1 / 5000
"""Of the inputs: as many levels deep as DEEPEST. Such an input costs what a thousand others do."""
DEEPEST = 100_000
LONGEST = 200_000
"""Bytes: what grows beyond it by mutation on mutation is cut."""

_unpack = msgspec.msgpack.Decoder().decode
_pack = msgspec.msgpack.Encoder().encode


class Mutator:
    """Draws inputs from `seeds`, of which at least one must be there; equal ones from an equal `random`."""

    def __init__(self, seeds: Sequence[bytes], random: Random) -> None:
        self.random = random
        self._seeds = list(seeds)
        self._ways: list[Callable[[bytes], bytes]] = [
            *[self._change_value] * 6,
            self._flip_bit,
            self._set_byte,
            self._insert,
            self._cut_out,
            self._cut_off,
            self._double,
            self._join,
            self._claim,
        ]

    def __repr__(self) -> str:
        return f"Mutator({len(self._seeds)} seeds)"

    def draw(self) -> bytes:
        """The next input: a seed with one to four changes, or something made up."""
        random = self.random
        dice = random.random()
        if dice < DEEP_SHARE:
            return self._seed()[: random.randrange(8)] + random.choice(NESTINGS) * DEEPEST
        if dice < 0.05:
            return random.randbytes(random.randrange(40))
        if dice < 0.15:
            return self._packed(self.value(3))
        return self.change(self._seed())

    def change(self, data: bytes) -> bytes:
        """The same with one to four changes."""
        random = self.random
        for _ in range(random.choice((1, 1, 1, 2, 2, 4))):
            data = random.choice(self._ways)(data)
        return data[:LONGEST]

    def value(self, depth: int = 0) -> Any:
        """Any value that msgpack knows; lists and maps up to `depth` levels deep."""
        random = self.random
        dice = random.random() * (1.3 if depth else 1.0)
        if dice < 0.8:
            return random.choice(SCALARS)
        if dice < 0.9:
            return random.choice(TEXTS)
        if dice < 1.0:
            return random.choice(BLOBS)
        if dice < 1.1:
            return {f"k{number}": self.value(depth - 1) for number in range(random.randrange(4))}
        return [self.value(depth - 1) for _ in range(random.randrange(12))]

    def _seed(self) -> bytes:
        return self.random.choice(self._seeds)

    @staticmethod
    def _packed(value: Any) -> bytes:
        try:
            return _pack(value)
        except (OverflowError, RecursionError, UnicodeEncodeError):
            return b"\xc1"

    # --- by value: what is changed is still msgpack

    def _change_value(self, data: bytes) -> bytes:
        try:
            tree = _unpack(data)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return self._set_byte(data)
        return self._packed(self._changed(tree, 0))

    def _changed(self, node: Any, depth: int) -> Any:
        random = self.random
        if depth < 6 and isinstance(node, list | dict) and node and random.random() < 0.8:
            place = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
            what = random.randrange(8)
            if what == 0:
                del node[place]
            elif what == 1 and isinstance(node, list):
                node.insert(place, self.value(2))
            elif what == 2 and isinstance(node, list):
                node.extend(node[place:] * random.choice((1, 2, 50)))
            elif what == 3 and isinstance(node, dict):
                node[f"{place}{random.randrange(3)}"] = self.value(2)
            else:
                node[place] = self._changed(node[place], depth + 1)
            return node
        if isinstance(node, int) and random.random() < 0.3:
            return node + random.choice((-1, 1, 2**32, -(2**63)))
        if isinstance(node, str) and random.random() < 0.3:
            return node * random.choice((0, 2, 64))
        return self.value(2)

    # --- by byte: what is changed is perhaps nothing any more

    def _place(self, data: bytes) -> int:
        return self.random.randrange(len(data) + 1)

    def _flip_bit(self, data: bytes) -> bytes:
        if not data:
            return b"\1"
        place = self.random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ 1 << self.random.randrange(8)]) + data[place + 1 :]

    def _set_byte(self, data: bytes) -> bytes:
        place = self._place(data)
        return data[:place] + bytes([self.random.choice(BYTES)]) + data[place + 1 :]

    def _insert(self, data: bytes) -> bytes:
        place = self._place(data)
        return data[:place] + self.random.randbytes(self.random.randrange(1, 9)) + data[place:]

    def _cut_out(self, data: bytes) -> bytes:
        place = self._place(data)
        return data[:place] + data[place + self.random.randrange(1, 9) :]

    def _cut_off(self, data: bytes) -> bytes:
        return data[: self._place(data)]

    def _double(self, data: bytes) -> bytes:
        first, last = sorted((self._place(data), self._place(data)))
        return data[:last] + data[first:last] * self.random.choice((1, 2, 30)) + data[last:]

    def _join(self, data: bytes) -> bytes:
        other = self._seed()
        return data[: self._place(data)] + other[self._place(other) :]

    def _claim(self, data: bytes) -> bytes:
        place = self._place(data)
        return data[:place] + self.random.choice(CLAIMS) + data[place + self.random.randrange(6) :]
