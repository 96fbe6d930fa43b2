"""One controller as a worker's side reaches it: a DEALER, the monitor of its connection, and a ControllerLink."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
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

    All in one thread. `host` calls `fresh_socket` when its link asks for one. Raises InvalidEndpoint.
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
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._limits = limits
        self._credentials = credentials
        self._open()
        self.link = ControllerLink(endpoint, host, self._try_send, ttl_s=ttl_s, random=random, now=now)

    def __repr__(self) -> str:
        return f"LinkPort({self.link!r})"

    def _open(self) -> None:
        curve = self._credentials.curve(self.endpoint)
        self._socket = dealer(self._context, self._limits, immediate=True, curve=curve)
        self._handshakes = Handshakes(WORKERS_DOMAIN, with_key=curve is not None)
        self._monitor = Monitor(self._socket, self._handshakes.tell)
        try:
            connect(self._socket, self.endpoint)
        except BaseException:
            self._close(0)
            raise
        self._recv, self._send = raw_calls(self._socket)

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
        """Replace the connection."""
        self._close(0)
        self._open()

    def close(self, linger_ms: int) -> None:
        """Say goodbye and let go of the connection; what was sent before has `linger_ms` to leave."""
        with suppress(zmq.ZMQError):
            self.link.close()
        self._close(linger_ms)

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

    def _close(self, linger_ms: int) -> None:
        self._monitor.close()
        self._socket.close(linger=linger_ms)
