"""Judges every answer as it comes, token by token, and every error by whether a fault of this run can have caused it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec

from zmqserve.messages import Cancel, Chunk, Details, Done, Embed, Embedding, Generate, Peek, Tokens

from .answers import Expected, answer_to, vectors_for, words_of
from .causes import Chronicle, unexplained
from .load import Plan

if TYPE_CHECKING:
    from zmqserve.call import Call

    from .clients import ClientNode
    from .sockets import DealerSocket
    from .world import World

OVERDUE_S = 2.5
"""How long after its deadline a request may still be open at a client that runs: its grace for the controller's word, and the way."""
ASKS = range(2, 8)
ENDS = range(38, 47)
"""Tags of messages that begin and end a request."""

_peek = msgspec.msgpack.Decoder(Peek).decode


class Violation(AssertionError):
    """What must never be. It ends the run."""


class Ask:
    """One request of a client: what was asked, what has come of its answer and how it ended. Times are the world's."""

    __slots__ = (
        "call",
        "cancelled",
        "client",
        "end",
        "ended_s",
        "expected",
        "ids",
        "kind",
        "life",
        "next_seq",
        "opened_s",
        "plan",
        "text",
    )

    def __init__(self, plan: Plan, client: ClientNode, now: float) -> None:
        self.plan = plan
        self.client = client
        self.life = client.life
        self.kind = type(plan.request).__name__
        self.opened_s = now
        self.call: Call | None = None
        self.expected: Expected | None = answer_to(plan.request) if isinstance(plan.request, Generate) else None
        self.ids = self.text = self.next_seq = 0
        self.cancelled = False
        self.end: object = None
        self.ended_s: float | None = None

    def __repr__(self) -> str:
        return f"{self.kind} #{self.plan.request.rid & 0xFFFF:04x} of {self.client.name}, asked at {self.opened_s:.3f}"


class Oracle:
    """Knows all requests of a run. `outcomes` counts how they ended."""

    def __init__(self, world: World, chronicle: Chronicle) -> None:
        self.world = world
        self.chronicle = chronicle
        self.outcomes: Counter[str] = Counter()
        self.joins = 0
        self.open: dict[Ask, None] = {}
        self._due: Counter[tuple[DealerSocket, int]] = Counter()

    def __repr__(self) -> str:
        return f"Oracle({len(self.open)} open, {dict(self.outcomes)})"

    # --- what clients tell

    def opened(self, ask: Ask) -> None:
        self.open[ask] = None

    def asked(self, dealer: DealerSocket, payload: bytes) -> None:
        """A client has sent a message."""
        if _tag(payload) in ASKS:
            rid = _peek(payload).rid
            self._due[dealer, rid] += 1

    def told(self, dealer: DealerSocket, payload: bytes) -> None:
        """A message came to a client: over one connection, each time that it was sent, a request ends once."""
        if _tag(payload) in ENDS:
            rid = _peek(payload).rid
            self._due[dealer, rid] -= 1
            if self._due[dealer, rid] < 0:
                raise Violation(f"request #{rid & 0xFFFF:04x} of {dealer.host.name} was ended twice")

    def read(self, ask: Ask, chunk: Chunk) -> None:
        """A caller took a chunk."""
        expected = ask.expected
        if expected is None:
            raise self._wrong(ask, f"got {chunk!r}")
        if chunk.seq != ask.next_seq:
            raise self._wrong(ask, f"got seq {chunk.seq} after {ask.next_seq - 1}")
        if expected.token_ids[ask.ids : ask.ids + len(chunk.token_ids)] != chunk.token_ids:
            raise self._wrong(ask, f"got ids {chunk.token_ids.hex()} at token {ask.ids // 4}")
        if not expected.text.startswith(chunk.text, ask.text):
            raise self._wrong(ask, f"got {chunk.text!r} at character {ask.text} of {expected.text!r}")
        ask.next_seq += 1
        ask.ids += len(chunk.token_ids)
        ask.text += len(chunk.text)

    def ended(self, ask: Ask, end: Any) -> None:
        """A caller saw the end."""
        if ask.ended_s is not None:
            raise self._wrong(ask, f"ended as {ask.end!r}, and again as {end!r}")
        ask.end, ask.ended_s = end, self.world.now
        del self.open[ask]
        plan = ask.plan
        self.world.note(f"{ask!r} ended: {type(end).__name__} {getattr(end, 'message', '')}")
        self._check_time(ask)
        if isinstance(end, Cancel):
            if not ask.cancelled:
                raise self._wrong(ask, "was cancelled by nobody")
            self.outcomes["cancelled"] += 1
        elif isinstance(end, Exception):
            why = unexplained(ask, end, self.chronicle)
            if why:
                raise self._wrong(ask, f"ended as {type(end).__name__} ({end}): {why}")
            self.outcomes[type(end).__name__] += 1
        else:
            if plan.poison:
                raise self._wrong(ask, "was answered, and should have killed its worker")
            self._check_answer(ask, end)
            self.outcomes["whole and exact"] += 1
            self.joins += getattr(ask.call, "resumed", 0)

    def forgotten(self, ask: Ask) -> None:
        """Its client died."""
        del self.open[ask]
        self.outcomes["client died"] += 1

    # --- what must hold

    def _check_time(self, ask: Ask) -> None:
        timeout_s = ask.plan.timeout_s
        late = timeout_s is not None and self.world.now > ask.opened_s + timeout_s + OVERDUE_S
        if late and not self.chronicle.during({"client"}, ask.opened_s, self.world.now, ask.client.name):
            raise self._wrong(ask, f"ended {self.world.now - ask.opened_s:.2f} s after it was asked, its deadline was {timeout_s:.2f} s")

    def _check_answer(self, ask: Ask, end: Any) -> None:
        request = ask.plan.request
        if isinstance(end, Done) and ask.expected is not None:
            expected = ask.expected
            if ask.plan.collect and ask.call is not None:
                received = ask.call.received[0]
                ids, text = bytes(received.token_ids), "".join(received.texts)
            else:
                ids, text = expected.token_ids[: ask.ids], expected.text[: ask.text]
            if (ids, text) != (expected.token_ids, expected.text):
                raise self._wrong(ask, f"ended with {len(ids) // 4} tokens and {text!r}; expected {expected}")
            usage = (end.usage.prompt_tokens, end.usage.completion_tokens)
            if end.finish_reasons != [expected.reason] or usage != (expected.prompt_tokens, len(expected.token_ids) // 4):
                raise self._wrong(ask, f"ended with {end!r}; expected {expected}")
        elif isinstance(end, Embedding) and isinstance(request, Embed):
            if end.data != vectors_for(request):
                raise self._wrong(ask, "got wrong vectors")
        elif isinstance(end, Tokens) and ask.kind == "CountTokens":
            if end.count != len(words_of(request)):  # type: ignore[arg-type]
                raise self._wrong(ask, f"was told {end.count} tokens")
        elif not (isinstance(end, Details) and ask.kind == "ModelDetails" and end.card.name == request.model):
            raise self._wrong(ask, f"ended with {end!r}")

    def _wrong(self, ask: Ask, what: str) -> Violation:
        return Violation(f"{ask!r}, {what}")


def _tag(payload: bytes) -> int:
    """The first element of a message: behind one byte, or three where it has more than 15 elements."""
    return payload[1] if payload[0] < 0xA0 else payload[3]
