"""A scripted controller, its client side only: a ROUTER on a thread of its own. The test says what it answers, and when.

Hello and Ping are answered by themselves, as long as `greets` and `pongs` say so. Everything else goes to `script`, if there is one
(it returns the answers), and to the test, which gets it from `expect` and answers with `send`.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from zmqserve import messages as m

PATIENCE_S = 10.0
"""A message that does not come within this fails its test."""

M = TypeVar("M")
Script = Callable[[Any], Iterable[Any]]
_decode = m.decoder(m.FromClient).decode


class Broker:
    """`endpoint` is where it listens. `limits`, `protocol` and `controller` are what it says in its Welcome."""

    def __init__(
        self,
        script: Script | None = None,
        *,
        endpoint: str = "tcp://127.0.0.1:*",
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        controller: str = "fake",
        protocol: int = m.PROTOCOL,
        limits: m.Limits | None = None,
        greets: bool = True,
        pongs: bool = True,
        linger_ms: int = 0,
    ) -> None:
        self.controller, self.protocol, self.limits = controller, protocol, limits or m.Limits()
        self.greets, self.pongs = greets, pongs
        self.unknown: list[int] = []
        self.deaf_to: set[bytes] = set()
        """Peers whose messages are not looked at: as if their connections led nowhere."""
        self.last_peer = b""
        self.pings: queue.SimpleQueue[m.Ping] = queue.SimpleQueue()
        self._script = script
        self._context = context or zmq.Context()
        self._owns_context = context is None
        self._router = self._context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, linger_ms)
        self._router.setsockopt(zmq.SNDHWM, 0)  # a ROUTER drops what a peer does not take in time
        self._router.bind(endpoint)
        self.endpoint = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind(f"inproc://bell-{id(self)}")
        self._rope = self._context.socket(zmq.PAIR)
        self._rope.connect(f"inproc://bell-{id(self)}")
        self._orders: queue.SimpleQueue[tuple[bytes | None, bytes]] = queue.SimpleQueue()
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._peer_of: dict[int, bytes] = {}
        self._thread = threading.Thread(target=self._run, name="fake-broker")
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def expect(self, kind: type[M]) -> M:
        """The next message, which must be of this kind."""
        message = self._arrived.get(timeout=PATIENCE_S)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def nothing_arrived(self) -> bool:
        """Whether all that had come was expected."""
        return self._arrived.empty()

    def send(self, message: Any) -> None:
        """Send a message, or bytes as they are: to the client of its rid, else to the last one that was heard."""
        rid = getattr(message, "rid", 0)
        payload = message if isinstance(message, bytes) else m.encode(message)
        self._orders.put((self._peer_of.get(rid), payload))
        self._rope.send(b"")

    def close(self) -> None:
        if self._thread.is_alive():
            self._rope.send(b"end")
            self._thread.join(PATIENCE_S)
            for socket in (self._router, self._bell, self._rope):
                socket.close()
            if self._owns_context:
                self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._bell, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            if self._router in ready:
                peer, payload = self._router.recv_multipart()
                self._take(peer, payload)
            if self._bell in ready:
                if self._bell.recv() == b"end":
                    return
                target, payload = self._orders.get()
                self._router.send_multipart([target or self.last_peer, payload])

    def _take(self, peer: bytes, payload: bytes) -> None:
        if peer in self.deaf_to:
            return
        self.last_peer = peer
        message = _decode(payload)
        if isinstance(message, m.Hello):
            if self.greets:
                self._answer(peer, m.Welcome(self.protocol, self.controller, self.limits, "0.0"))
        elif isinstance(message, m.Ping):
            self.pings.put(message)
            if self.pongs:
                self._answer(peer, m.Pong(self.controller, self.unknown))
        else:
            self._peer_of[message.rid] = peer
            for answer in self._script(message) if self._script else ():
                self._answer(peer, answer)
            self._arrived.put(message)

    def _answer(self, peer: bytes, message: Any) -> None:
        self._router.send_multipart([peer, message if isinstance(message, bytes) else m.encode(message)])


USAGE = m.Usage(3, 2)
TIMINGS = m.Timings("w1", 0.1, 0.2, 0.3)


def chunk(rid: int, seq: int, text: str | None = None, *, index: int = 0) -> m.Chunk:
    """Chunk `seq`: the word ``t<seq>`` and the id `seq`."""
    return m.Chunk(rid, seq, index, f"t{seq} " if text is None else text, m.pack_ids([seq]))


def done(rid: int, seq: int, reason: str = "stop", last: m.Chunk | None = None) -> m.Done:
    return m.Done(rid, seq, [reason], USAGE, TIMINGS, last)


def echo(message: Any) -> list[Any]:
    """A script: an answer of as many words as `max_tokens` says, the last one in Done."""
    if not isinstance(message, m.Generate):
        return []
    count = message.params.max_tokens or 3
    rid = message.rid
    return [*(chunk(rid, seq) for seq in range(count - 1)), done(rid, count - 1, "length", chunk(rid, count - 1))]
