"""A client's side of the protocol, without sockets, threads or a clock: `now` and messages are passed in, a Wire is written to.

Requests opened while the controller is being greeted wait for its Welcome: nothing is sent to one that nobody has heard. When it is
lost, what it held waits for the next one likewise (recovery.py says what is sent again).
The owner calls everything here under one lock, and `tick` and `on_disconnected` only after it has read all that had arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from random import Random
from typing import Any

import msgspec

from .call import ANSWERS, Call, ClientRequest, gap
from .draining import Draining
from .errors import ConnectionFailed, DeadlineExceeded, MalformedMessage, Unauthenticated, ZmqserveError, from_wire
from .failover import Failover
from .liveness import Agenda, Timer
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
)
from .outgoing import encoded
from .peer import State, Wire
from .requests import check_timeout

DEADLINE_GRACE_S = 1.0
"""How long after a request's deadline its end may still come. The controller enforces deadlines; this is for one that does not."""

_decode = decoder(ToClient).decode
_peek = decoder(Peek).decode


class Session:
    """Open requests of one client, with one controller at a time of those at `endpoints`.

    ttl_s: what this client declares for itself: the controller gives it up after so much silence. It judges the controller by the ttl
    that that one tells, or by this where it tells none.
    connect_timeout_s: how long each endpoint may take to answer Hello.
    failover_s: how long a request that was sent looks for another controller, or worker, when it has lost its own.
    buffer_bytes: what may lie unread in one stream; beyond it, it ends as SlowConsumer. A chunk alone may be larger.
    `strays` counts messages for requests that are not open (late ones, mostly), `malformed` those that are not the protocol.
    """

    def __init__(
        self,
        wire: Wire,
        endpoints: Sequence[str],
        *,
        random: Random,
        name: str = "",
        ttl_s: float = 3.0,
        connect_timeout_s: float = 0.75,
        failover_s: float = 10.0,
        buffer_bytes: int = 16 * 2**20,
    ) -> None:
        self.strays = 0
        self.malformed = 0
        self._buffer_bytes = buffer_bytes
        self._drainings: list[Draining] = []
        self._closes: Timer | None = None
        self._agenda = Agenda()
        self._failover = Failover(
            wire,
            self._agenda,
            endpoints,
            name=name,
            ttl_s=ttl_s,
            connect_timeout_s=connect_timeout_s,
            failover_s=failover_s,
            random=random,
        )
        self.calls = self._failover.calls
        self._peer = self._failover.peer
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

    def open(
        self,
        now: float,
        request: ClientRequest,
        *,
        timeout_s: float | None = None,
        collect: bool = False,
        resume: bool = True,
        retries: int = 0,
        patient: bool = False,
        later: bool = False,
    ) -> Call:
        """Send a request, now or as soon as the controller is there. `collect`: no chunks, only the whole. `later`: with others, at the
        next `flush`, unless it is the only one: the wire takes several at once for little more than one.

        `resume`: an answer that has begun goes on elsewhere when it loses its worker or controller. `retries`: how often the request
        is sent again when, before its first chunk, it ends with an error that may pass. `patient`: when a controller that was there is
        not, it looks for one for `failover_s`, as one that was sent does.
        Raises InvalidParameter when the message cannot be sent at all, and ConnectionFailed after `drain`.
        """
        if self._drainings:
            raise closed()
        call = Call(request, encoded(request), collect=collect, resume=resume, retries=retries, patient=patient)
        call.deadline_s = deadline_s = None if timeout_s is None else now + timeout_s
        try:
            self._failover.begin(now, call, later=later)
        except BaseException:
            self.cancel(call)
            raise
        if timeout_s is not None and deadline_s is not None and call.end is None:
            call.timer = self._agenda.at(deadline_s, lambda now: self._on_deadline(now, call, timeout_s))
        return call

    def cancel(self, call: Call) -> None:
        """Give a request up; harmless when it has ended. What still comes for it is dropped."""
        self._failover.drop(call, Cancel(call.rid))

    def drain(self, now: float, timeout_s: float | None) -> Draining:
        """Take no new requests; those that are open may end by themselves, within `timeout_s` (None: however long that takes).

        Raises InvalidParameter for a `timeout_s` that is no time.
        """
        self.close_within(now, timeout_s)
        draining = Draining(self.calls)
        self._drainings.append(draining)
        self._failover.on_idle = self._on_idle
        return draining

    def close_within(self, now: float, timeout_s: float | None) -> bool:
        """Close after `timeout_s`, unless that is to be sooner (None: whenever it is). Returns whether this counts. Raises as `drain`."""
        within_s = check_timeout(timeout_s)
        if within_s is None or (self._closes is not None and self._closes.when_s <= now + within_s):
            return False
        if self._closes is not None:
            self._closes.cancel()
        self._closes = self._agenda.at(now + within_s, lambda _now: self.close())
        return True

    def _on_idle(self) -> None:
        for draining in self._drainings:
            draining.wake()

    def close(self) -> None:
        """Give up all requests. Their readers get an error, since they did not ask for it."""
        for draining in self._drainings:
            draining.whole = draining.whole and draining.ready
        for call in list(self.calls.values()):
            self._failover.drop(call, closed())
        self._failover.clear()

    def disinherit(self) -> None:
        """In a forked child: end all requests here, and tell nobody. They are the parent's."""
        calls = list(self.calls.values())
        self.calls.clear()
        for call in calls:
            call.waiter = None
            call.finish(inherited())

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
            self._on_chunks(message.chunks)
        elif kind is FirstChunk:
            if message.fingerprint is not None:
                self._on_first(now, message)
            self._on_chunks((message,))
        elif (handle := self._on.get(kind)) is None:
            self._on_end(now, message)
        elif self._peer.state is not State.AWAY:
            handle(now, message)
        else:
            # Of a controller that was given up.
            self.strays += 1

    def on_disconnected(self, now: float) -> None:
        """The connection has broken, and all that had come on it was read."""
        self._peer.on_disconnected(now)

    def on_shut_out(self, now: float, why: str) -> None:
        """The connection was made, and the handshake failed."""
        self._peer.on_shut_out(now, why)

    def flush(self) -> None:
        """Send what waits, as far as the wire takes it: to be called when it may take something again."""
        self._failover.flush()

    @property
    def blocked(self) -> bool:
        """Whether `flush` has something to do."""
        return self._failover.blocked

    @property
    def greets(self) -> bool:
        """Whether a Hello is under way."""
        return self._peer.state is State.GREETING

    def tick(self, now: float) -> None:
        """Do what is due: Pings, deadlines, timeouts."""
        self._agenda.run(now)

    def next_s(self) -> float | None:
        """When `tick` is due next; None when nothing is awaited."""
        return self._agenda.next_s()

    # --- messages ------------------------------------------------------------------------------

    def _on_first(self, now: float, first: FirstChunk) -> None:
        """The first word of a worker: it must be of the model that began the answer."""
        call = self.calls.get(first.rid)
        if call is not None and call.there and not call.begin(now, first.fingerprint):
            what = f"the answer of model {call.fingerprint} was continued by another, {first.fingerprint}"
            self._failover.drop(call, MalformedMessage(what))

    def _on_chunks(self, chunks: Iterable[Chunk]) -> None:
        call_of, buffer_bytes = self.calls.get, self._buffer_bytes
        for chunk in chunks:
            call = call_of(chunk.rid)
            if call is None or not call.there:
                self.strays += 1
            elif (wrong := call.put(chunk, buffer_bytes)) is not None:
                self._failover.drop(call, wrong)

    def _on_end(self, now: float, message: Any) -> None:
        """Done, Embedding and the like: exactly one ends a request."""
        call = self.calls.get(message.rid)
        if call is None or not call.there:
            self.strays += 1
            return
        if type(message) is not ANSWERS[type(call.request)]:
            what = f"a {type(call.request).__name__} request was answered with {type(message).__name__}"
            self._failover.drop(call, MalformedMessage(what))
            return
        if type(message) is Done:
            call.begin(now, None)
            self._on_done(call, message)
        self._failover.end(call, message)

    def _on_done(self, call: Call, done: Done) -> None:
        """Take the last chunk; drop the call when what has come is not the whole."""
        last = done.last
        if not done.finish_reasons or (last is not None and (last.rid, last.seq) != (done.rid, done.seq)):
            self._failover.drop(call, MalformedMessage("a Done without finish reasons, or with another request's chunk"))
        elif last is not None:
            self._on_chunks((last,))
        elif done.seq != call.next_seq and not (done.seq == 0 and done.finish_reasons == ["cancelled"] and not done.timings.worker):
            # The exception is an end that the controller made itself: it does not know how far the answer had come.
            self._failover.drop(call, gap(call.next_seq, done.seq))

    def _on_error(self, now: float, message: Error) -> None:
        def typed() -> ZmqserveError:
            return from_wire(message.code, message.message, message.retryable, message.retry_after_ms, message.data)

        call = self.calls.get(message.rid)
        if message.code == Unauthenticated.code and self._peer.state is not State.AWAY:
            self._peer.on_refusal(now, typed)  # of this client, not of one request
        elif call is not None and call.there:
            self._failover.fail(now, call, typed())
        elif message.rid == 0 and self._peer.state is State.GREETING:
            self._peer.on_refusal(now, typed)
        else:
            self.strays += 1

    def _on_pong(self, now: float, pong: Pong) -> None:
        number, lost = self._peer.on_pong(pong)
        for rid in pong.unknown:
            call = self.calls.get(rid)
            # One that was sent after the Ping is not known to its Pong.
            if call is not None and call.there and 0 < call.pinged <= number:
                self._failover.disown(now, call, lost)

    def _on_go_away(self, now: float, message: GoAway) -> None:
        self._peer.on_go_away(now, message.why)

    def _on_garbage(self, payload: bytes, error: Exception) -> None:
        """Count it. When it names an open request, that one ends; otherwise a lost chunk shows as a gap, and a lost end by Pong."""
        self.malformed += 1
        try:
            call = self.calls.get(_peek(payload).rid)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return
        if call is not None:
            self._failover.drop(call, MalformedMessage(f"the controller's answer is not the protocol: {error}"))

    # --- ends ----------------------------------------------------------------------------------

    def _on_deadline(self, now: float, call: Call, timeout_s: float) -> None:
        """Who knows of the deadline ends the request, and gets a moment for that. Otherwise it is ended here."""
        if call.there and not isinstance(call.request, ListModels | Status | Drain):
            call.timer = self._agenda.at(now + DEADLINE_GRACE_S, lambda _now: self._overdue(call, timeout_s))
        else:
            self._overdue(call, timeout_s)

    def _overdue(self, call: Call, timeout_s: float) -> None:
        message = f"no end came within the deadline of {timeout_s:g} s"
        self._failover.drop(call, DeadlineExceeded(message, data={"timeout_s": timeout_s}))


def inherited() -> ZmqserveError:
    """The error of a request that a forked process finds open: the answer goes to its parent."""
    error = ConnectionFailed("this process was forked while the request was open: its answer goes to the parent process")
    error.retryable = False
    return error


def closed() -> ZmqserveError:
    """The error of a request whose client was closed under it, and of one asked of a closed client."""
    error = ConnectionFailed("this client is closed, or was told to drain; make a new one")
    error.retryable = False
    return error
