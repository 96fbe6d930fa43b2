"""Simulated ROUTER and DEALER sockets, as far as zmqserve uses them."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, TypeVar

import zmq

from .connection import Connection, Frames, Pipe

if TYPE_CHECKING:
    from zmqserve.link import ControllerLink

    from .network import Network

K = TypeVar("K")

MORE_FLAG = int(zmq.SNDMORE)
RECONNECT_FIRST_S, RECONNECT_MOST_S = 0.1, 1.0
"""As zmqserve.sockets sets them."""


class Host(Protocol):
    """Whose socket it is."""

    name: str
    paused: bool

    def stir(self) -> None:
        """Something has arrived, there is room again, or a connection has come or gone."""


class Frame:
    """What `recv(copy=False)` returns."""

    __slots__ = ("bytes", "more")

    def __init__(self, data: bytes, more: bool) -> None:
        self.bytes = data
        self.more = more

    def __len__(self) -> int:
        return len(self.bytes)


class RouterSocket:
    """What port.Port needs of a ROUTER with ROUTER_MANDATORY: frames one by one, EHOSTUNREACH, EAGAIN, RCVMORE, EVENTS.

    `broke` counts connections whose end was noticed, as a monitor does.
    """

    def __init__(self, network: Network, host: Host, endpoint: str) -> None:
        self.host = host
        self.endpoint = endpoint
        self.broke = 0
        self.waiting = 0
        self._network = network
        self._peers: dict[bytes, Connection] = {}
        self._inbox: deque[tuple[Pipe, Frames]] = deque()
        self._reading: Frames = ()
        self._place = 0
        self._out: list[bytes] = []
        self._to: Connection | None = None

    # --- pyzmq's side

    def recv(self, flags: int = 0, copy: bool = True) -> bytes | Frame:  # noqa: ARG002 - never blocks
        place, frames = self._place, self._reading
        if place == len(frames):
            if not self._inbox:
                raise zmq.Again
            pipe, frames = self._inbox.popleft()
            pipe.read()
            self._reading, place = frames, 0
            self.waiting -= 1
        self._place = place + 1
        return frames[place] if copy else Frame(frames[place], place + 1 < len(frames))

    def send(self, data: bytes, flags: int = 0) -> None:
        if self._to is None:
            peer = self._peers.get(data)
            if peer is None:
                raise zmq.ZMQError(errno.EHOSTUNREACH)
            if peer.down.full:
                raise zmq.Again
            self._to = peer
            return
        self._out.append(data)
        if not flags & MORE_FLAG:
            peer, self._to = self._to, None
            frames, self._out = tuple(self._out), []
            if not peer.broken:
                peer.down.send(frames)

    def getsockopt(self, option: int) -> int:
        """RCVMORE, or EVENTS as far as something is to be read."""
        more = self._place < len(self._reading)
        if option == zmq.EVENTS:
            return int(zmq.POLLIN) if more or self._inbox else 0
        return int(more)

    # --- the network's side

    def accept(self, connection: Connection) -> None:
        self._peers[connection.identity] = connection

    def deliver(self, pipe: Pipe, frames: Frames) -> None:
        if self._network.routers.get(self.endpoint) is not self:
            return
        self._inbox.append((pipe, frames))
        self.waiting += 1
        self.host.stir()

    def disconnected(self, connection: Connection) -> None:
        if self._peers.pop(connection.identity, None) is not None:
            self.broke += 1
            if self._network.routers.get(self.endpoint) is self:
                self.host.stir()

    def close(self, *, graceful: bool = False) -> None:
        """The process ends, or closes it: whoever is connected finds out."""
        self._network.routers.pop(self.endpoint, None)
        for connection in list(self._peers.values()):
            connection.break_(graceful=graceful)
        self._peers.clear()


class DealerSocket:
    """A DEALER with IMMEDIATE that connects to one endpoint, and again when that breaks. `broke` counts as in RouterSocket."""

    def __init__(self, network: Network, host: Host, endpoint: str) -> None:
        self.host = host
        self.endpoint = endpoint
        self.inbox: deque[tuple[Pipe, Frames]] = deque()
        self.broke = 0
        self.closed = False
        self.connection: Connection | None = None
        self._network = network
        self._again_s = RECONNECT_FIRST_S
        network.world.after(network.delay_s(), self._connect)

    @property
    def writable(self) -> bool:
        """Whether a send would be taken now."""
        return self.connection is not None and not self.connection.up.full

    def send(self, *frames: bytes) -> bool:
        connection = self.connection
        if connection is None or connection.up.full:
            return False
        if not connection.broken:
            connection.up.send(frames)
        return True

    def recv(self) -> Frames:
        """The next message; IndexError when there is none."""
        pipe, frames = self.inbox.popleft()
        pipe.read()
        return frames

    def close(self, *, graceful: bool = False) -> None:
        self.closed = True
        self.inbox.clear()
        if self.connection is not None:
            self.connection.break_(graceful=graceful)

    def deliver(self, pipe: Pipe, frames: Frames) -> None:
        if not self.closed:
            self.inbox.append((pipe, frames))
            self.host.stir()

    def disconnected(self, connection: Connection) -> None:
        if self.connection is connection:
            self.connection = None
            if not self.closed:
                self.broke += 1
                self._later()
                self.host.stir()

    def _later(self) -> None:
        self._network.world.after(self._again_s * self._network.random.uniform(1.0, 1.3), self._connect)

    def _connect(self) -> None:
        if self.closed or self.connection is not None:
            return
        connection = None if self.host.paused else self._network.connect(self)
        if connection is None:
            self._again_s = min(RECONNECT_MOST_S, 2 * self._again_s)
            self._later()
            return
        self._again_s = RECONNECT_FIRST_S
        self.connection = connection
        self.host.stir()


def serve_link(link: ControllerLink, dealers: Mapping[K, DealerSocket], key: K, now: float) -> None:
    """Give a link what its DEALER has: its messages, that it takes some again, that it broke. The link may replace it meanwhile."""
    dealer = dealers[key]
    broke, dealer.broke = dealer.broke, 0
    while dealer.inbox and not dealer.closed:
        link.received(now, *dealer.recv())
    if link.blocked and dealers[key].writable:
        link.writable(now)
    if broke and dealers[key] is dealer:
        link.disconnected(now)
