"""The clients that a controller knows: by envelope, and by the connection that they share with others. Pure."""

from __future__ import annotations

from .access import Account
from .flight import Client, Envelope


class Clients(dict[Envelope, Client]):
    """Clients with open flights, by envelope. Their numbers only rise."""

    def __init__(self) -> None:
        super().__init__()
        self._connections: dict[bytes, dict[int, Client]] = {}
        self._numbers = 0

    def of(self, envelope: Envelope, account: Account | None = None) -> Client:
        """The client with this envelope, known or new; a new one has this account."""
        client = self.get(envelope)
        if client is None:
            self._numbers += 1
            client = self[envelope] = Client(envelope, self._numbers, account)
            self._connections.setdefault(envelope[0], {})[client.number] = client
        return client

    def behind(self, connection: bytes) -> list[Client]:
        """All clients that are reached through one connection (several, when it is a proxy's)."""
        return list(self._connections.get(connection, {}).values())

    def forget(self, client: Client) -> None:
        """Let go of a client; harmless when that was done."""
        if client.timer is not None:
            client.timer.cancel()
            client.timer = None
        if self.get(client.envelope) is client:
            del self[client.envelope]
        neighbours = self._connections.get(client.envelope[0])
        if neighbours is not None:
            neighbours.pop(client.number, None)
            if not neighbours:
                del self._connections[client.envelope[0]]
