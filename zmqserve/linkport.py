"""One controller as a worker's side reaches it: a DEALER, the monitor of its connection, and a ControllerLink."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from random import Random
from typing import Any

import zmq

from .credentials import Credentials
from .curve import WORKERS_DOMAIN, Handshakes
from .link import ControllerLink
from .linkhost import LinkHost
from .sockets import NOBLOCK, SNDMORE, Monitor, SocketLimits, connect, dealer, raw_calls

POLLIN, POLLOUT = int(zmq.POLLIN), int(zmq.POLLOUT)


class LinkPort:
    """Its owner polls what `polled` names and gives what came of it to `serve`; it ticks `link` and calls `close` at the end.

    All in one thread. `host` calls `fresh_socket` when its link asks for one, `report` gets a line when there is none. Raises
    InvalidEndpoint.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        limits: SocketLimits,
        host: LinkHost,
        *,
        credentials: Credentials,
        ttl_s: float,
        random: Random,
        now: float,
        report: Callable[..., None],
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._limits = limits
        self._credentials = credentials
        self._report = report
        self._wants = False
        self._open()
        self.link = ControllerLink(endpoint, host, self._try_send, ttl_s=ttl_s, random=random, now=now)

    def __repr__(self) -> str:
        return f"LinkPort({self.link!r})"

    def _open(self) -> None:
        """Begin a connection, beside the one that there may be."""
        curve = self._credentials.curve(self.endpoint)
        handshakes = Handshakes(WORKERS_DOMAIN, with_key=curve is not None)
        with ExitStack() as opened:
            socket = dealer(self._context, self._limits, immediate=True, curve=curve)
            opened.callback(socket.close, linger=0)
            monitor = Monitor(socket, handshakes.tell)
            opened.callback(monitor.close)
            connect(socket, self.endpoint)
            opened.pop_all()
        self._socket, self._handshakes, self._monitor = socket, handshakes, monitor
        self._recv, self._send = raw_calls(socket)

    def _try_send(self, head: bytes, payload: bytes) -> bool:
        # When the connection breaks between the two, the second says so; libzmq has forgotten the first.
        try:
            self._send(head, SNDMORE)
            self._send(payload, NOBLOCK)
        except zmq.Again:
            return False
        return True

    def polled(self) -> tuple[tuple[Any, int], tuple[Any, int]]:
        """What to poll for now: it changes with the link's state and with the socket."""
        return (self._socket, POLLIN | POLLOUT if self.link.blocked else POLLIN), (self._monitor.fd, POLLIN)

    def serve(self, now: float, events: Mapping[Any, int], most: int) -> bool:
        """Take what a poll has found, of messages at most so many. True when the connection has broken."""
        event = events.get(self._socket, 0)
        broken = self._monitor.fd in events and self._monitor.take() > 0
        if event & POLLIN:
            self._receive(now, most)
        if event & POLLOUT:
            self.link.writable(now)
        if broken:
            self.link.disconnected(now)
            if self._handshakes.why:
                self.link.shut_out(now, self._handshakes.why)
        return broken

    def fresh_socket(self) -> None:
        """Replace the connection. Raises OSError where the process or the context can have no more sockets: then the old one is kept."""
        before = self._monitor, self._socket
        try:
            self._open()
        except zmq.ContextTerminated:
            raise
        except zmq.ZMQError as error:
            if not self._wants:  # once, however often it is tried
                self._wants = True
                self._report("no fresh connection", level="warning", endpoint=self.endpoint, why=error.strerror)
            raise OSError(error.errno, error.strerror) from None
        self._wants = False
        _close(*before, 0)

    def close(self, linger_ms: int) -> None:
        """Say goodbye and let go of the connection; what was sent before has `linger_ms` to leave."""
        with suppress(zmq.ZMQError):
            self.link.close()
        _close(self._monitor, self._socket, linger_ms)

    def _receive(self, now: float, most: int) -> None:
        """Each message is two frames, its end looked for in every one: another number must not shift those that follow."""
        recv, received = self._recv, self.link.received
        for _ in range(most):
            try:
                head = recv(NOBLOCK, False)
            except zmq.Again:
                return
            last = payload = recv(NOBLOCK, False) if head.more else head
            while last.more:
                last = recv(NOBLOCK, False)
            if last is payload and payload is not head:
                received(now, head.bytes, payload.bytes)
            else:
                self.link.bad_frames += 1


def _close(monitor: Monitor, socket: zmq.Socket[bytes], linger_ms: int) -> None:
    monitor.close()
    socket.close(linger=linger_ms)
