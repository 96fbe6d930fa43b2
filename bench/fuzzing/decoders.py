"""The decoders: what turns bytes of a peer into a message, a part of it or an array. The only errors are RequestErrors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import msgspec

from zmqserve import messages as m
from zmqserve.errors import RequestError
from zmqserve.results import array_of

from .mutator import Mutator
from .target import Input, NewTarget, Target, golden

FROM_CLIENT = ("Hello", "Generate", "Embed", "CountTokens", "ModelDetails", "ListModels", "Status", "Drain", "Cancel", "Ping")


class Decoding:
    """A target without state: `read` must return something or raise a RequestError."""

    def __init__(self, read: Callable[[bytes], Any], mutator: Mutator) -> None:
        self._read = read
        self._mutator = mutator

    def draw(self) -> Input:
        """As Target says."""
        return (self._mutator.draw(),)

    def feed(self, given: Input) -> None:
        """As Target says."""
        (data,) = given
        with suppress(RequestError):
            self._read(data)

    def check(self) -> None:
        """Nothing is kept."""

    def finish(self) -> None:
        """Nor is there anything to end."""


def _reader(kind: Any, *types: str) -> NewTarget:
    using = m.decoder(kind)

    def read(data: bytes) -> Any:
        message = m.read(using, data)
        m.encode(message)
        return message

    seeds = golden(*types)
    return lambda random: Decoding(read, Mutator(seeds, random))


def _ids(random: Random) -> Target:
    """Token ids."""
    return Decoding(m.unpack_ids, Mutator([m.pack_ids(range(20)), m.pack_ids([2**32 - 1]), b""], random))


def _vectors(random: Random) -> Target:
    """An Embedding and what the SDK makes of it: an array of three texts' vectors."""
    using = m.decoder(m.Embedding)

    def read(data: bytes) -> None:
        array_of(m.read(using, data), 3)

    usage, timings = m.Usage(1, 0), m.Timings("w")
    whole = m.Embedding(7, "float32", (3, 2), b"\0" * 24, usage, timings)
    odd = [msgspec.structs.replace(whole, shape=shape) for shape in ((3, 0), (0, 3), (-1, 2), (3, -2), (2**31, 2**31), (3, 2**62))]
    return Decoding(read, Mutator([m.encode(each) for each in (whole, *odd)], random))


DECODERS: dict[str, NewTarget] = {
    "from client": _reader(m.FromClient, *FROM_CLIENT),
    "request at a worker": _reader(m.Request, "Generate", "Embed", "CountTokens", "ModelDetails"),
    "to client": _reader(m.ToClient),
    "request header": _reader(m.RequestHeader, *FROM_CLIENT),
    "peek": _reader(m.Peek),
    "worker head": _reader(m.WorkerHead, "WorkerHead"),
    "controller head": _reader(m.ControllerHead, "ControllerHead"),
    "ready": _reader(m.Ready, "Ready"),
    "load": _reader(m.Load, "Load"),
    "worker welcome": _reader(m.WorkerWelcome, "WorkerWelcome"),
    "refused": _reader(m.Refused, "Refused"),
    "token ids": _ids,
    "vectors": _vectors,
}
