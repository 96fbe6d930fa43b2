"""The only place where socket options are set, each with its reason.

No socket ever gets an identity: a second DEALER with the same one is mute, without an error. Names travel in messages.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import re
import resource
import stat
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import zmq

from .curve import Curve, identify
from .errors import BindFailed, InvalidEndpoint, InvalidParameter

MAX_IPC_PATH = 107
"""Bytes of a unix socket's path (sockaddr_un), less the closing zero."""

NOBLOCK = int(zmq.NOBLOCK)
SNDMORE = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
"""Flags as plain integers: an `or` of the enum's members costs twice a whole send. SNDMORE never blocks either."""

HANDSHAKE_MS = 1000
"""What a peer of a controller gets to prove that it speaks ZMTP, and with CURVE who it is."""
PULL_BUFFER_BYTES = 64 * 2**10
"""Of the kernel, for a bridge's jobs. Less than one segment of the loopback device would make them wait for the kernel's timers."""

HANDSHAKES = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)
_EVENT = struct.Struct("=HI")
_monitors = itertools.count()
_TCP = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+(?:%\w+)?\]|[^:/\s\[\]]+):(?P<port>\d+|\*)")


@dataclass(frozen=True)
class SocketLimits:
    """`message_bytes`: a larger message drops its sender's connection. `pipe_messages`: a peer's queue inside libzmq,
    each way; what waits beyond it is counted in bytes by the outboxes."""

    message_bytes: int = 64 * 2**20
    pipe_messages: int = 2048


def check_endpoint(endpoint: str, *, bind: bool) -> str:
    """The endpoint in the form that libzmq takes (port 0 becomes ``*``), or InvalidEndpoint that says what is wrong with it."""
    if not endpoint.isprintable():
        raise InvalidEndpoint(endpoint, "it holds a character that cannot be printed")
    if endpoint.startswith("ipc://"):
        path = endpoint[6:]
        size = len(os.fsencode(path))
        if not path:
            raise InvalidEndpoint(endpoint, "an ipc endpoint needs a path, like ipc:///run/zmqserve/clients.ipc")
        if path[0] in "@*":
            raise InvalidEndpoint(endpoint, "the path must be a file's: abstract and wildcard ones have no permissions that protect them")
        if size > MAX_IPC_PATH:
            raise InvalidEndpoint(endpoint, f"the path is {size} bytes long, a unix socket's may have {MAX_IPC_PATH}")
        return endpoint
    if endpoint.startswith("inproc://"):
        if not endpoint[9:]:
            raise InvalidEndpoint(endpoint, "an inproc endpoint needs a name, like inproc://clients")
        return endpoint
    match = _TCP.fullmatch(endpoint)
    if match is None:
        raise InvalidEndpoint(endpoint, "expected tcp://HOST:PORT, ipc:///PATH or inproc://NAME")
    port = match["port"]
    if port in ("*", "0"):
        if not bind:
            raise InvalidEndpoint(endpoint, "a port to connect to must be a number from 1 to 65535")
        return f"tcp://{match['host']}:*"
    if int(port) > 65535:
        raise InvalidEndpoint(endpoint, f"port {port} is over 65535")
    return endpoint


def plain(context: zmq.Context[zmq.Socket[bytes]]) -> zmq.Context[zmq.Socket[bytes]]:
    """A caller's context, as one whose sockets do at once what they are told; InvalidParameter if it is none, or closed.

    Those of zmq.asyncio and zmq.green return futures, or switch to another greenlet. What they wrap is the same.
    """
    if not isinstance(context, zmq.Context) or context.closed:
        what = "closed" if isinstance(context, zmq.Context) else f"got {context!r:.100}"
        raise InvalidParameter(f"context must be a zmq.Context that is open, {what}", data={"parameter": "context"})
    return context if type(context) is zmq.Context else zmq.Context(context)


