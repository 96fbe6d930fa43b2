"""Requests that wait for a slot: bounded, by priority, and fair among clients."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .flight import Flight
    from .registry import Need

_Line: TypeAlias = "OrderedDict[Flight, None]"
_Group: TypeAlias = "OrderedDict[int, _Line]"


class FairQueue:
    """Lower priority numbers first; within one, connections take turns, and so do the clients behind one connection.

    Ordered dicts all the way down: a request that is cancelled leaves at once, from anywhere, in O(1).
    """

    def __init__(self) -> None:
        self._levels: dict[int, OrderedDict[bytes, _Group]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        return f"FairQueue({self._size} waiting)"

    def push(self, flight: Flight, *, front: bool = False) -> None:
        """Last in its client's line, or with `front` the next of all of its priority."""
        level = self._levels.setdefault(flight.priority, OrderedDict())
        connection, client = flight.client.envelope[0], flight.client.number
        group = level.setdefault(connection, OrderedDict())
        line = group.setdefault(client, OrderedDict())
        line[flight] = None
        self._size += 1
        if front:
            line.move_to_end(flight, last=False)
            group.move_to_end(client, last=False)
            level.move_to_end(connection, last=False)

    def head(self) -> Flight | None:
        """Who is next; None when nobody waits."""
        if not self._size:
            return None
        level = self._levels[min(self._levels)]
        return next(iter(next(iter(next(iter(level.values())).values()))))

    def take(self, flight: Flight) -> None:
        """Its turn has come: it leaves, and its client and connection go to the end of the round."""
        level, group = self._leave(flight)
        connection, client = flight.client.envelope[0], flight.client.number
        if client in group:
            group.move_to_end(client)
        if connection in level:
            level.move_to_end(connection)

    def remove(self, flight: Flight) -> None:
        """It leaves without a turn (cancelled, too late). KeyError when it does not wait here."""
        self._leave(flight)

    def _leave(self, flight: Flight) -> tuple[OrderedDict[bytes, _Group], _Group]:
        level = self._levels[flight.priority]
        connection, client = flight.client.envelope[0], flight.client.number
        group = level[connection]
        line = group[client]
        del line[flight]
        self._size -= 1
        if not line:
            del group[client]
            if not group:
                del level[connection]
                if not level:
                    del self._levels[flight.priority]
        return level, group


class WaitingRoom:
    """One model's waiting requests, a FairQueue per need, bounded together by number and bytes."""

    def __init__(self, most_requests: int, most_bytes: int) -> None:
        self.most_requests, self.most_bytes = most_requests, most_bytes
        self.bytes = 0
        self._size = 0
        self._queues: dict[Need, FairQueue] = {}
        self._seconds_per_request = 0.1
        self._last_served_s: float | None = None

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[FairQueue]:
        return iter(self._queues.values())

    def __repr__(self) -> str:
        return f"WaitingRoom({self._size} waiting, {self.bytes} bytes)"

    def has_room(self, size: int) -> bool:
        """Whether one more request of `size` bytes may wait."""
        return self._size < self.most_requests and self.bytes + size <= self.most_bytes

    def push(self, flight: Flight, *, front: bool = False) -> None:
        """Let it wait. Requests that had a worker already (`front`) are let in beyond the bounds."""
        queue = self._queues.get(flight.need)
        if queue is None:
            queue = self._queues[flight.need] = FairQueue()
        queue.push(flight, front=front)
        flight.waiting = True
        self._size += 1
        self.bytes += len(flight.payload)

    def head(self, worker_can: frozenset[Need] | None = None) -> Flight | None:
        """Who is next among those that a worker can serve; None for `worker_can`: among all."""
        heads = (queue.head() for need, queue in self._queues.items() if worker_can is None or need in worker_can)
        return min((flight for flight in heads if flight is not None), key=_rank, default=None)

    def needs(self) -> list[Need]:
        """What the waiting requests ask for."""
        return list(self._queues)

    def take(self, flight: Flight, now: float) -> None:
        """Its turn has come."""
        self._queues[flight.need].take(flight)
        self._left(flight)
        if self._last_served_s is not None:
            self._seconds_per_request += 0.1 * (now - self._last_served_s - self._seconds_per_request)
        self._last_served_s = now if self._size else None

    def remove(self, flight: Flight) -> None:
        """It leaves without a turn."""
        self._queues[flight.need].remove(flight)
        self._left(flight)

    def retry_after_ms(self) -> int:
        """When a new request may find room: the time that the queue takes at the rate at which it was served lately."""
        return int(min(30_000.0, max(50.0, 1000 * self._seconds_per_request * max(1, self._size // 10))))

    def _left(self, flight: Flight) -> None:
        flight.waiting = False
        self._size -= 1
        self.bytes -= len(flight.payload)
        if not self._queues[flight.need]:
            del self._queues[flight.need]


def _rank(flight: Flight) -> tuple[int, float]:
    return (flight.priority, flight.arrived_s)
