"""A client's socket, with what it takes to sleep on it."""

from __future__ import annotations

import contextlib
import functools
import os
import select
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, BaseSelector

import zmq

from .credentials import Credentials
from .curve import CLIENTS_DOMAIN, Handshakes
from .errors import InvalidEndpoint
from .sockets import Monitor, SocketLimits, connect, dealer, raw_calls

NOBLOCK = int(zmq.NOBLOCK)
EVENTS = int(zmq.EVENTS)
POLLIN = int(zmq.POLLIN)

_contexts: set[zmq.Context[zmq.Socket[bytes]]] = set()
"""Those made here. Who forgets a client leaves it to the garbage collector where an error's traceback still refers to it; that may
finalize the context first, which then waits forever for sockets that it does not know any more. So it never gets to see one."""


class Bell:
    """Wakes a thread that polls: a pipe. Rung and cleared under one lock."""

    def __init__(self) -> None:
        self.fd, self._write = os.pipe()
        os.set_blocking(self.fd, False)
        self._rung = False

    def __repr__(self) -> str:
        return f"Bell({'closed' if self.fd < 0 else 'rung' if self._rung else 'still'})"

    def ring(self) -> None:
        """Wake who polls, or who polls next."""
        if not self._rung and self.fd >= 0:
            self._rung = True
            os.write(self._write, b"\0")

    def clear(self) -> None:
        """Be still again."""
        if self._rung and self.fd >= 0:
            with contextlib.suppress(BlockingIOError):  # an interrupt hit between these two lines the last time
                os.read(self.fd, 64)
        self._rung = False

    def close(self) -> None:
        """Give the descriptors back; harmless when that was done."""
        if self.fd >= 0:
            os.close(self.fd)
            os.close(self._write)
            self.fd = -1


class Line:
    """The Wire of a session: a DEALER, a new one for each `connect`.

    `recv` reads a message without waiting, or raises zmq.Again, which costs as much as a dozen messages: `readable` asks first.
    `poller` wakes for the socket, its end and `bell`; a given `selector` wakes for the first two, whichever socket it is. The socket's
    descriptor is edge-triggered, and any call on the socket may eat the edge: `dirty` says that something may lie there unread, so that
    nobody may sleep before the socket was found empty.
    `broken`: the connection has broken, as `broke` found. What had come on it before can still be read.
    `shut_out`: why the handshake failed; "": it did not. Such a socket is of no more use: `connect` makes another, `hang_up` none.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]] | None,
        limits: SocketLimits,
        credentials: Credentials,
        selector: BaseSelector | None = None,
    ) -> None:
        self.bell = Bell()
        self.dirty = self.broken = False
        self.recv: Callable[[], bytes] = _nothing
        self._context, self._owns_context = context, context is None
        self._limits = limits
        self._credentials = credentials
        self._handshakes: Handshakes | None = None
        self._selector = selector
        self._selected: list[int] = []
        self._socket: zmq.Socket[bytes] | None = None
        self._send: Callable[..., object] | None = None
        self._monitor: Monitor | None = None
        self._break = select.poll()
        self.renew_poller()

    def __repr__(self) -> str:
        return f"Line({'no socket' if self._socket is None else self._socket!r}, dirty={self.dirty})"

    def connect(self, endpoint: str) -> None:
        """A new socket connects at once, where an old one might be waiting for its next try."""
        if self._context is None:
            self._context = zmq.Context()
            _contexts.add(self._context)
        self._drop_socket(0)
        self.broken = False
        try:
            # Not `immediate`: such a socket throws away what it has received when its connection breaks.
            curve = self._credentials.curve(endpoint)
            self._socket = dealer(self._context, self._limits, immediate=False, curve=curve)
            self._handshakes = Handshakes(CLIENTS_DOMAIN, with_key=curve is not None)
            self._monitor = Monitor(self._socket, self._handshakes.tell)
            connect(self._socket, endpoint)
            self._break = select.poll()
            self._break.register(self._monitor.fd, select.POLLIN)
            recv, self._send = raw_calls(self._socket)
            self.recv = functools.partial(recv, NOBLOCK)
            self._select(self._socket.fileno(), self._monitor.fd)
        except (zmq.ZMQError, InvalidEndpoint):
            # No descriptors left, or no such address family here: nobody will answer, which the session tells its callers.
            self._drop_socket(0)
        self.dirty = True
        self.renew_poller()
        self.bell.ring()

    @property
    def shut_out(self) -> str:
        return self._handshakes.why if self._handshakes is not None else ""

    def hang_up(self) -> None:
        """Let go of a connection that is of no use; libzmq would go on trying to make it."""
        self._drop_socket(0)
        self.renew_poller()
        self.bell.ring()

    def send(self, payload: bytes) -> bool:
        """False when the pipe is full, or there is none. What leaves before the connection is there waits for it."""
        send = self._send
        if send is None:
            return False
        self.dirty = True
        try:
            send(payload, NOBLOCK)
        except (zmq.Again, zmq.ContextTerminated):
            return False
        return True

    def stirs(self) -> bool:
        """Whether there is something to read or room to write. Asking eats the edge, so it settles whether to sleep."""
        try:
            return self._socket is not None and bool(self._socket.getsockopt(zmq.EVENTS))
        except zmq.ContextTerminated:
            return True  # who reads is told

    def readable(self) -> bool:
        """Whether there is something for `recv`; also raises what `recv` would raise for good."""
        return self._socket is not None and bool(int(self._socket.get(EVENTS)) & POLLIN)

    def broke(self) -> bool:
        """Look whether the connection has broken: sets `broken`, which stays until it is cleared, or for as long as the socket."""
        if self._monitor is not None and self._break.poll(0):
            with contextlib.suppress(zmq.ContextTerminated):
                self.broken = self._monitor.take() > 0 or self.broken
        return self.broken

    def tells_break(self, events: Sequence[tuple[int, int]]) -> bool:
        """Whether what `poller` told is perhaps that the connection has broken."""
        return self._monitor is not None and any(fd == self._monitor.fd for fd, _ in events)

    def renew_poller(self) -> None:
        """A poll object may be used by one thread at a time: make one that nobody uses."""
        self.poller = select.poll()
        self.poller.register(self.bell.fd, select.POLLIN)
        if self._socket is not None:
            self.poller.register(self._socket.fileno(), select.POLLIN)
        if self._monitor is not None:
            self.poller.register(self._monitor.fd, select.POLLIN)

    def close(self, linger_ms: int) -> zmq.Context[zmq.Socket[bytes]] | None:
        """Close the socket; the bell stays. Returns the context, if it was made here, for the caller to end: that may take `linger_ms`."""
        self._drop_socket(linger_ms)
        context = self._context if self._owns_context else None
        self._context = None
        if context is not None:
            _contexts.discard(context)
        return context

    def _select(self, *descriptors: int) -> None:
        if self._selector is not None:
            for descriptor in descriptors:
                self._selector.register(descriptor, EVENT_READ)
                self._selected.append(descriptor)

    def _drop_socket(self, linger_ms: int) -> None:
        self.recv, self._send = _nothing, None
        # Now: libzmq closes its descriptors a moment later, when others may have these numbers.
        while self._selector is not None and self._selected:
            self._selector.unregister(self._selected.pop())
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = self._handshakes = None
        if self._socket is not None:
            self._socket.close(linger=linger_ms)
            self._socket = None


def _nothing() -> bytes:
    raise zmq.Again