class Binding:
    """One bound endpoint. `endpoint` is the real one: a chosen port is filled in."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        wanted = check_endpoint(endpoint, bind=True)
        self._socket = socket
        # A second bind of an ipc path succeeds silently and steals the first one's new peers: hold a lock beside it.
        self._lock = _lock_ipc(endpoint) if wanted.startswith("ipc://") else None
        # A socket with IPV6 set reports an IPv4 endpoint in its mapped form, so it is set only for what needs it.
        socket.setsockopt(zmq.IPV6, int("[" in wanted))
        try:
            socket.bind(wanted)
        except zmq.ZMQError as error:
            self.release()
            raise BindFailed(endpoint, zmq.strerror(error.errno) if error.errno else str(error), error.errno) from None
        last = socket.getsockopt(zmq.LAST_ENDPOINT)
        self.endpoint = last.rstrip(b"\0").decode() if wanted.startswith("tcp://") and isinstance(last, bytes) else endpoint
        if wanted.startswith("ipc://"):
            os.chmod(wanted[6:], 0o600)

    def __repr__(self) -> str:
        return f"Binding({self.endpoint!r})"

    def unbind(self) -> None:
        """Before its socket is closed: libzmq frees an inproc name some time after that only, and who binds it again would fail."""
        if self.endpoint.startswith("inproc://"):
            with contextlib.suppress(zmq.ZMQError):  # its context has been terminated
                self._socket.unbind(self.endpoint)

    def release(self) -> None:
        """Let others bind an ipc path again; the socket is closed by its owner."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _lock_ipc(endpoint: str) -> int:
    path = endpoint[6:]
    parent = os.path.dirname(path) or "."
    lock = None
    try:
        os.makedirs(parent, mode=0o700, exist_ok=True)
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # libzmq removes whatever lies at the path, a user's file too.
        if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file that is not a socket")
    except OSError as error:
        if lock is not None:
            os.close(lock)
        why = "another process has it bound" if isinstance(error, BlockingIOError) else error.strerror or str(error)
        raise BindFailed(endpoint, why, error.errno) from None
    return lock


def router(context: zmq.Context[zmq.Socket[bytes]], limits: SocketLimits) -> zmq.Socket[bytes]:
    """A controller's socket, for clients or for workers."""
    _seed_routing_ids()
    socket = context.socket(zmq.ROUTER)
    # The default ROUTER drops what it cannot route, silently. With this a send says EHOSTUNREACH or EAGAIN.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    # A connection that does not finish its handshake holds a descriptor. At libzmq's 30 s a few hundred silent ones
    # keep a ROUTER busy and deaf to newcomers.
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.BACKLOG, 1024)
    _common(socket, limits)
    return socket


def _seed_routing_ids() -> None:
    """libzmq (4.3.5) numbers a ROUTER's peers upwards from C's rand(), which nobody has seeded: the same numbers in every process.

    Who knows the next one can take it first, and libzmq aborts the process; who knows another's gets what is sent there when that one goes.
    """
    seed = getattr(ctypes.CDLL(None), "srand", None)
    if seed is not None:
        seed(ctypes.c_uint(int.from_bytes(os.urandom(4))))


def dealer(
    context: zmq.Context[zmq.Socket[bytes]], limits: SocketLimits, *, immediate: bool, curve: Curve | None = None
) -> zmq.Socket[bytes]:
    """A client's or worker's socket, to be connected to one controller: one with two endpoints would spread messages round-robin.

    `immediate`: without a connection `send` says EAGAIN, instead of keeping heartbeats for later to arrive all at once. `curve`: the keys
    of both ends, None: without any.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IPV6, 1)  # names may resolve to either family
    socket.setsockopt(zmq.IMMEDIATE, int(immediate))
    # Back within a second of the controller's return, however long it was away.
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    # A host that swallows packets is tried anew long before the kernel's own minutes are over.
    socket.setsockopt(zmq.CONNECT_TIMEOUT, 5000)
    _common(socket, limits)
    if curve is not None:
        identify(socket, curve)
    return socket


def connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """After its Monitor was made: a handshake may have failed before this returns. Raises InvalidEndpoint."""
    try:
        socket.connect(check_endpoint(endpoint, bind=False))
    except zmq.ZMQError as error:
        raise InvalidEndpoint(endpoint, error.strerror or str(error)) from None


def pipeline(context: zmq.Context[zmq.Socket[bytes]], kind: int, limits: SocketLimits) -> zmq.Socket[bytes]:
    """A PULL or PUSH of somebody's pipeline, whose other sockets may be of any library that speaks ZMTP."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.IPV6, 1)
    socket.setsockopt(zmq.RECONNECT_IVL, 100)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    _common(socket, limits)
    # Who takes long over a message is no dead peer here, and what a broken connection had would be lost: as slow as pipelines are.
    socket.setsockopt(zmq.TCP_MAXRT, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 30)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    if kind == zmq.PULL:
        # The kernel would take megabytes of messages that others could have.
        socket.setsockopt(zmq.RCVBUF, PULL_BUFFER_BYTES)
    return socket


