"""What of a worker's payloads a controller carries to clients: pieces and ends of what the worker was given, and nothing else.

A payload reaches the client as it is, and there it would be the controller's word: a Welcome with other limits, a Pong that disowns
requests, a GoAway, or the Error that the client's key is not let in. So its tag is looked at, and its rid, and no more of it is read.
"""

from __future__ import annotations

import msgspec

from .codec import tag_of
from .errors import GoingAway, Unauthenticated, WorkerLost
from .messages import DONE, FAILED, FIRST, MORE, Chunk, Chunks, Details, Done, Embedding, Error, Peek, Reply, Tokens

CARRIED = {FIRST: (Chunk,), MORE: (Chunk, Chunks), DONE: (Done, Reply, Embedding, Tokens, Details), FAILED: (Error,)}
TAGS = {
    kind: frozenset(tag for message in messages if isinstance(tag := message.__struct_config__.tag, int))
    for kind, messages in CARRIED.items()
}
"""Of what each kind may carry."""
BEGINNINGS = frozenset(bytes([0x90 | size, tag]) for size in range(2, 16) for tag in TAGS[MORE])
"""How a payload of MORE begins in the shortest form of msgpack: an array of so many elements, and the tag."""
CONTROLLERS = frozenset({GoingAway.code, Unauthenticated.code})
"""Codes of Errors that are about a client's connection."""


class _ErrorView(msgspec.Struct, array_like=True, frozen=True, gc=False):
    tag: int
    rid: int
    code: int


_peek = msgspec.msgpack.Decoder(Peek).decode
_error = msgspec.msgpack.Decoder(_ErrorView).decode
_whole = msgspec.msgpack.Decoder(Error).decode


def is_pieces(payload: bytes) -> bool:
    """Whether MORE may carry it: one Chunk or several, in whatever form of msgpack."""
    return payload[:2] in BEGINNINGS or tag_of(payload) in TAGS[MORE]


def is_word_of(kind: int, rid: int, payload: bytes) -> bool:
    """Whether FIRST, DONE or FAILED may carry it for the request `rid`."""
    try:
        peek = _peek(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return peek.rid == rid and peek.tag in TAGS[kind]


def attempts_below(payload: bytes) -> int:
    """How many workers a request has lost below, as a WorkerLost says that may be tried again; 0 for any other error."""
    try:
        error = _whole(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return 0
    attempts = error.data.get("attempts")
    return attempts if error.code == WorkerLost.code and error.retryable and isinstance(attempts, int) else 0


def is_controllers(payload: bytes) -> bool:
    """Whether an Error is one that only a controller may say, or has no code that can be read."""
    try:
        return _error(payload).code in CONTROLLERS
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return True
