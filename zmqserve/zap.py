"""Who is let in: the controller's answers to libzmq, which asks in each handshake (ZAP, RFC 27).

pyzmq's ThreadAuthenticator would do it in a thread with an event loop of its own, and logs keys. This handler is polled by the
controller's loop: a few lines, no thread, and what is revoked counts from the very next handshake.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import zmq
from zmq.utils import z85

from .bucket import Bucket
from .curve import CLIENTS_DOMAIN, WORKERS_DOMAIN, ZAP_ENDPOINT, handler_socket
from .keyring import Keyring, Peer
from .sockets import NOBLOCK

VERSION = b"1.0"
BURST_S = 10.0
"""A fleet that shares one key and connects anew all at once may be so many seconds' worth of handshakes."""
TELL_S = 1.0
"""Least time between two log lines about handshakes: a flood of them must not become one of lines."""


class ZapHandler:
    """Answers for both domains of one controller, from what `keyring` holds at that moment. Bind it before anything else in the context.

    The User-Id of a connection is its peer's key, not its name: a name that is given to another key is not inherited.
    `handshakes_per_s`: of one key; BURST_S times as many at once. Those beyond that are not answered, and libzmq ends them after a second.
    Raises BindFailed where the context has a handler.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        keyring: Keyring,
        counters: Counter[str],
        report: Callable[..., None],
        *,
        handshakes_per_s: float,
    ) -> None:
        self.socket = handler_socket(context)
        self.counters = counters
        self._keyring, self._report = keyring, report
        self._handshakes_per_s = handshakes_per_s
        self._buckets: dict[bytes, Bucket] = {}
        self._tell_s = 0.0
        self._untold = 0

    def __repr__(self) -> str:
        return f"ZapHandler({self._keyring!r})"

    def serve(self, now: float, most: int) -> None:
        """Answer what libzmq asks, at most so many times. It never waits."""
        for _ in range(most):
            try:
                frames = self.socket.recv_multipart(NOBLOCK)
            except zmq.Again:
                return
            if len(frames) < 8 or frames[1] or frames[2] != VERSION:
                self.counters["dropped: not a ZAP request"] += 1
                continue
            user = self._user_of(now, frames[4].decode(errors="replace"), frames[5], frames[7], frames[8:])
            if user and not self._has_time_for(now, user):
                continue
            answer = [b"200", b"OK", user, b""] if user else [b"400", b"this key is not allowed here", b"", b""]
            try:
                self.socket.send_multipart([frames[0], b"", VERSION, frames[3], *answer], NOBLOCK)
            except zmq.ZMQError:
                self.counters["dropped: not a ZAP request"] += 1  # who asked has gone

    def close(self) -> None:
        """After the sockets that it guards: without it nobody gets in there any more."""
        try:
            self.socket.unbind(ZAP_ENDPOINT)  # libzmq frees the name some time after the socket is closed
        except zmq.ZMQError:
            pass  # the context has been terminated
        self.socket.close()

    def _user_of(self, now: float, domain: str, address: bytes, mechanism: bytes, credentials: list[bytes]) -> bytes:
        """The User-Id for who asks to be let in; empty: nobody."""
        allowed: Mapping[str, Peer] = {}
        if domain == CLIENTS_DOMAIN:
            allowed = self._keyring.clients
        elif domain == WORKERS_DOMAIN:
            allowed = self._keyring.workers
        if mechanism == b"CURVE" and len(credentials) == 1 and len(credentials[0]) == 32:
            user = z85.encode(credentials[0])
            if user.decode() in allowed:
                return user
        self._refuse(now, domain, address)
        return b""

    def _has_time_for(self, now: float, user: bytes) -> bool:
        """Each handshake of a key that connects over and over costs memory, and with a routing id that is taken a descriptor, too."""
        bucket = self._buckets.get(user)
        if bucket is None:
            if len(self._buckets) > 2 * (len(self._keyring.clients) + len(self._keyring.workers)):
                self._buckets.clear()  # most of them are of keys that have gone
            bucket = self._buckets[user] = Bucket(self._handshakes_per_s, BURST_S * self._handshakes_per_s, now)
        if bucket.wait_s(now, 1.0) > 0:
            self.counters["refused handshakes: too many of one key"] += 1
            return False
        bucket.take(now, 1.0)
        return True

    def _refuse(self, now: float, domain: str, address: bytes) -> None:
        self.counters["refused handshakes: key not allowed"] += 1
        self._untold += 1
        if now >= self._tell_s:
            self._tell_s = now + TELL_S
            count, self._untold = self._untold, 0
            self._report("key not allowed", level="warning", domain=domain, address=address.decode(errors="replace"), count=count)
