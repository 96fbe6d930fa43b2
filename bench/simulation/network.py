"""A simulated network: who can reach whom, and how long messages take.

Within one connection messages keep their order, as in TCP; between connections nothing is promised. A DEALER that connects again
is a new peer to the ROUTER; what was under way in either direction is lost, or arrives just before the end is noticed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .connection import Connection
from .sockets import DealerSocket, Host, RouterSocket

if TYPE_CHECKING:
    from random import Random

    from .world import World

SPIKE_S = 0.4
"""The longest delay of a message that is delayed for once."""


class Network:
    """All sockets and connections. `room`: messages that one direction of a connection holds. `delay_most_s`: of a message, in
    general; `spikes`: the share of messages that take up to SPIKE_S. `stopped`: pairs of hosts with no way between them."""

    def __init__(self, world: World, *, room: int, delay_most_s: float, spikes: float) -> None:
        self.world = world
        self.random: Random = world.random_for("network")
        self.room = room
        self.delay_most_s = delay_most_s
        self.spikes = spikes
        self.routers: dict[str, RouterSocket] = {}
        self.connections: dict[bytes, Connection] = {}
        self.stopped: set[tuple[str, str]] = set()
        self._identities = 0
        self._draw = self.random.random

    def __repr__(self) -> str:
        return f"Network({len(self.connections)} connections, {len(self.stopped)} stopped)"

    def delay_s(self) -> float:
        draw = self._draw()
        if draw < self.spikes:
            return SPIKE_S * self._draw()
        return self.delay_most_s * draw

    def new_identity(self) -> bytes:
        self._identities += 1
        return b"\0" + self._identities.to_bytes(4, "big")

    def router(self, host: Host, endpoint: str) -> RouterSocket:
        router = self.routers[endpoint] = RouterSocket(self, host, endpoint)
        return router

    def connect(self, dealer: DealerSocket) -> Connection | None:
        """A connection, if somebody listens there and can be reached."""
        router = self.routers.get(dealer.endpoint)
        if router is None or router.host.paused or (dealer.host.name, router.host.name) in self.stopped:
            return None
        connection = Connection(self, dealer, router)
        self.connections[connection.identity] = connection
        router.accept(connection)
        return connection

    def links(self) -> list[tuple[str, str]]:
        """Pairs of hosts, dealer's and router's, with a connection between them."""
        return sorted({(c.dealer.host.name, c.router.host.name) for c in self.connections.values()})

    def between(self, link: tuple[str, str]) -> list[Connection]:
        return [c for c in self.connections.values() if (c.dealer.host.name, c.router.host.name) == link]

    def stop_link(self, link: tuple[str, str]) -> None:
        self.stopped.add(link)
        for connection in self.between(link):
            connection.stop()

    def restore_link(self, link: tuple[str, str]) -> None:
        self.stopped.discard(link)
        for connection in self.between(link):
            connection.restore()

    def break_link(self, link: tuple[str, str]) -> None:
        for connection in self.between(link):
            connection.break_()

    def starve(self, name: str) -> None:
        """A host that has been stopped for so long that its peers' heartbeats break the connections."""
        for connection in list(self.connections.values()):
            if name in (connection.dealer.host.name, connection.router.host.name):
                connection.break_()
