"""What of a worker's payloads a controller carries to clients: pieces and ends of what the worker was given, and nothing else.

A payload reaches the client as it is, and there it would be the controller's word: a Welcome with other limits, a Pong that disowns
requests, a GoAway, or the Error that the client's key is not let in. So its tag is looked at, and its rid, and no more of it is read.
"""

from __future__ import annotations

import msgspec

from .errors import GoingAway, Unauthenticated
from .messages import DONE, FAILED, FIRST, Peek

CHUNK, CHUNKS = 36, 37
TAGS = {FIRST: frozenset({CHUNK}), DONE: frozenset({38, 39, 40, 41, 42}), FAILED: frozenset({46})}
"""Of what each kind may carry: a Chunk; Done, Reply, Embedding, Tokens and Details; an Error."""
BEGINNINGS = frozenset(bytes([0x90 | size, tag]) for size in range(2, 16) for tag in (CHUNK, CHUNKS))
"""How a payload of MORE begins in the shortest form of msgpack: an array of so many elements, and the tag."""


CONTROLLERS = frozenset({GoingAway.code, Unauthenticated.code})
"""Codes of Errors that are about a client's connection."""


class _Tag(msgspec.Struct, array_like=True, frozen=True, gc=False):
    tag: int


class _ErrorView(msgspec.Struct, array_like=True, frozen=True, gc=False):
    tag: int
    rid: int
    code: int


_tag = msgspec.msgpack.Decoder(_Tag).decode
_peek = msgspec.msgpack.Decoder(Peek).decode
_error = msgspec.msgpack.Decoder(_ErrorView).decode


def is_pieces(payload: bytes) -> bool:
    """Whether MORE may carry it: one Chunk or several, in whatever form of msgpack."""
    if payload[:2] in BEGINNINGS:
        return True
    try:
        return _tag(payload).tag in (CHUNK, CHUNKS)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False


def is_word_of(kind: int, rid: int, payload: bytes) -> bool:
    """Whether FIRST, DONE or FAILED may carry it for the request `rid`."""
    try:
        peek = _peek(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return peek.rid == rid and peek.tag in TAGS[kind]


def is_controllers(payload: bytes) -> bool:
    """Whether an Error is one that only a controller may say, or has no code that can be read."""
    try:
        return _error(payload).code in CONTROLLERS
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True
