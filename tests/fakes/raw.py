"""A client and a worker that are plain DEALER sockets: they say whatever a test lets them say, in however many frames."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from zmqserve import messages as m

PATIENCE_MS = 20_000

_to_client = m.decoder(m.ToClient)
_head = m.decoder(m.ControllerHead)


class Raw:
    """A DEALER that is connected to an endpoint."""

    def __init__(self, endpoint: str, *, reads: int = 0, identity: bytes = b"") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.setsockopt(zmq.RCVHWM, reads)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.socket.close()
        self._context.term()

    def send(self, *frames: Any) -> None:
        """Frames as they are, or messages."""
        self.socket.send_multipart([each if isinstance(each, bytes) else m.encode(each) for each in frames])

    def frames(self, within_ms: int = PATIENCE_MS) -> list[bytes]:
        """The next message."""
        assert self.socket.poll(within_ms), "nothing came"
        return self.socket.recv_multipart()

    def silent(self, for_ms: int = 200) -> bool:
        """Whether nothing comes for a while."""
        return not self.socket.poll(for_ms)


class RawClient(Raw):
    """Speaks to a controller's client side."""

    def answer(self) -> Any:
        """The next message, which must be one of the protocol; of several frames only the last counts."""
        return _to_client.decode(self.frames()[-1])

    def ends(self, count: int) -> list[Any]:
        """What ends so many requests, in the order in which they end; chunks are dropped."""
        ends: list[Any] = []
        while len(ends) < count:
            message = self.answer()
            if not isinstance(message, m.Chunk | m.Chunks):
                ends.append(message)
        return ends

    def end(self, rid: int) -> Any:
        """What ends this request, the only one that is open."""
        (end,) = self.ends(1)
        assert end.rid == rid, end
        return end

    def ping(self) -> list[Any]:
        """Wait until all that was sent before is done; returns what came meanwhile."""
        self.send(m.Ping(60_000))
        came: list[Any] = []
        while True:
            message = self.answer()
            if isinstance(message, m.Pong):
                return came
            came.append(message)


class RawWorker(Raw):
    """Speaks to a controller's worker side. `epoch` is that of its last WELCOME."""

    epoch = 0

    def say(self, kind: int, payload: Any = b"", *, epoch: int | None = None, **fields: Any) -> None:
        """A message with the present epoch."""
        self.send(m.WorkerHead(kind, self.epoch if epoch is None else epoch, **fields), payload)

    def heard(self, wanted: Callable[[m.ControllerHead], bool]) -> tuple[m.ControllerHead, bytes]:
        """The next message for which that is so; those before are dropped."""
        while True:
            head, payload = self.frames()
            message = _head.decode(head)
            if wanted(message):
                return message, payload

    def register(self, name: str, *models: str, slots: int = 1, ttl_ms: int = 600_000, verbs: tuple[str, ...] = ("generate",)) -> None:
        """Register, and be welcomed. It need not beat: its ttl is long."""
        self.epoch = self._answer(m.WELCOME, self.offer(name, *models, slots=slots, ttl_ms=ttl_ms, verbs=verbs))[0].epoch

    def refused(self, name: str, *models: str, **offer: Any) -> m.Refused:
        """Try to register, and be told why not."""
        return msgspec.msgpack.decode(self._answer(m.REFUSED, self.offer(name, *models, **offer))[1], type=m.Refused)

    def _answer(self, kind: int, ready: m.Ready) -> tuple[m.ControllerHead, bytes]:
        """What is answered to READY, which must be of this kind; where it is not known yet who says it, it is said once more."""
        number = 0
        while True:
            self.say(m.READY, ready, epoch=number)
            head, payload = self.heard(lambda head: head.kind in (kind, m.REREGISTER))
            if head.kind == kind:
                return head, payload
            number = head.epoch

    @staticmethod
    def offer(name: str, *models: str, slots: int = 1, ttl_ms: int = 600_000, verbs: tuple[str, ...] = ("generate",)) -> m.Ready:
        cards = [m.ModelCard(model, verbs=list(verbs)) for model in models]
        return m.Ready(m.PROTOCOL, name, "raw", "ready", cards, slots, 1.0, ttl_ms)

    def request(self) -> m.ControllerHead:
        """The next request's head."""
        return self.heard(lambda head: head.kind == m.REQUEST)[0]
