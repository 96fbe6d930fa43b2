"""A scripted controller: a ROUTER that the test's own thread drives, message by message."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import zmq

from tests.processes import PATIENCE_S
from zmqserve import messages as m

_heads = m.decoder(m.WorkerHead)
_payloads: dict[int, msgspec.msgpack.Decoder[Any]] = {
    m.READY: m.decoder(m.Ready),
    m.LOAD: m.decoder(m.Load),
    m.FIRST: m.decoder(m.ToClient),
    m.MORE: m.decoder(m.ToClient),
    m.DONE: m.decoder(m.ToClient),
    m.FAILED: m.decoder(m.ToClient),
}


class Received(NamedTuple):
    """One message of a worker. `message` is its payload, decoded; None where there is none."""

    identity: bytes
    head: m.WorkerHead
    message: Any
    head_bytes: bytes


class FakeController:
    """Says what the test says. Only BEATs are sent by themselves: between any two waits, so that no worker finds it silent."""

    def __init__(
        self, endpoint: str = "tcp://127.0.0.1:*", *, context: zmq.Context[zmq.Socket[bytes]] | None = None, name: str = "fake"
    ) -> None:
        self.context = context or zmq.Context.instance()
        self.name = name
        self.epoch = 0
        self.worker = b""
        self.beats = True
        self.message_bytes = 0
        self._epochs = 0
        self._beat_s = 0.0
        self.bind(endpoint)

    def bind(self, endpoint: str) -> None:
        """Open a socket there: the first one, or one after `unbind`."""
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A connection of the socket's former life may still hold the port for a moment.
        ends_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                self.socket.bind(endpoint)
                break
            except zmq.ZMQError:
                if time.monotonic() > ends_s:
                    raise
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def unbind(self) -> None:
        """Die: everybody's connection breaks."""
        self.socket.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.socket.close(linger=0)

    # --- what it hears ----------------------------------------------------------------------------

    def receive(self, timeout_s: float = PATIENCE_S) -> Received:
        """The next message of any kind."""
        ends_s = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            if self.beats and self.epoch and now >= self._beat_s:
                self._beat_s = now + 0.1
                try:
                    self.send(m.ControllerHead(m.BEAT, self.epoch))
                except zmq.ZMQError:
                    self.epoch = 0
            if self.socket.poll(max(1, min(50, int(1000 * (ends_s - now))))):
                identity, head_bytes, payload = self.socket.recv_multipart()
                head = _heads.decode(head_bytes)
                message = _payloads[head.kind].decode(payload) if head.kind in _payloads else None
                return Received(identity, head, message, head_bytes)
            if now >= ends_s:
                raise TimeoutError(f"nothing came within {timeout_s} s")

    def expect(self, *kinds: int, timeout_s: float = PATIENCE_S, where: Callable[[Received], bool] = lambda _: True) -> Received:
        """The next message that is no heartbeat, unless LOAD is asked for; it must be of one of `kinds`. `where`: skip until it holds."""
        ends_s = time.monotonic() + timeout_s
        while True:
            got = self.receive(max(0.001, ends_s - time.monotonic()))
            if got.head.kind not in kinds:
                assert got.head.kind == m.LOAD, f"expected {kinds}, got {got.head} {got.message}"
            elif where(got):
                return got

    def answer_of(self, rid: int, timeout_s: float = PATIENCE_S) -> list[Received]:
        """All messages up to the end of request `rid`, others' left in."""
        got: list[Received] = []
        while not got or got[-1].head.kind not in (m.DONE, m.FAILED) or got[-1].head.rid != rid:
            got.append(self.expect(m.FIRST, m.MORE, m.DONE, m.FAILED, timeout_s=timeout_s))
        return got

    # --- what it says -----------------------------------------------------------------------------

    def send(self, head: m.ControllerHead, payload: bytes = b"", *, to: bytes | None = None) -> None:
        """Any message."""
        self.socket.send_multipart([to or self.worker, m.encode(head), payload])

    def welcome(self, ready: Received, *, ttl_ms: int = 3000) -> None:
        """Take a worker in, under a new epoch; or take what a registered one says of itself now, under the epoch that it has."""
        if not self.epoch or (ready.identity, ready.head.epoch) != (self.worker, self.epoch):
            self._epochs += 1
            self.worker, self.epoch = ready.identity, 1000 + self._epochs
        welcome = m.WorkerWelcome(m.PROTOCOL, self.name, ttl_ms, message_bytes=self.message_bytes)
        self.send(m.ControllerHead(m.WELCOME, self.epoch), m.encode(welcome))

    def register(self, *, timeout_s: float = PATIENCE_S, ttl_ms: int = 3000) -> m.Ready:
        """Welcome every READY until one says ``ready``; returns it."""
        while True:
            got = self.expect(m.READY, timeout_s=timeout_s)
            self.welcome(got, ttl_ms=ttl_ms)
            ready: m.Ready = got.message
            if ready.state == "ready":
                return ready

    def request(self, request: m.Request, *, client: int = 1, deadline_ms: int | None = None, queue_ms: float = 0.0) -> None:
        """Hand a request to the worker."""
        self.request_bytes(m.encode(request), request.rid, client=client, deadline_ms=deadline_ms, queue_ms=queue_ms)

    def request_bytes(self, payload: bytes, rid: int, *, client: int = 1, deadline_ms: int | None = None, queue_ms: float = 0.0) -> None:
        """The same with any payload."""
        self.send(m.ControllerHead(m.REQUEST, self.epoch, client, rid, deadline_ms, 0, queue_ms), payload)

    def cancel(self, rid: int, *, client: int = 1) -> None:
        """Cancel a request."""
        self.send(m.ControllerHead(m.CANCEL, self.epoch, client, rid))


def chunks_of(received: list[Received], rid: int) -> list[m.Chunk]:
    """All chunks of one request, in order of arrival, the one in its Done included."""
    found: list[m.Chunk] = []
    for got in received:
        message = got.message
        if isinstance(message, m.Chunk):
            found.append(message)
        elif isinstance(message, m.Chunks):
            found.extend(message.chunks)
        elif isinstance(message, m.Done) and message.last is not None:
            found.append(message.last)
    return [chunk for chunk in found if chunk.rid == rid]


def text_of(received: list[Received], rid: int) -> str:
    """The answer's whole text."""
    return "".join(chunk.text for chunk in chunks_of(received, rid))
