"""Requests that wait for a slot: bounded, by priority, and fair among clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .errors import Overloaded
from .rate import ServiceRate

if TYPE_CHECKING:
    from .config import ControllerConfig
    from .flight import Client, Flight
    from .need import Need

_Line: TypeAlias = "OrderedDict[Flight, None]"
_Level: TypeAlias = "OrderedDict[bytes, _Group]"
Rank: TypeAlias = tuple[int, int]
"""Whose turn comes first, over all queues: the least priority number, then the earliest turn."""

LEAST_RETRY_MS, UNKNOWN_RETRY_MS, MOST_RETRY_MS = 50, 1000, 30_000
"""What Overloaded tells at least, when no request has been served yet, and at most."""


class _Group:
    """What waits of one connection or key. `turn`: the number of its last turn, or of when it came; 0 for one that goes first."""

    __slots__ = ("lines", "turn")

    def __init__(self, turn: int) -> None:
        self.lines: OrderedDict[int, _Line] = OrderedDict()
        self.turn = turn


class FairQueue:
    """Lower priority numbers first; within one, connections (or keys, where clients have them) take turns, and so do the
    clients behind each.

    Ordered dicts all the way down: a request that is cancelled leaves at once, from anywhere, in O(1). `turns` numbers the turns,
    and is shared by all queues whose requests go to the same workers, so that their heads can be compared.
    """

    def __init__(self, turns: Iterator[int]) -> None:
        self._levels: dict[int, _Level] = {}
        self._turns = turns
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"FairQueue({self._size} waiting)"

    @property
    def groups(self) -> int:
        """How many take turns."""
        return sum(map(len, self._levels.values()))

    def push(self, flight: Flight, *, front: bool = False) -> None:
        """Last in its client's line, or with `front` the next of all of its priority."""
        level = self._levels.setdefault(flight.priority, OrderedDict())
        who, client = flight.client.group, flight.client.number
        group = level.get(who)
        if group is None:
            group = level[who] = _Group(next(self._turns))
        line = group.lines.setdefault(client, OrderedDict())
        line[flight] = None
        self._size += 1
        if front:
            line.move_to_end(flight, last=False)
            group.lines.move_to_end(client, last=False)
            level.move_to_end(who, last=False)
            group.turn = 0

    def head(self) -> Flight | None:
        """Who is next; None when nobody waits."""
        if not self._size:
            return None
        group = next(iter(self._levels[min(self._levels)].values()))
        return next(iter(next(iter(group.lines.values()))))

    def rank(self) -> Rank:
        """The head's place among the heads of other queues."""
        priority = min(self._levels)
        return priority, next(iter(self._levels[priority].values())).turn

    def take(self, flight: Flight) -> None:
        """Its turn has come: it leaves, and its client and group go to the end of the round."""
        level, group = self._leave(flight)
        who, client = flight.client.group, flight.client.number
        if client in group.lines:
            group.lines.move_to_end(client)
        if who in level:
            level.move_to_end(who)
            group.turn = next(self._turns)

    def remove(self, flight: Flight) -> None:
        """It leaves without a turn (cancelled, too late). KeyError when it does not wait here."""
        self._leave(flight)

    def _leave(self, flight: Flight) -> tuple[_Level, _Group]:
        level = self._levels[flight.priority]
        who, client = flight.client.group, flight.client.number
        group = level[who]
        line = group.lines[client]
        del line[flight]
        self._size -= 1
        if not line:
            del group.lines[client]
            if not group.lines:
                del level[who]
                if not level:
                    del self._levels[flight.priority]
        return level, group


@dataclass
class Crowd:
    """`size`: how many requests wait in all rooms that share it, so that who has room to give need not ask each."""

    size: int = 0


