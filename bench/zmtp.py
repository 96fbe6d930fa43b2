"""ZMTP 3.1 by hand, over a plain TCP socket: for what libzmq never sends. See https://rfc.zeromq.org/spec/37."""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Self

MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a frame."""
PATIENCE_S = 10.0


def greeting(mechanism: bytes = b"NULL", *, as_server: bool = False, version: tuple[int, int] = (3, 1)) -> bytes:
    """The 64 bytes that begin a connection."""
    return b"\xff" + bytes(8) + b"\x7f" + bytes(version) + mechanism.ljust(20, b"\0") + bytes([as_server]) + bytes(31)


def frame(body: bytes, flags: int = 0) -> bytes:
    """One frame of a message, or with COMMAND a command."""
    if len(body) > 255:
        return struct.pack(">BQ", flags | LONG, len(body)) + body
    return struct.pack(">BB", flags, len(body)) + body


def claim(size: int, flags: int = 0) -> bytes:
    """The head of a frame that says it is so long."""
    return struct.pack(">BQ", flags | LONG, size)


def ready(kind: bytes = b"DEALER", identity: bytes = b"", **more: bytes) -> bytes:
    """The READY command of the NULL mechanism, with further properties."""
    properties = {b"Socket-Type": kind, b"Identity": identity} | {name.encode(): value for name, value in more.items()}
    body = b"".join(bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in properties.items())
    return frame(b"\x05READY" + body, COMMAND)


def ping(ttl_ds: int = 0, context: bytes = b"") -> bytes:
    """A heartbeat, which is to be answered; `ttl_ds` is in tenths of a second."""
    return frame(b"\x04PING" + struct.pack(">H", ttl_ds) + context, COMMAND)


def message(*frames: bytes, whole: bool = True) -> bytes:
    """A message; without `whole` one whose last frame promises another."""
    return b"".join(frame(body, MORE if number < len(frames) - 1 or not whole else 0) for number, body in enumerate(frames))


class RawPeer:
    """A connection to `endpoint` (tcp). With `handshake` it has said all that lets it send messages, under a routing id of its choice."""

    def __init__(self, endpoint: str, *, handshake: bool = True, identity: bytes = b"", patience_s: float = PATIENCE_S) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=patience_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        if handshake:
            self.write(greeting(), ready(identity=identity))
            self._read(64)
            flags, body = self._frame()
            if not flags & COMMAND or not body.startswith(b"\x05READY"):
                raise ConnectionError(f"the handshake was answered with {body!r:.100}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def write(self, *data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(b"".join(data))

    def send(self, *frames: bytes, whole: bool = True) -> None:
        """Send a message."""
        self.write(message(*frames, whole=whole))

    def recv(self) -> list[bytes]:
        """The next message; heartbeats are answered. Raises ConnectionError at the connection's end, TimeoutError."""
        frames: list[bytes] = []
        while True:
            flags, body = self._frame()
            if flags & COMMAND:
                if body.startswith(b"\x04PING"):
                    self.write(frame(b"\x04PONG" + body[7:], COMMAND))
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def discard(self) -> None:
        """Let go of what has come."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 16):
                pass
        except BlockingIOError:
            pass
        finally:
            self.socket.settimeout(PATIENCE_S)
        self._unread = b""

    def ends(self, within_s: float) -> bool:
        """Whether the other side ends the connection by then; what it still says is passed over."""
        until_s = time.monotonic() + within_s
        try:
            while (left_s := until_s - time.monotonic()) > 0:
                self.socket.settimeout(left_s)
                if not self.socket.recv(1 << 16):
                    return True
        except TimeoutError:
            pass
        except OSError:
            return True
        return False

    def reset(self) -> None:
        """Drop the connection by a RST: what the other side has not read is void."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        self.socket.close()

    def _frame(self) -> tuple[int, bytes]:
        (flags,) = self._read(1)
        size = struct.unpack(">Q", self._read(8))[0] if flags & LONG else self._read(1)[0]
        return flags, self._read(size)

    def _read(self, size: int) -> bytes:
        while len(self._unread) < size:
            data = self.socket.recv(1 << 16)
            if not data:
                raise ConnectionError("the other side has ended the connection")
            self._unread += data
        data, self._unread = self._unread[:size], self._unread[size:]
        return data
