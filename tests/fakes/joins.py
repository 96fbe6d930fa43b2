"""Answers cut in two and joined again, over the wire of one worker: the second part is asked for with a resume."""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

import msgspec

from zmqserve import messages as m
from zmqserve.params import SamplingParams

from .controller import FakeController, Received, chunks_of

PATIENCE_S = 60.0
AT_ONCE = 8
"""Requests under way together: fewer than any worker here has slots."""


class Piece(NamedTuple):
    """A chunk, without what differs from ask to ask."""

    seq: int
    text: str
    ids: tuple[int, ...]


class Answer(NamedTuple):
    """All of it. `seq` is its Done's."""

    pieces: list[Piece]
    reasons: list[str]
    usage: m.Usage
    seq: int

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def ids(self) -> list[int]:
        return [token_id for piece in self.pieces for token_id in piece.ids]

    def resume(self, cut: int, *, withheld: int = 0) -> m.Resume:
        """What a client holds after `cut` chunks, of which the last `withheld` characters are missing."""
        pieces = self.pieces[:cut]
        ids = [token_id for piece in pieces for token_id in piece.ids]
        return m.Resume(m.pack_ids(ids), sum(len(piece.text) for piece in pieces) - withheld, cut)


class Asker:
    """Asks the worker that is registered with `controller` for its first model."""

    def __init__(self, controller: FakeController, ready: m.Ready) -> None:
        self.controller = controller
        self.card = ready.models[0]
        self._rids = count(1)

    def send(self, request: m.Generate) -> int:
        """Ask; returns the rid. A resume asks for the model's fingerprint, unless the request does so itself."""
        rid = next(self._rids)
        fingerprint = request.fingerprint or (self.card.fingerprint if request.resume is not None else None)
        request = msgspec.structs.replace(request, rid=rid, model=self.card.name, fingerprint=fingerprint)
        self.controller.request(request)
        return rid

    def received(self, request: m.Generate) -> list[Received]:
        """Every message of the answer."""
        rid = self.send(request)
        return self.controller.answer_of(rid, timeout_s=PATIENCE_S)

    def answer(self, request: m.Generate) -> Answer:
        """The whole answer, or the rest of it."""
        return self._answer(self.received(request))

    def answers(self, requests: list[m.Generate]) -> list[Answer]:
        """The same of several, which are asked at once; they must fit into the worker's slots."""
        rids = [self.send(request) for request in requests]
        got: list[Received] = []
        ends: dict[int, list[Received]] = {}
        while len(ends) < len(rids):
            got.append(self.controller.expect(m.FIRST, m.MORE, m.DONE, m.FAILED, timeout_s=PATIENCE_S))
            if got[-1].head.kind in (m.DONE, m.FAILED):
                ends[got[-1].head.rid] = list(got)
        return [self._answer(ends[rid]) for rid in rids]

    def _answer(self, got: list[Received]) -> Answer:
        done = got[-1].message
        assert isinstance(done, m.Done), done
        pieces = [Piece(c.seq, c.text, tuple(m.unpack_ids(c.token_ids))) for c in chunks_of(got, done.rid)]
        # What an engine still had of the prompt says nothing of the answer.
        usage = msgspec.structs.replace(done.usage, cached_tokens=0)
        return Answer(pieces, done.finish_reasons, usage, done.seq)

    def failure(self, request: m.Generate) -> m.Error:
        """The error that ends it before anything else is said."""
        (got,) = self.received(request)
        assert isinstance(got.message, m.Error), got.message
        return got.message

    def check_joins(self, request: m.Generate) -> Answer:
        """Cut the answer after each of its chunks but the last: what comes then must be what came the first time, chunk by chunk."""
        whole = self.answer(request)
        assert len(whole.pieces) > 2, "nothing to cut"
        for cuts in batched(range(1, len(whole.pieces)), AT_ONCE):
            rests = self.answers([msgspec.structs.replace(request, resume=whole.resume(cut)) for cut in cuts])
            for cut, rest in zip(cuts, rests, strict=True):
                assert rest == whole._replace(pieces=whole.pieces[cut:]), f"cut after {cut} chunks"
        return whole


def batched(cuts: range, most: int) -> list[range]:
    """Parts of so many at most."""
    return [cuts[start : start + most] for start in range(0, len(cuts), most)]


def asked(
    prompt: str | list[int] | list[m.ChatMessage], *, resume: m.Resume | None = None, stream: bool = True, **params: Any
) -> m.Generate:
    """A Generate; its rid and model are the Asker's affair."""
    kinds: dict[str, Any] = {}
    if isinstance(prompt, str):
        kinds["prompt"] = prompt
    elif prompt and isinstance(prompt[0], m.ChatMessage):
        kinds["messages"] = prompt
    else:
        kinds["token_ids"] = m.pack_ids([i for i in prompt if isinstance(i, int)])
    return m.Generate(1, "m", stream=stream, params=SamplingParams(**params), resume=resume, **kinds)