class Monitor:
    """Tells when a connection of `socket` has broken, within a millisecond for a peer that was killed on the same machine.

    libzmq connects again by itself, and the other side takes that for a new peer: whatever it held for the old one is lost.
    Nothing is told of inproc connections. `fd` becomes readable, edge-triggered, when there may be something to `take`.
    `handshake`: called by `take` with event and value of each handshake that was begun, completed or failed. Without `breaks` that is all.
    """

    def __init__(self, socket: zmq.Socket[bytes], handshake: Callable[[int, int], object] | None = None, *, breaks: bool = True) -> None:
        self._socket = socket
        self._handshake = handshake
        self.more = False
        """Whether the last `take` has left something, of which `fd` will not tell again."""
        events = (zmq.EVENT_DISCONNECTED if breaks else 0) | (HANDSHAKES if handshake is not None else 0)
        address = f"inproc://zmqserve.monitor.{next(_monitors)}"
        socket.monitor(address, events)
        self._events: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
        self._events.setsockopt(zmq.LINGER, 0)
        # At a limit libzmq's thread would wait, and with it all sockets of the context, until somebody looks: a client that has
        # nothing to ask does not. One event for each try to connect is not much.
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._recv, _ = raw_calls(self._events)
        try:
            self._events.connect(address)
            self.fd: int = self._events.fileno()
            self.take()  # libzmq wakes only those who looked and found nothing
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Monitor({self._socket!r})"

    def take(self, most: int = sys.maxsize) -> int:
        """How many connections have broken since the last call, by what up to `most` events say; look at `more` then."""
        recv, handshake, broken = self._recv, self._handshake, 0
        self.more = True
        for _ in range(most):
            try:
                event, value = _EVENT.unpack(recv(NOBLOCK))
            except zmq.Again:
                self.more = False
                break
            recv(NOBLOCK)  # the endpoint, which has come with it
            if event == DISCONNECTED:
                broken += 1
            elif handshake is not None:
                handshake(event, value)
        return broken

    def close(self) -> None:
        """Let go of it; before its socket is closed."""
        with contextlib.suppress(zmq.ZMQError):  # the context has been terminated: its sockets must be closed all the same
            self._socket.disable_monitor()
        self._events.close()


def _common(socket: zmq.Socket[bytes], limits: SocketLimits) -> None:
    # Closing never waits for a peer that does not read.
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, limits.pipe_messages)
    socket.setsockopt(zmq.RCVHWM, limits.pipe_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, limits.message_bytes)
    _find_half_open(socket)


def _find_half_open(socket: zmq.Socket[bytes]) -> None:
    """The kernel ends a tcp connection after 6 s that takes nothing, or whose other end is gone. Hung programs are the protocol's affair.

    Not by ZMTP's heartbeats: libzmq (4.3.5) aborts the process when their timer meets a connection that was reset while its queue was
    full, and a peer can bring that about.
    """
    socket.setsockopt(zmq.HEARTBEAT_IVL, 0)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 2)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 2)
    # Keepalive waits while something is under way. This is TCP_USER_TIMEOUT of the kernel.
    socket.setsockopt(zmq.TCP_MAXRT, 6000)


def raw_calls(socket: zmq.Socket[bytes], compiled: bool = True) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`recv(flags, copy)` and `send(data, flags)` for one frame, without the checks that `zmq.Socket` wraps around them.

    With `compiled` false, or where pyzmq has no such class, the wrapped ones, which do the same.
    """
    base = getattr(zmq.backend, "Socket", None)
    if compiled and isinstance(base, type) and isinstance(socket, base):
        plain = cast("Any", base)
        return partial(plain.recv, socket), partial(plain.send, socket)
    return socket.recv, socket.send


def raise_descriptor_limit() -> int:
    """Take all file descriptors that the system allows (one per peer is needed); returns the limit in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft
