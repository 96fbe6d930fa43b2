"""A simulated connection: two pipes that keep their order, may be full or stopped, and break with what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from .network import Network
    from .sockets import DealerSocket, RouterSocket

Frames: TypeAlias = tuple[bytes, ...]
HEARTBEAT_S = (6.0, 8.0)
"""After so long a connection breaks whose other end is stopped or gone: the kernel does it (see sockets.py), where something was sent."""


class Pipe:
    """One direction of a connection: what is under way, in order, and what lies unread at its end, both within `room`."""

    __slots__ = ("_held", "_last_s", "_room", "deliver", "full", "label", "network", "on_room", "stopped", "under_way", "unread")

    def __init__(self, network: Network, label: str, deliver: Callable[[Pipe, Frames], None], on_room: Callable[[], None]) -> None:
        self.network = network
        self.label = label
        self.deliver = deliver
        self.on_room = on_room
        self.under_way: deque[Frames] = deque()
        self.unread = 0
        self.full = False
        self.stopped = False
        self._room = network.room
        self._held = 0
        self._last_s = 0.0

    def send(self, frames: Frames) -> None:
        world = self.network.world
        self.under_way.append(frames)
        self._last_s = max(self._last_s, world.now + self.network.delay_s())
        world.at(self._last_s, self._arrive)
        if len(self.under_way) + self.unread >= self._room:
            self.full = True

    def _arrive(self) -> None:
        if self.stopped:
            self._held += 1
        elif self.under_way:  # else it was lost
            frames = self.under_way.popleft()
            self.unread += 1
            self.network.world.arrived(self.label, frames)
            self.deliver(self, frames)

    def read(self) -> None:
        """One of those that lay unread was taken."""
        self.unread -= 1
        if self.full and len(self.under_way) + self.unread <= self._room // 2:
            self.full = False
            self.on_room()

    def stop(self) -> None:
        self.stopped = True

    def restore(self) -> None:
        self.stopped = False
        while self._held:
            self._held -= 1
            self._arrive()

    def end(self, lose: bool) -> float:
        """The connection has broken; returns when the receiver notices."""
        if lose or self.stopped:
            self.under_way.clear()
            self._held = 0
            return self.network.world.now + self.network.delay_s()
        return max(self._last_s, self.network.world.now + self.network.delay_s())


class Connection:
    """A DEALER's with a ROUTER. `broken` at once; each side notices in its own time, and what it sends until then is lost."""

    def __init__(self, network: Network, dealer: DealerSocket, router: RouterSocket) -> None:
        self.network, self.dealer, self.router = network, dealer, router
        self.identity = network.new_identity()
        up, down = f"{dealer.host.name} -> {router.host.name}", f"{dealer.host.name} <- {router.host.name}"
        self.up = Pipe(network, up, self._to_router, lambda: network.world.after(0.0, dealer.host.stir))
        self.down = Pipe(network, down, self._to_dealer, lambda: None)
        self.broken = False
        self.stopped = False
        self._stops = 0

    def _to_router(self, pipe: Pipe, frames: Frames) -> None:
        self.router.deliver(pipe, (self.identity, *frames))

    def _to_dealer(self, pipe: Pipe, frames: Frames) -> None:
        self.dealer.deliver(pipe, frames)

    def stop(self) -> None:
        """Nothing gets through, either way; what is under way waits."""
        if not self.stopped:
            self.stopped = True
            self.up.stop()
            self.down.stop()
            self._stops += 1
            self.network.world.after(self.network.random.uniform(*HEARTBEAT_S), self._starved, self._stops)

    def restore(self) -> None:
        if self.stopped:
            self.stopped = False
            self.up.restore()
            self.down.restore()

    def _starved(self, stops: int) -> None:
        if self.stopped and self._stops == stops:
            self.break_()

    def break_(self, *, graceful: bool = False) -> None:
        """It is gone. `graceful`: its last messages arrive, as libzmq's linger lets them."""
        if self.broken:
            return
        self.broken = True
        self.network.connections.pop(self.identity, None)
        world, random = self.network.world, self.network.random
        world.at(self.up.end(random.random() < 0.5 and not graceful), self.router.disconnected, self)
        world.at(self.down.end(random.random() < 0.5 and not graceful), self.dealer.disconnected, self)
