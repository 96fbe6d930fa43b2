"""How a client's message begins, whatever comes behind: the rest may be megabytes, or not be msgpack at all."""

from __future__ import annotations

_ARRAYS = {0xDC: 3, 0xDD: 5}
"""Bytes of a long array's header, by its first one."""
_UNSIGNED = {0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
"""Bytes of an integer behind its first one."""


def tag_and_rid(payload: bytes) -> tuple[int, int]:
    """The first two elements of an array, each 0 where it is no integer that counts something."""
    if not payload:
        return 0, 0
    first = payload[0]
    place = 1 if 0x90 <= first <= 0x9F else _ARRAYS.get(first, len(payload))
    tag, place = _unsigned(payload, place)
    return tag, _unsigned(payload, place)[0] if tag else 0


def _unsigned(payload: bytes, place: int) -> tuple[int, int]:
    """The integer at `place`, and where the next element begins."""
    if place >= len(payload):
        return 0, place
    first = payload[place]
    if first < 0x80:
        return first, place + 1
    size = _UNSIGNED.get(first)
    if size is None or place + 1 + size > len(payload):
        return 0, len(payload)
    return int.from_bytes(payload[place + 1 : place + 1 + size]), place + 1 + size
