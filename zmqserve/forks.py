"""Clients and other processes. Sockets, threads and locks of the parent are of no use in a forked child: each client begins anew there."""

from __future__ import annotations

import os
from typing import NoReturn, Protocol
from weakref import WeakSet


class Forked(Protocol):
    """What is told that it is in a child now, before anything else runs there."""

    def after_fork(self) -> object:
        """Make what is of the parent anew. What is returned is kept: to finalize it might wait for the parent's threads."""


class OneProcess:
    """What cannot be handed to another process: pickle, multiprocessing and copy say so."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a connection, which cannot be pickled or copied; make one in each process")


_watched: WeakSet[Forked] = WeakSet()
_inherited: list[object] = []


def watch(what: Forked) -> None:
    """Let it know of forks for as long as it lives."""
    _watched.add(what)


def _after_fork() -> None:
    _inherited.extend(what.after_fork() for what in list(_watched))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
