"""Gets each request to a controller that lives: now, if there is one, and again when it was lost with what held it.

Pure: `now` is passed in, a Wire is written to. The rules of what is sent again stand in recovery.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from .call import Call, End
from .errors import ControllerLost, InvalidParameter, ZmqserveError
from .liveness import Agenda, Timer
from .outgoing import Outgoing, encoded
from .peer import Failure, Peer, State, Wire
from .recovery import Recovery, next_request

AWAY, OPEN = State.AWAY, State.OPEN
"""Bound here: to look an enum's member up takes longer than most of what is done with it, per request."""

TOGETHER = 32
"""So many requests for later leave at once, and do not wait for more: whoever opens thousands gives others to do meanwhile."""


class Failover:
    """The open requests (`calls`, by rid) and the controller that they are at (`peer`); see Session for the times.

    `on_idle`: what to call when the last of them has ended.
    """

    def __init__(
        self,
        wire: Wire,
        agenda: Agenda,
        endpoints: Sequence[str],
        *,
        name: str,
        ttl_s: float,
        connect_timeout_s: float,
        failover_s: float,
        random: Random,
    ) -> None:
        self.calls: dict[int, Call] = {}
        self.on_idle: Callable[[], object] = lambda: None
        self.peer = Peer(self, wire, agenda, endpoints, name=name, ttl_s=ttl_s, connect_timeout_s=connect_timeout_s)
        self._agenda = agenda
        self._outgoing = Outgoing(wire)
        self._failover_s = failover_s
        self._random = random
        self._loss = ""
        self._patience: Timer | None = None

    def __repr__(self) -> str:
        return f"Failover({self.peer!r}, open={len(self.calls)})"

    # --- requests

    def begin(self, now: float, call: Call, *, later: bool = False) -> None:
        """Take on a new request; see Session.open. Raises InvalidParameter when it is too large for the controller that is there."""
        if self.peer.state is OPEN:
            self._check_size(call.payload)
        alone = not self.calls
        self.calls[call.rid] = call
        self._send(now, call, alone=alone, later=later)
        if call.patient and self.peer.controller and self.peer.state is not OPEN:
            self._recovery(call).until_s = now + self._failover_s

    def fail(self, now: float, call: Call, error: ZmqserveError) -> None:
        """The controller has ended it with this error: send it again, or end it."""
        call.there = False
        self._go_on(now, call, error, self._recovery(call).after(now, call, error))

    def disown(self, now: float, call: Call, error: Failure) -> None:
        """The controller does not know it any more, though it is there itself: send it again, or end it."""
        call.there = False
        if self._recovery(call).lost_controller(now, call, now + self._failover_s, its_end := error()):
            self._again(now, call)
        else:
            self.end(call, its_end)

    def drop(self, call: Call, end: End) -> None:
        """End a request that the controller may still hold: tell it."""
        if call.there:
            self._outgoing.cancel(call.rid)
        self.end(call, end)

    def end(self, call: Call, end: End) -> None:
        """End a request that the controller does not hold. Harmless when it has ended."""
        call.there = False
        if self.calls.pop(call.rid, None) is not None:
            call.finish(end)
            if not self.calls:
                self.on_idle()

    def clear(self) -> None:
        """Expect nothing of anybody."""
        self.peer.forget()
        self._outgoing.clear()
        self._be_patient(None)

    # --- the wire

    def flush(self) -> None:
        """Send what waits, as far as the wire takes it."""
        self.peer.flush()
        if self.peer.state is OPEN and not self.peer.blocked:
            self._outgoing.flush()

    @property
    def blocked(self) -> bool:
        """Whether `flush` has something to do."""
        return self.peer.blocked or (bool(self._outgoing) and self.peer.state is OPEN)

    # --- what the peer tells

    @property
    def wanted(self) -> bool:
        return any(True for _ in self._outgoing)

    def on_open(self, now: float) -> None:
        self._be_patient(None)
        for call in list(self._outgoing):
            self._prepare(now, call)
        self.flush()

    def on_lost(self, now: float, error: Failure) -> None:
        self._loss = str(error())
        until_s = (now if self.peer.lost_s is None else self.peer.lost_s) + self._failover_s
        for call in list(self.calls.values()):
            call.round_ends = 0 if call.sent else self.peer.round_ends(now)
            if call.there:
                call.there = False
                if not self._recovery(call).lost_controller(now, call, until_s, its_end := error()):
                    self.end(call, its_end)
            elif call.sent or call.patient:
                self._recovery(call).until_s = until_s
        self._outgoing.renew(call for call in self.calls.values() if call.pause is None)
        self._be_patient(until_s)

    def on_unanswered(self, now: float, error: Failure) -> None:
        self._give_up(now, error)

    def to_ping(self, number: int) -> list[int] | None:
        if not self.calls:
            return None
        there = [call for call in self.calls.values() if call.there]
        for call in there:
            call.pinged = call.pinged or number
        return [call.rid for call in there]

    # --- how

    def _send(self, now: float, call: Call, *, alone: bool = False, later: bool = False) -> None:
        """Send a request, or greet the controller first when it is not certain to be there."""
        peer = self.peer
        self._outgoing.add(call)
        if peer.state is AWAY:
            peer.greet(now, fresh=True)
        elif peer.state is OPEN and alone and peer.stale(now):
            peer.greet(now, fresh=False)
        elif peer.state is OPEN and alone:
            self.flush()
            if call.there:
                peer.watch(now)
            else:
                # With nothing else under way the pipe cannot be full: the connection is gone.
                peer.on_disconnected(now)
        elif not later or len(self._outgoing) >= TOGETHER:
            self.flush()
        call.round_ends = peer.round_ends(now)

    def _go_on(self, now: float, call: Call, error: ZmqserveError, pause_s: float | None) -> None:
        """Send a request again after this pause, or end it; see Recovery.after."""
        if pause_s is None:
            self.end(call, error)
        elif pause_s <= 0:
            self._again(now, call)
        else:
            call.pause = self._agenda.at(now + pause_s, lambda now: self._again(now, call))

    def _again(self, now: float, call: Call) -> None:
        """Send a request once more."""
        call.pause = None
        if self.peer.state is OPEN:
            self._prepare(now, call)
        if call.end is None:
            self._send(now, call)

    def _prepare(self, now: float, call: Call) -> None:
        """Say in a request that waited or moves what is so now. One that cannot be sent to this controller ends."""
        try:
            if call.recovery is not None:
                call.recovery.sending(call)
            if call.recovery is not None or call.deadline_s is not None:
                call.payload = encoded(next_request(now, call))
            self._check_size(call.payload)
        except InvalidParameter as error:
            self.end(call, error)

    def _be_patient(self, until_s: float | None) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None if until_s is None or not self.calls else self._agenda.at(until_s, self._give_up)

    def _give_up(self, now: float, error: Failure | None = None) -> None:
        """End what has looked for a controller long enough: what had been sent for `failover_s`, what had not for a whole round."""
        if self.peer.state is OPEN:
            return
        hopeless = error is not None and self.peer.hopeless
        for call in list(self._outgoing):
            until_s = call.recovery.until_s if call.recovery is not None and not hopeless else now
            if now < until_s or self.peer.tried < call.round_ends:
                continue
            if call.sent and not hopeless:
                why = f"{self._loss}, and none answered at {self.peer.where} within {self._failover_s:g} s"
                lost: ZmqserveError = ControllerLost(why, data={"endpoints": list(self.peer.endpoints)})
            elif error is not None:
                lost = error()
            else:
                continue
            # Whatever who was greeted said: it had nothing of this request.
            self._go_on(now, call, lost, self._recovery(call).turned_down(now, call, lost))
        self._outgoing.renew(call for call in self._outgoing if call.pause is None)

    def _check_size(self, payload: bytes) -> None:
        limit = self.peer.limits.message_bytes
        if 0 < limit < len(payload):
            message = f"the request is {len(payload)} bytes, the controller takes at most {limit}"
            raise InvalidParameter(message, data={"parameter": "prompt", "bytes": len(payload), "limit_bytes": limit})

    def _recovery(self, call: Call) -> Recovery:
        if call.recovery is None:
            call.recovery = Recovery(self._failover_s, self._random)
        return call.recovery
