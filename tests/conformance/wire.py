"""A client without SDK, for what an SDK does not let its caller do: resume by hand, send what is wrong, see a cancelled end."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

import msgspec
import zmq

from zmqserve import messages as m
from zmqserve.params import SamplingParams
from zmqserve.requests import Prompt, Routing, generate

PATIENCE_MS = 60_000

_answers = m.decoder(m.ToClient)


class Piece(NamedTuple):
    """A chunk, without what differs from ask to ask. `choice`: its index."""

    seq: int
    choice: int
    text: str
    ids: tuple[int, ...]


class Received(NamedTuple):
    """All that came for one request. `seq` is its Done's; `fingerprint` came with the first chunk."""

    pieces: list[Piece]
    reasons: list[str]
    usage: m.Usage
    seq: int
    fingerprint: str | None

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.ids]

    def resume(self, cut: int) -> m.Resume:
        """What a client holds after `cut` chunks."""
        pieces = self.pieces[:cut]
        ids = [token_id for piece in pieces for token_id in piece.ids]
        return m.Resume(m.pack_ids(ids), sum(len(piece.text) for piece in pieces), cut)


class Wire:
    """One DEALER that asks for `model`."""

    def __init__(self, endpoint: str, model: str) -> None:
        self._model = model
        self._rids = count(1)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def send(self, message: Any) -> None:
        """Send a message, or anything else that msgpack can say."""
        self._socket.send(m.encode(message))

    def next(self, timeout_ms: int = PATIENCE_MS) -> Any:
        """The next message. AssertionError when there is none in time."""
        assert self._socket.poll(timeout_ms), "no message came"
        return _answers.decode(self._socket.recv())

    def waiting(self) -> bool:
        """Whether a message lies here unread."""
        return bool(self._socket.poll(0))

    def request(
        self, prompt: Prompt, *, stream: bool = True, resume: m.Resume | None = None, fingerprint: str | None = None, **params: Any
    ) -> m.Generate:
        """A Generate with a rid of its own."""
        made = generate(self._model, prompt, SamplingParams(**params), Routing(None))
        return msgspec.structs.replace(made, rid=next(self._rids), stream=stream, resume=resume, fingerprint=fingerprint)

    def ask(self, *requests: m.Generate) -> list[Received | m.Error]:
        """Ask all at once and read to their ends."""
        for request in requests:
            self.send(request)
        return self.rest(*(request.rid for request in requests))

    def rest(self, *rids: int, chunks: Sequence[Any] = ()) -> list[Received | m.Error]:
        """Read to the ends of these requests; `chunks` have been read of them."""
        come: dict[int, list[Any]] = {rid: [chunk for chunk in chunks if chunk.rid == rid] for rid in rids}
        ends: dict[int, Received | m.Error] = {}
        while len(ends) < len(rids):
            message = self.next()
            for chunk in chunks_of(message):
                come[chunk.rid].append(chunk)
            if isinstance(message, m.Error):
                ends[message.rid] = message
            elif isinstance(message, m.Done):
                ends[message.rid] = received(come[message.rid], message)
        return [ends[rid] for rid in rids]


def received(chunks: Sequence[Any], done: m.Done) -> Received:
    """What a whole answer was."""
    pieces = [Piece(chunk.seq, chunk.index, chunk.text, tuple(m.unpack_ids(chunk.token_ids))) for chunk in chunks]
    fingerprint = next((chunk.fingerprint for chunk in chunks if isinstance(chunk, m.FirstChunk)), None)
    return Received(pieces, done.finish_reasons, done.usage, done.seq, fingerprint)


def chunks_of(message: Any) -> list[Any]:
    """The chunks in a message."""
    if isinstance(message, m.Chunk):
        return [message]
    if isinstance(message, m.Chunks):
        return list(message.chunks)
    return [message.last] if isinstance(message, m.Done) and message.last is not None else []
