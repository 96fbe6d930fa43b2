"""What goes to clients, and what becomes of those that are gone or do not read. Pure: the way to send is given."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable

from .clients import Clients
from .config import ControllerConfig
from .endings import error_message, slow_consumer
from .errors import ZmqserveError
from .flight import Client, Envelope, Flight
from .shedding import dropped_ends

SENT, GONE, FULL = range(3)
"""What a send says: it is on its way; nobody is there any more; the peer does not read and its outbox is at its limit."""


class Delivery:
    """Sends to clients: to those behind this controller's connections, and to a parent's by way of it.

    `cancel` stops a flight, for the reason given. `drop_outbox` takes what waits for a connection, and drops it.
    """

    def __init__(
        self,
        config: ControllerConfig,
        counters: Counter[str],
        *,
        send_client: Callable[[Envelope, bytes], int],
        cancel: Callable[[Flight, float, str], None],
    ) -> None:
        self.clients = Clients()
        self.drop_outbox: Callable[[bytes], list[tuple[bytes, ...]]] = lambda _: []
        self._config = config
        self._counters = counters
        self._send_client = send_client
        self._cancel = cancel
        self._detached: deque[tuple[Client, str]] = deque()
        self._detaching = False

    def __repr__(self) -> str:
        return f"Delivery({len(self.clients)} clients)"

    def chunks(self, client: Client, payload: bytes, now: float) -> None:
        """Send chunks to the client, unless it is gone; learn here that it is."""
        if client.gone:
            return
        if client.above is not None:
            client.above.more(payload, now)
            return
        status = self.send(client, payload)
        if status != SENT:
            self.connection_failed(client.envelope[0], status, now)

    def send(self, client: Client, payload: bytes) -> int:
        """Send to a client of this controller's own, and no more: `connection_failed` is to get what this returns, unless it is SENT."""
        return self._send_client(client.envelope, payload)

    def first(self, flight: Flight, payload: bytes, now: float) -> None:
        """Send its first chunk."""
        if flight.client.above is None:
            self.chunks(flight.client, payload, now)
        elif not flight.client.gone:
            flight.client.above.first(flight.rid, payload, now)

    def last(self, flight: Flight, payload: bytes, now: float, outcome: str, code: int, tokens: tuple[int, int]) -> None:
        """Send what ends it."""
        if flight.client.above is None:
            self.chunks(flight.client, payload, now)
        elif not flight.client.gone:
            flight.client.above.end(flight.rid, payload, now, outcome, code, tokens)

    def connection_failed(self, connection: bytes, status: int, now: float) -> None:
        """A send to this connection was GONE or FULL: let go of every client behind it, and of what waits for one that is FULL."""
        if status != FULL:
            for client in self.clients.behind(connection):
                self.detach(client, now, "client gone")
            return
        error = slow_consumer(self._config.outbox_bytes, self._config.outbox_total_bytes)
        for envelope, rid in dropped_ends(self.drop_outbox(connection)):
            self._send_client(envelope, error_message(rid, error))
        for client in self.clients.behind(connection):
            self.detach(client, now, "slow consumer", error)

    def detach(self, client: Client, now: float, why: str, error: ZmqserveError | None = None) -> None:
        """Let go of a client: its requests are cancelled, with `error` as their end if it is still there to read it.

        A cancel may find that a worker is gone, and that worker's end that another client is: a loop, so that many are no deep recursion.
        """
        if client.gone:
            return
        client.gone = True
        self._counters[f"clients: {why}"] += 1
        self.clients.forget(client)
        for flight in client.flights.values():
            if error is not None and not flight.told:
                self._send_client(client.envelope, error_message(flight.rid, error))
        self._detached.append((client, why))
        if self._detaching:
            return
        self._detaching = True
        while self._detached:
            client, why = self._detached.popleft()
            for flight in list(client.flights.values()):
                self._cancel(flight, now, why)
        self._detaching = False
