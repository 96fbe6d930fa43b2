"""A client's side of the protocol, without sockets, threads or a clock: `now` and messages are passed in, a Wire is written to.

Requests opened while the controller is being greeted wait for its Welcome: nothing is sent to one that nobody has heard.
The owner calls everything here under one lock, and `tick` only after it has read all that had arrived.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from .call import ANSWERS, Call, ClientRequest, weight
from .errors import (
    ConnectionFailed,
    DeadlineExceeded,
    GoingAway,
    InvalidParameter,
    MalformedMessage,
    SlowConsumer,
    StreamGap,
    ZmqserveError,
    from_wire,
)
from .liveness import Agenda
from .messages import (
    Cancel,
    Chunk,
    Chunks,
    Done,
    Drain,
    Error,
    FirstChunk,
    GoAway,
    Limits,
    ListModels,
    Peek,
    Pong,
    Status,
    ToClient,
    Welcome,
    decoder,
    encode,
)
from .peer import Peer, State, Wire

DEADLINE_GRACE_S = 1.0
"""How long after a request's deadline its end may still come. The controller enforces deadlines; this is for one that does not."""

_decode = decoder(ToClient).decode
_peek = decoder(Peek).decode


class Session:
    """Open requests of one client, with one controller at a time of those at `endpoints`.

    ttl_s: after so much silence while requests are open the controller is lost; also what this client declares for itself.
    connect_timeout_s: how long each endpoint may take to answer Hello.
    buffer_bytes: what may lie unread in one stream; beyond it, it ends as SlowConsumer. A chunk alone may be larger.
    `strays` counts messages for requests that are not open (late ones, mostly), `malformed` those that are not the protocol.
    """

    def __init__(
        self,
        wire: Wire,
        endpoints: Sequence[str],
        *,
        name: str = "",
        ttl_s: float = 3.0,
        connect_timeout_s: float = 0.75,
        buffer_bytes: int = 16 * 2**20,
    ) -> None:
        self.calls: dict[int, Call] = {}
        self.strays = 0
        self.malformed = 0
        self._wire = wire
        self._buffer_bytes = buffer_bytes
        self._agenda = Agenda()
        self._peer = Peer(self, wire, self._agenda, endpoints, name=name, ttl_s=ttl_s, connect_timeout_s=connect_timeout_s)
        self._outbox: deque[tuple[Call | None, bytes]] = deque()
        self._on: dict[type, Callable[[float, Any], None]] = {
            Pong: self._on_pong,
            Welcome: self._peer.on_welcome,
            GoAway: self._on_go_away,
            Error: self._on_error,
        }

    def __repr__(self) -> str:
        return f"Session({self._peer!r}, open={len(self.calls)})"

    @property
    def controller(self) -> str:
        """The controller's id; empty before its first Welcome."""
        return self._peer.controller

    @property
    def limits(self) -> Limits:
        """What the controller takes, from its Welcome."""
        return self._peer.limits

    @property
    def state(self) -> State:
        """Whether there is a controller."""
        return self._peer.state

    # --- what the caller does ------------------------------------------------------------------

    def open(self, now: float, request: ClientRequest, *, timeout_s: float | None = None, collect: bool = False) -> Call:
        """Send a request, now or as soon as the controller is there. `collect`: no chunks, only the whole.

        Raises InvalidParameter when the message cannot be sent at all, GoingAway when the controller is leaving.
        """
        try:
            payload = encode(request)
        except UnicodeEncodeError as error:
            what = f"a text holds {error.object[error.start : error.end]!r}, which is no character (a lone surrogate)"
            raise InvalidParameter(what, data={"parameter": "prompt"}) from None
        peer, alone = self._peer, not self.calls
        if peer.state is State.OPEN:
            self._check_size(payload)
            if peer.leaving is not None and alone:
                peer.forget()
            elif peer.leaving is not None:
                raise GoingAway(f"the controller is leaving ({peer.leaving}) and takes no new requests; try again when it is back")
        call = Call(request, collect=collect)
        self.calls[call.rid] = call
        if timeout_s is not None:
            # What says its deadline to nobody is ended here alone.
            grace_s = 0.0 if isinstance(request, ListModels | Status | Drain) else DEADLINE_GRACE_S
            call.timer = self._agenda.at(now + timeout_s + grace_s, lambda _now: self._overdue(call, timeout_s))
        self._outbox.append((call, payload))
        try:
            self._begin(now, call, alone=alone)
        except BaseException:
            self.cancel(call)
            raise
        return call

    def cancel(self, call: Call) -> None:
        """Give a request up; harmless when it has ended. What still comes for it is dropped."""
        self._drop(call, Cancel(call.rid))

    def close(self) -> None:
        """Give up all requests. Their readers get an error, since they did not ask for it."""
        for call in list(self.calls.values()):
            self._drop(call, closed())
        self._peer.forget()
        self._outbox.clear()

    # --- what the owner of the socket feeds it with --------------------------------------------

    def on_message(self, now: float, payload: bytes) -> None:
        """Take a message that has arrived."""
        try:
            message = _decode(payload)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            self._on_garbage(payload, error)
            return
        self._peer.heard(now)
        kind = type(message)
        if kind is Chunks:
            for chunk in message.chunks:
                self._on_chunk(chunk)
        elif kind is FirstChunk:
            self._on_chunk(message)
        elif (handle := self._on.get(kind)) is not None:
            handle(now, message)
        else:
            self._on_end(message)

    def flush(self) -> None:
        """Send what waits, as far as the wire takes it: to be called when it may take something again."""
        self._peer.flush()
        if self._peer.state is not State.OPEN:
            return
        outbox = self._outbox
        while outbox:
            call, payload = outbox[0]
            if call is None or call.end is None:
                if not self._wire.send(payload):
                    return
                if call is not None:
                    call.sent = True
                    call.wake()
            outbox.popleft()

    @property
    def blocked(self) -> bool:
        """Whether `flush` has something to do."""
        return self._peer.blocked or (bool(self._outbox) and self._peer.state is State.OPEN)

    def tick(self, now: float) -> None:
        """Do what is due: Pings, deadlines, timeouts."""
        self._agenda.run(now)

    def next_s(self) -> float | None:
        """When `tick` is due next; None when nothing is awaited."""
        return self._agenda.next_s()

    # --- what the peer tells -------------------------------------------------------------------

    def on_open(self, _now: float) -> None:
        for call, payload in list(self._outbox):
            if call is not None:
                try:
                    self._check_size(payload)
                except InvalidParameter as error:
                    self._fail(call, error)
        self.flush()

    def on_lost(self, error: Callable[[], ZmqserveError]) -> None:
        self._outbox.clear()
        for call in list(self.calls.values()):
            self._fail(call, error())

    def to_ping(self) -> list[int] | None:
        if not self.calls:
            return None
        sent = [call for call in self.calls.values() if call.sent]
        for call in sent:
            call.pinged = True
        return [call.rid for call in sent]

    def _begin(self, now: float, call: Call, *, alone: bool) -> None:
        """Send what was opened, or greet the controller first when it is not certain to be there."""
        peer = self._peer
        if not alone:
            self.flush()
        elif peer.state is not State.OPEN:
            peer.greet(now, fresh=True)
        elif peer.stale(now):
            peer.greet(now, fresh=False)
        else:
            peer.watch(now)
            self.flush()
            if not call.sent:
                # With nothing else under way the pipe cannot be full: the connection is gone.
                peer.greet(now, fresh=True)

    # --- messages ------------------------------------------------------------------------------

    def _on_chunk(self, chunk: Chunk) -> None:
        call = self.calls.get(chunk.rid)
        if call is None:
            self.strays += 1
        elif chunk.seq != call.next_seq:
            self._gap(call, chunk.seq)
        elif not 0 <= chunk.index < len(call.received) or len(chunk.token_ids) & 3:
            self._drop(call, MalformedMessage(f"chunk {chunk.seq} is of no such choice ({chunk.index}), or its token ids are cut"))
        elif call.chunks and call.unread_bytes + weight(chunk) > self._buffer_bytes:
            unread = f"{len(call.chunks)} chunks ({call.unread_bytes} bytes) of this stream wait to be read"
            self._drop(call, SlowConsumer(f"{unread}, the limit is {self._buffer_bytes}", data={"limit_bytes": self._buffer_bytes}))
        else:
            call.put(chunk)

    def _on_end(self, message: Any) -> None:
        """Done, Embedding and the like: exactly one ends a request."""
        call = self.calls.get(message.rid)
        if call is None:
            self.strays += 1
            return
        if type(message) is not ANSWERS[type(call.request)]:
            what = f"a {type(call.request).__name__} request was answered with {type(message).__name__}"
            self._drop(call, MalformedMessage(what))
            return
        if type(message) is Done:
            last = message.last
            if not message.finish_reasons or (last is not None and (last.rid, last.seq) != (message.rid, message.seq)):
                self._drop(call, MalformedMessage("a Done without finish reasons, or with another request's chunk"))
            elif last is not None:
                self._on_chunk(last)
            elif message.seq != call.next_seq:
                self._gap(call, message.seq)
        if self.calls.pop(call.rid, None) is not None:
            call.finish(message)

    def _on_error(self, _now: float, message: Error) -> None:
        def typed() -> ZmqserveError:
            return from_wire(message.code, message.message, message.retryable, message.retry_after_ms, message.data)

        call = self.calls.get(message.rid)
        if call is not None:
            self._fail(call, typed())
        elif message.rid == 0 and self._peer.state is State.GREETING:
            self._peer.on_refusal(typed)
        else:
            self.strays += 1

    def _on_pong(self, _now: float, pong: Pong) -> None:
        lost = self._peer.on_pong(pong)
        for rid in pong.unknown:
            call = self.calls.get(rid)
            # One that was sent after the Ping is not known to its Pong.
            if call is not None and call.pinged:
                self._fail(call, lost())

    def _on_go_away(self, _now: float, message: GoAway) -> None:
        self._peer.leaving = message.why

    def _on_garbage(self, payload: bytes, error: Exception) -> None:
        """Count it. When it names an open request, that one ends; otherwise a lost chunk shows as a gap, and a lost end by Pong."""
        self.malformed += 1
        try:
            call = self.calls.get(_peek(payload).rid)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return
        if call is not None:
            self._drop(call, MalformedMessage(f"the controller's answer is not the protocol: {error}"))

    # --- ends ----------------------------------------------------------------------------------

    def _gap(self, call: Call, seq: int) -> None:
        what = "a chunk came twice" if seq < call.next_seq else "a chunk is missing"
        data = {"expected": call.next_seq, "got": seq}
        self._drop(call, StreamGap(f"{what}: expected seq {call.next_seq}, got {seq}", data=data))

    def _overdue(self, call: Call, timeout_s: float) -> None:
        message = f"no end came within the deadline of {timeout_s:g} s"
        self._drop(call, DeadlineExceeded(message, data={"timeout_s": timeout_s}))

    def _fail(self, call: Call, error: ZmqserveError) -> None:
        """End a request that the controller does not hold (any more)."""
        if self.calls.pop(call.rid, None) is not None:
            call.finish(error)

    def _drop(self, call: Call, end: Cancel | ZmqserveError) -> None:
        """End a request that the controller may still hold: tell it."""
        if self.calls.pop(call.rid, None) is None:
            return
        if call.sent:
            cancel = encode(Cancel(call.rid))
            if self._outbox or not self._wire.send(cancel):
                self._outbox.append((None, cancel))
        call.finish(end)

    def _check_size(self, payload: bytes) -> None:
        limit = self._peer.limits.message_bytes
        if 0 < limit < len(payload):
            message = f"the request is {len(payload)} bytes, the controller takes at most {limit}"
            raise InvalidParameter(message, data={"parameter": "prompt", "bytes": len(payload), "limit_bytes": limit})


def closed() -> ZmqserveError:
    """The error of a request whose client was closed under it, and of one asked of a closed client."""
    error = ConnectionFailed("this client is closed; make a new one")
    error.retryable = False
    return error
