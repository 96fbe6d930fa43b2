"""CURVE on sockets, the security beside sockets.py: who a socket is, whom it lets in, and why it was not let in itself."""

from __future__ import annotations

import ipaddress
import re
import socket as sockets_of_the_system
from collections import Counter
from collections.abc import Iterable
from time import monotonic
from typing import NamedTuple

import zmq

from .certificate import Pair, fingerprint
from .errors import BindFailed, InvalidEndpoint

CLIENTS_DOMAIN, WORKERS_DOMAIN = "clients", "workers"
"""ZAP domains of a controller's two sockets."""
OPEN_DOOR = "other machines may reach these, and nobody is asked for a key"
"""Why an endpoint is called insecure."""
ZAP_ENDPOINT = "inproc://zeromq.zap.01"

TIMEOUT_S = 0.9
"""A controller that is swamped ends the handshakes that it could not get to, each after a second. What is ended faster was refused."""

_TCP_HOST = re.compile(r"tcp://(?:\[(?P<v6>[^\]]*)\]|(?P<host>[^:]*)):[^:]*")


class Curve(NamedTuple):
    """What a connecting socket needs: its own pair, and the public key of the controller that it wants to reach."""

    own: Pair
    controller: str

    def __repr__(self) -> str:
        return f"Curve({self.own!r}, controller={fingerprint(self.controller)[:8]})"


def guard(socket: zmq.Socket[bytes], pair: Pair, domain: str) -> None:
    """Let only those through whom the context's ZAP handler allows in this domain; before the socket is bound."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
    # Without a handler libzmq would let everybody in who knows the public key.
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)


def identify(socket: zmq.Socket[bytes], curve: Curve) -> None:
    """Prove who we are to whom we connect, and have that one prove that it is the controller meant; before the socket connects."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, curve.controller.encode())
    socket.setsockopt(zmq.CURVE_PUBLICKEY, curve.own.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, curve.own.secret)


def handler_socket(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Socket[bytes]:
    """The socket on which libzmq asks whom to let in, one per context. Raises BindFailed where the context has one."""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.bind(ZAP_ENDPOINT)
    except zmq.ZMQError as error:
        socket.close()
        why = "this zmq.Context has a ZAP handler already, of the program's own or of another controller with curve_dir"
        raise BindFailed(ZAP_ENDPOINT, f"{why}: give each controller a Context of its own", error.errno) from None
    return socket


def is_exposed(endpoint: str) -> bool:
    """Whether who binds this may be reached from other machines: any tcp endpoint that is not surely the loopback device's."""
    match = _TCP_HOST.fullmatch(endpoint)
    if match is None:
        return endpoint.startswith("tcp://")
    host = match["v6"] if match["v6"] is not None else match["host"]
    if host.lower() == "localhost":
        return not _is_local(host)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return True  # a device, or a name that may mean anything tomorrow
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return not (mapped or address).is_loopback


def exposed(endpoints: Iterable[str], *, insecure: bool, remedy: str) -> list[str]:
    """Those that other machines may reach, though nobody will be asked for a key there. Raises InvalidEndpoint unless that is meant."""
    found = [endpoint for endpoint in endpoints if is_exposed(endpoint)]
    if found and not insecure:
        raise InvalidEndpoint(found[0], f"other machines may reach it, and nobody would be asked for a key: {remedy}")
    return found


def _is_local(host: str) -> bool:
    """Whether a name means nothing but this machine's loopback device."""
    try:
        found = sockets_of_the_system.getaddrinfo(host, None, proto=sockets_of_the_system.IPPROTO_TCP)
    except OSError:
        return False
    return bool(found) and all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


class Handshakes:
    """Tells why the handshakes of a connecting socket fail, where its owner can do something about it. `peers`: what such sockets are
    called in a controller's folder, ``clients`` or ``workers``.

    Give `tell` to the socket's Monitor. `why` begins with what is so and ends with what to do; "": nothing is wrong, as far as is known.
    """

    def __init__(self, peers: str, *, with_key: bool) -> None:
        self.why = ""
        self._peers, self._with_key = peers, with_key
        self._cut = 0
        self._since_s: float | None = monotonic()

    def __repr__(self) -> str:
        return f"Handshakes({self._peers}, why={self.why!r})"

    def tell(self, event: int, value: int) -> None:
        """One was begun, completed or failed."""
        if event == zmq.EVENT_CONNECTED:
            if self._since_s is None:
                self._since_s = monotonic()
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self.why, self._cut, self._since_s = "", 0, None
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            allow = f"`zmqserve keys allow DIR {self._peers.removesuffix('s')} FILE.key` there allows it"
            self.why = f"it does not know this key for {self._peers}, or has revoked it: {allow}"
        elif event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL and value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            if self._with_key:
                self.why = "it speaks without CURVE: leave key and controller_key out, or start it with --curve-dir"
            else:
                self.why = "it wants CURVE: give key (a file that `zmqserve keys new` made) and controller_key (the public key of its port)"
        elif self._with_key and self._since_s is not None:
            # A controller with another key than the one given just ends the connection, each time, and so may one without CURVE, before its
            # greeting is read. One that is being stopped does it once.
            self._cut += 1
            if self._cut > 1 + (monotonic() - self._since_s) / TIMEOUT_S or event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                must = f"controller_key must be the {self._peers}-port.key of that very controller, and this its port for {self._peers}"
                self.why = f"it ends the connection while keys are exchanged: {must}; or it speaks without CURVE"


class FailedHandshakes:
    """Counts, by reason, the handshakes of a bound socket that fail before anybody's key is known. Give `tell` to its Monitor."""

    def __init__(self, counters: Counter[str]) -> None:
        self._counters = counters

    def __repr__(self) -> str:
        return f"FailedHandshakes({self._counters!r})"

    def tell(self, event: int, value: int) -> None:
        """One was completed or failed. Those whose key is not allowed are counted by the ZapHandler."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            without = value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
            self._counters[f"refused handshakes: {'without CURVE' if without else 'not for this port'}"] += 1
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
            self._counters["refused handshakes: not finished"] += 1
