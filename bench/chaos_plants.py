"""Bugs to plant into a process of the harness, to see that the suite finds them. The product's code knows nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import zmq

from zmqserve import port as ports
from zmqserve.backends.echo import EchoWorker
from zmqserve.registry import Registry

EVERY_MESSAGE, EVERY_REQUEST = 97, 23
"""One in so many goes wrong."""
_MORE = int(zmq.SNDMORE)
_CHUNK_TAGS = frozenset({36, 37})
"""Chunk and Chunks, as they stand in the second byte of such a message."""


def plant(name: str) -> None:
    """Break this process in the named way; "none" leaves it whole."""
    PLANTS[name]()


def _messages(copies: int) -> None:
    """The controller sends one of EVERY_MESSAGE messages of chunks so many times."""
    whole = ports.Port.__init__
    turns = count(1)

    def broken(port: ports.Port, *args: Any, **settings: Any) -> None:
        whole(port, *args, **settings)
        send, frames = port.send_frame, list[bytes]()

        def send_wrong(frame: bytes, flags: int = 0) -> None:
            frames.append(frame)
            if flags & _MORE:
                return
            message = frames.copy()
            frames.clear()
            hit = len(frame) > 1 and frame[1] in _CHUNK_TAGS and next(turns) % EVERY_MESSAGE == 0
            for _ in range(copies if hit else 1):
                for part in message[:-1]:
                    send(part, int(zmq.NOBLOCK) | _MORE)
                send(message[-1], flags)

        port.send_frame = send_wrong

    ports.Port.__init__ = broken  # type: ignore[method-assign, assignment]


def _skip() -> None:
    """An echo worker leaves out a token of one request in EVERY_REQUEST: seq has no gap, so only who knows the answer sees it."""
    whole: Callable[..., Iterator[Any]] = EchoWorker._steps
    turns = count(1)

    def broken(worker: Any, job: Any) -> Iterator[Any]:
        skips = next(turns) % EVERY_REQUEST == 0
        for place, deltas in enumerate(whole(worker, job)):
            if not (skips and place == 2):
                yield deltas

    EchoWorker._steps = broken


def _leak() -> None:
    """The controller forgets to give one slot in EVERY_REQUEST back."""
    whole = Registry.give_back
    turns = count(1)

    def broken(registry: Registry, worker: Any, model: str) -> None:
        if next(turns) % EVERY_REQUEST:
            whole(registry, worker, model)

    Registry.give_back = broken  # type: ignore[method-assign, assignment]


PLANTS: dict[str, Callable[[], None]] = {
    "none": lambda: None,
    "drop": lambda: _messages(0),
    "duplicate": lambda: _messages(2),
    "skip": _skip,
    "leak": _leak,
}
"""`drop` and `duplicate` a message of chunks, `skip` a token before it is numbered, `leak` a slot."""
