"""ZMTP 3.0 by hand (NULL mechanism), for what libzmq would not send: messages without an end, chosen routing ids, lies about lengths."""

from __future__ import annotations

import socket

PATIENCE_S = 10.0
SIGNATURE = b"\xff\0\0\0\0\0\0\0\1\x7f"
MORE, LONG, COMMAND = 1, 2, 4


def greeting(mechanism: bytes = b"NULL") -> bytes:
    """The first 64 bytes."""
    return SIGNATURE + b"\3\0" + mechanism.ljust(20, b"\0") + b"\0" * 32


def ready(kind: bytes = b"DEALER", identity: bytes = b"") -> bytes:
    """NULL's only command: the kind of socket, and the routing id that the peer shall know it by."""
    return command(b"READY", _property(b"Socket-Type", kind) + _property(b"Identity", identity))


def command(name: bytes, body: bytes) -> bytes:
    whole = bytes([len(name)]) + name + body
    return bytes([COMMAND, len(whole)]) + whole if len(whole) < 256 else bytes([COMMAND | LONG]) + len(whole).to_bytes(8, "big") + whole


def frame(body: bytes, *, more: bool = False, claim: int | None = None) -> bytes:
    """A frame of a message; `claim`: the length that it says it has."""
    size = len(body) if claim is None else claim
    if size < 256:
        return bytes([MORE * more, size]) + body
    return bytes([MORE * more | LONG]) + size.to_bytes(8, "big") + body


def message(*frames: bytes) -> bytes:
    """A whole message, without the routing id."""
    return b"".join(frame(body, more=number < len(frames) - 1) for number, body in enumerate(frames))


def connected(endpoint: str) -> socket.socket:
    """A plain connection to a tcp endpoint."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def greeted(endpoint: str, *, kind: bytes = b"DEALER", identity: bytes = b"") -> socket.socket:
    """A connection over which messages may go: both sides have said READY."""
    sock = connected(endpoint)
    sock.sendall(greeting() + ready(kind, identity))
    exactly(sock, 64)
    read_frame(sock)
    return sock


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes; ConnectionError when it was closed before."""
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError("closed")
        data += part
    return data


def read_frame(sock: socket.socket) -> tuple[int, bytes]:
    """The next frame's flags and body, commands included."""
    flags, size = exactly(sock, 2)
    if flags & LONG:
        size = int.from_bytes(bytes([size]) + exactly(sock, 7), "big")
    return flags, exactly(sock, size)


def read_message(sock: socket.socket) -> list[bytes]:
    """The next message; PING is answered on the way."""
    frames: list[bytes] = []
    while True:
        flags, body = read_frame(sock)
        if flags & COMMAND:
            if body[1:5] == b"PING":
                sock.sendall(command(b"PONG", body[7:]))
            continue
        frames.append(body)
        if not flags & MORE:
            return frames


def _property(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
