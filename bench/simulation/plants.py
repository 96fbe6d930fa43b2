"""Bugs to put into the real code, by replacing a function of it for a while: the simulation must find each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import msgspec

from zmqserve import failover
from zmqserve import messages as m
from zmqserve.backends import echo
from zmqserve.broker import Broker
from zmqserve.flights import Flights
from zmqserve.lane import Gather
from zmqserve.link import ControllerLink
from zmqserve.peer import Peer
from zmqserve.port import Port
from zmqserve.registry import Registry
from zmqserve.workload import Workload

EVERY = 400
"""A planted bug that acts at times does so once in so many times."""

Replacement = tuple[Any, str, Callable[..., Any]]


def _dropped_chunk() -> list[Replacement]:
    """The relay reads a MORE and forgets it."""
    original, reads = Port.__init__, count(1)

    def init(self: Port, *arguments: Any, **settings: Any) -> None:
        original(self, *arguments, **settings)
        if "total_bytes" in settings:
            return  # of clients
        recv = self.recv
        frames: list[Any] = []

        def forgetful(flags: int = 0, copy: bool = True) -> Any:
            if not frames:
                frames.extend(recv(flags, False) for _ in range(3))
                if len(frames[1]) > 1 and frames[1].bytes[1] == m.MORE and next(reads) % EVERY == 0:
                    frames.clear()
                    return forgetful(flags, copy)
            frame = frames.pop(0)
            return frame.bytes if copy else frame

        self.recv = forgetful

    return [(Port, "__init__", init)]


def _doubled_chunk() -> list[Replacement]:
    """A worker posts what it gathered twice."""
    original, flushes = Gather.flush, count(1)

    def flush(self: Gather) -> None:
        chunks, bound_bytes = self.chunks, self.bound_bytes
        original(self)
        if chunks and next(flushes) % EVERY == 0:
            self.chunks, self.bound_bytes = chunks, bound_bytes
            original(self)

    return [(Gather, "flush", flush)]


def _leaked_slot() -> list[Replacement]:
    """A controller does not take a slot back."""
    original, returns = Registry.give_back, count(1)

    def give_back(self: Registry, worker: Any, model: str) -> None:
        if next(returns) % EVERY:
            original(self, worker, model)

    return [(Registry, "give_back", give_back)]


def _lost_by_busy() -> list[Replacement]:
    """A request that its worker has no slot for is taken off it, and not put back into the queue."""

    def busy(self: Flights, flight: Any, now: float) -> None:  # noqa: ARG001 - as the original
        self._release(flight)

    return [(Flights, "busy", busy)]


def _no_epochs() -> list[Replacement]:
    """Nobody looks at the epoch, neither a controller nor a worker, and what ran for a registration that is over runs on."""
    heads = msgspec.msgpack.Decoder(m.WorkerHead)
    from_worker, post = Broker.from_worker, ControllerLink.post

    def blind_from_worker(
        self: Broker, now: float, identity: bytes, head: bytes, payload: bytes, certain: bool = True, **more: Any
    ) -> None:
        worker = self.registry.workers.get(identity)
        known = heads.decode(head)
        if worker is not None and known.kind != m.READY:
            head = m.encode(msgspec.structs.replace(known, epoch=worker.epoch))
        from_worker(self, now, identity, head, payload, certain, **more)

    def blind_post(self: ControllerLink, _epoch: int, head: bytes, payload: bytes) -> None:
        post(self, self.epoch, head, payload)

    def abort(self: Workload, link: ControllerLink) -> None:
        self.links[link] = None

    return [(Broker, "from_worker", blind_from_worker), (ControllerLink, "post", blind_post), (Workload, "abort", abort)]


def _forgotten_text() -> list[Replacement]:
    """A worker that continues an answer does not read what was made of it, and so forgets the text that the lost one held back."""

    def reread(*_arguments: Any) -> tuple[str, str | None]:
        return "", None

    return [(echo, "reread", reread)]


def _one_endpoint() -> list[Replacement]:
    """A client knows several controllers and turns to the first of them only."""

    class Stubborn(Peer):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, 0 if name == "_at" else value)

    return [(failover, "Peer", Stubborn)]


PLANTS: dict[str, Callable[[], list[Replacement]]] = {
    "dropped chunk": _dropped_chunk,
    "doubled chunk": _doubled_chunk,
    "leaked slot": _leaked_slot,
    "lost by busy": _lost_by_busy,
    "no epochs": _no_epochs,
    "forgotten text": _forgotten_text,
    "one endpoint": _one_endpoint,
}


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """The bug of this name is in the code meanwhile; None: no bug."""
    replaced: list[Replacement] = []
    try:
        for owner, attribute, replacement in PLANTS[name]() if name is not None else ():
            replaced.append((owner, attribute, getattr(owner, attribute)))
            setattr(owner, attribute, replacement)
        yield
    finally:
        for owner, attribute, original in reversed(replaced):
            setattr(owner, attribute, original)