class WaitingRoom:
    """One model's waiting requests, a FairQueue per need, bounded together by number and bytes, and so is what one client has waiting.

    `rate` is told how long requests of the model held a slot. `queues`: none of them is empty.
    """

    def __init__(self, config: ControllerConfig, turns: Iterator[int], crowd: Crowd | None = None) -> None:
        self.config = config
        self._crowd = crowd or Crowd()
        self.bytes = 0
        self.rate = ServiceRate()
        self._turns = turns
        self._size = 0
        self.queues: dict[Need, FairQueue] = {}

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"WaitingRoom({self._size} waiting, {self.bytes} bytes)"

    @property
    def suspects(self) -> int:
        """How many of them have lost a worker."""
        return sum(len(queue) for need, queue in self.queues.items() if need.trial)

    def check(self, client: Client, size: int, model: str, running: int) -> None:
        """Whether one more request of `size` bytes may wait: raises Overloaded, which names the bound that says no.

        `running`: requests of the model that hold a slot now.
        """
        config, party = self.config, client.party
        bounds = (
            ("client_requests", "this client's requests", party.waiting, 1, config.client_requests),
            ("client_bytes", "bytes of this client's requests", party.waiting_bytes, size, config.client_bytes),
            ("queue_requests", f"requests for {model}", self._size, 1, config.queue_requests),
            ("queue_bytes", f"bytes of requests for {model}", self.bytes, size, config.queue_bytes),
        )
        for name, what, waiting, more, limit in bounds:
            if waiting + more > limit:
                raise Overloaded(
                    f"{waiting} {what} wait already, {more} more would be over the limit of {limit} ({name})",
                    retry_after_ms=self.retry_after_ms(running, client if name.startswith("client") else None),
                    data={"model": model, "bound": name, "limit": limit, "waiting": waiting},
                )

    def push(self, flight: Flight, *, front: bool = False) -> None:
        """Let it wait. Requests that had a worker already (`front`) are let in beyond the bounds."""
        queue = self.queues.get(flight.need)
        if queue is None:
            queue = self.queues[flight.need] = FairQueue(self._turns)
        queue.push(flight, front=front)
        flight.waiting = True
        self._size += 1
        self._crowd.size += 1
        self.bytes += len(flight.payload)
        party = flight.client.party
        party.waiting += 1
        party.waiting_bytes += len(flight.payload)

    def head(self, needs: frozenset[Need] | None = None) -> Flight | None:
        """Who is next among those that ask for one of these; None for `needs`: among all."""
        queues = [self.queues[need] for need in (self.queues if needs is None else needs) if need in self.queues]
        return min(queues, key=FairQueue.rank).head() if queues else None

    def needs(self) -> list[Need]:
        """What the waiting requests ask for."""
        return list(self.queues)

    def take(self, flight: Flight) -> None:
        """Its turn has come."""
        self.queues[flight.need].take(flight)
        self._left(flight)

    def remove(self, flight: Flight) -> None:
        """It leaves without a turn."""
        self.queues[flight.need].remove(flight)
        self._left(flight)

    def retry_after_ms(self, running: int, client: Client | None = None) -> int:
        """When to try again: half of the line will have been served by then, at the observed rate, so there is room and nobody idles.

        The line is the whole queue's, or a client's own, which gets its share of the turns only.
        """
        per_second = self.rate.per_second(running)
        if per_second is None:
            return UNKNOWN_RETRY_MS
        line = self._size
        if client is not None:
            line = min(self._size, client.party.waiting * sum(queue.groups for queue in self.queues.values()))
        return int(min(MOST_RETRY_MS, max(LEAST_RETRY_MS, 1000 * (line / 2) / per_second)))

    def _left(self, flight: Flight) -> None:
        flight.waiting = False
        self._size -= 1
        self._crowd.size -= 1
        self.bytes -= len(flight.payload)
        party = flight.client.party
        party.waiting -= 1
        party.waiting_bytes -= len(flight.payload)
        if not self.queues[flight.need]:
            del self.queues[flight.need]
