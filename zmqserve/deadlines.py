"""What ends because its time is up: requests, clients that fell silent, and cancels that a worker does not obey. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .endings import cancelled_message, error_message, too_late

if TYPE_CHECKING:
    from .flight import Client, Flight
    from .flights import Flights
    from .registry import Worker

LATE_S = 0.5
"""After its deadline a request's worker has so long to end it; then the client is told without it. A step of an engine takes less."""
CHILD_S = 0.5
"""A controller below waits as long for its workers to cancel as this one does for it: its own answer has so long beyond that."""


class Deadlines:
    """The timers of clients and flights.

    A worker that beats may still never end a request that it was told to end. Its client does not wait for that: it is `told`, while the
    flight keeps its slot and its rid until the worker lets go of it or is given up.
    """

    def __init__(self, flights: Flights, report: Callable[..., None]) -> None:
        self.flights = flights
        self._report = report

    def __repr__(self) -> str:
        return f"Deadlines({self.flights.agenda!r})"

    def watch(self, client: Client, now: float) -> None:
        """Arm the client's timer: its lease if it Pings, else the default deadline of its oldest request."""
        if client.timer is not None:
            client.timer.cancel()
        if client.lease is not None:
            # One that has been told of all its ends need not Ping, and its lease runs out: look again later.
            when_s = client.lease.ends_s if not client.lease.expired(now) else now + client.lease.ttl_s
        else:
            oldest = next(iter(client.flights.values()))
            when_s = max(now + 1.0, oldest.arrived_s + self.flights.config.default_deadline_s)
        client.timer = self.flights.agenda.at(when_s, lambda now: self._look_at(client, now))

    def too_late(self, flight: Flight, now: float) -> None:
        """Its deadline has passed."""
        self.flights.cancel(flight, now, "deadline")
        if flight.open:
            flight.timer = self.flights.agenda.at(now + LATE_S, lambda now: self._tell(flight, now))

    def expect_end(self, flight: Flight, worker: Worker, now: float) -> None:
        """The worker is being told to end it, and gets no new work when it has not in time."""
        patience_s = self.flights.config.cancel_timeout_s + CHILD_S * len(worker.controllers)
        flight.cancel_timer = self.flights.agenda.at(now + patience_s, lambda now: self._not_cancelled(flight, worker, now))

    def _look_at(self, client: Client, now: float) -> None:
        flights = self.flights
        client.timer = None
        if client.lease is not None:
            if client.lease.expired(now) and not all(flight.told for flight in client.flights.values()):
                flights.delivery.detach(client, now, "client silent")
                if not flights.clients.behind(client.envelope[0]):
                    flights.delivery.drop_outbox(client.envelope[0])
                return
        else:
            for flight in list(client.flights.values()):
                if flight.arrived_s + flights.config.default_deadline_s > now:
                    break
                if flight.deadline_s is None and flight.ending is None:
                    self.too_late(flight, now)
        if client.flights and not client.gone:
            self.watch(client, now)

    def _not_cancelled(self, flight: Flight, worker: Worker, now: float) -> None:
        flights = self.flights
        self._tell(flight, now)
        if worker.stalled_s is None:
            worker.stalled_s = now
            flights.counters["stalled"] += 1
            why = f"a cancelled request did not end in {flights.config.cancel_timeout_s} s"
            self._report("worker stalled", worker=worker.name, why=why)
            flights.registry.touch(worker)

    def _tell(self, flight: Flight, now: float) -> None:
        """Nothing that comes for it later reaches its client, as far as the controller can tell it apart."""
        if flight.told or flight.client.gone:
            return
        flight.told = True
        self.flights.counters["told before the worker let go"] += 1
        if flight.route is not None:
            flight.route.told += 1
            flight.route.identity = b""  # from here on it is asked for each message whether somebody waits for it
        if flight.ending == "deadline":
            late = too_late()
            self.flights.delivery.last(flight, error_message(flight.rid, late), now, "deadline", late.code, (0, 0))
        else:
            self.flights.delivery.last(flight, cancelled_message(flight.rid), now, "cancelled", 0, (0, 0))
