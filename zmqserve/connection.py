"""One client's socket, shared by any number of threads, with no thread of its own between the socket and a reader.

The threads that wait for something take turns: one of them, the leader, sleeps in `poll` on the socket; what arrives it
hands to whom it belongs, and when it has its own it leaves the lead to another waiting thread. So a lone reader pays for
one wake-up per message, as with a bare socket; a thread in between would add a second.

`_mutex` guards the line and the session: every call on either happens under it, and nobody sleeps with it.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Sequence
from random import Random
from time import monotonic

import zmq

from .call import Call, ClientRequest
from .errors import ZmqserveError
from .keeper import Keeper
from .line import Line
from .liveness import BEATS_PER_TTL
from .session import Session, closed
from .sockets import SocketLimits

TURN_MESSAGES = 256
"""How many messages are read at most before others get the mutex."""
NAP_S = 1.0
"""The longest sleep of a leader, and how often the keeper looks; with a short ttl it is the time between Pings."""
NAP_LEAST_S = 0.05
"""The shortest sleep of a keeper beside a leader."""
GREETING_NAP_S = 0.02
"""The sleep of a keeper that looks for a controller alone: for streams that nobody waits for just now."""
PARK_NAPS = 2
"""After so many of the longest sleeps without a request the keeper sleeps until there is one."""
CLOSE_LINGER_MS = 100
"""How long the last Cancels may take to leave when a client with open requests is closed."""


class _Seat:
    """A thread that waits for its call. `gate` is what it sleeps on while another thread leads."""

    __slots__ = ("call", "gate")

    def __init__(self, call: Call) -> None:
        self.call = call
        self.gate = threading.Lock()


class Connection:
    """A session on a DEALER. See Session for the times; `context`: None makes one, which `close` ends."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None,
        name: str,
        ttl_s: float,
        connect_timeout_s: float,
        failover_s: float,
        buffer_bytes: int,
        limits: SocketLimits,
    ) -> None:
        # Until all is made, for `__del__`.
        self._closed = True
        self._mutex = threading.Lock()
        self._line = Line(context, limits)
        self._session = Session(
            self._line,
            endpoints,
            random=Random(),
            name=name,
            ttl_s=ttl_s,
            connect_timeout_s=connect_timeout_s,
            failover_s=failover_s,
            buffer_bytes=buffer_bytes,
        )
        self._nap_most_s = min(NAP_S, ttl_s / BEATS_PER_TTL)
        self._leader: _Seat | None = None
        self._suspects = False
        self._leader_s = self._sleeps_until_s = 0.0
        self._followers: dict[_Seat, None] = {}
        self._abandoned: deque[Call] = deque()
        self._keeper = Keeper(self._look)
        self._parked = False
        self._looks_s = 0.0
        self._busy_s = 0.0
        self._closed = False

    def __del__(self) -> None:
        # Forgotten without `close`. Nothing that lives longer refers to a connection.
        if not (sys.is_finalizing() or self._closed):
            context = self._shut(0)
            if context is not None:
                context.term()

    def __repr__(self) -> str:
        return f"Connection({'closed' if self._closed else self._session!r})"

    # --- what readers do -----------------------------------------------------------------------

    def open(self, request: ClientRequest, *, timeout_s: float | None, collect: bool, resume: bool, retries: int) -> Call:
        """Send a request: it has left when this returns. Raises as Session.open, and what kept it from being sent."""
        with self._mutex:
            now = self._busy_s = monotonic()
            if self._leader is None:
                # Nobody slept on the socket, so nobody has seen it yet.
                self._look_for_break(now)
            if self._closed:
                raise closed()
            call = self._session.open(now, request, timeout_s=timeout_s, collect=collect, resume=resume, retries=retries)
            self._after_send()
            self._keeper.start()
            self._call_keeper()
        if not call.sent:
            try:
                self._wait(call, for_sent=True)
            except BaseException:
                self.cancel(call)
                raise
            if not call.sent and isinstance(call.end, ZmqserveError):
                raise call.end
            with self._mutex:
                self._call_keeper()
        return call

    def cancel(self, call: Call) -> None:
        """Give a request up; harmless when it has ended."""
        if call.end is None:
            with self._mutex:
                self._session.cancel(call)
                self._after_send()

    def abandon(self, call: Call) -> None:
        """`cancel` for a finalizer. That may run inside a thread that has the mutex, so it must not wait for it."""
        self._abandoned.append(call)
        if self._mutex.acquire(blocking=False):
            try:
                self._cancel_abandoned()
                self._after_send()
            finally:
                self._mutex.release()

    def wait(self, call: Call) -> None:
        """Sleep until `call` has something to read or has ended. One thread per call."""
        self._wait(call, for_sent=False)

    def _wait(self, call: Call, *, for_sent: bool) -> None:
        seat = _Seat(call)
        woken = False
        try:
            while True:
                with self._mutex:
                    call.waiter = None
                    if self._leader is None:
                        self._leader = seat
                    leads = self._leader is seat
                    if leads:
                        self._line.bell.clear()
                        self._turn(call, woken=woken)
                    if call.ready or (for_sent and call.sent):
                        if leads:
                            self._hand_over()
                        return
                    if leads:
                        call.waiter = self._line.bell.ring
                        poller, nap_s = self._line.poller, self._nap_s()
                    else:
                        seat.gate.acquire(blocking=False)
                        self._followers[seat] = None
                        call.waiter = functools.partial(self._call_up, seat)
                if not leads:
                    seat.gate.acquire()
                elif nap_s > 0:
                    events = poller.poll(nap_s * 1000)
                    woken = bool(events)
                    if woken and self._line.tells_break(events):
                        self._suspects = True
                    self._line.dirty = True
        except BaseException:
            with self._mutex:
                self._leave(seat)
            raise

    def close(self) -> None:
        """Cancel what is open, wake everybody, close the socket. Harmless when it is closed."""
        with self._mutex:
            if self._closed:
                return
            linger_ms = CLOSE_LINGER_MS if self._session.calls else 0
            self._session.close()
            context = self._shut(linger_ms)
        self._keeper.join()
        if context is not None:
            context.term()

    # --- the socket, under the mutex -----------------------------------------------------------

    def _turn(self, call: Call | None, *, woken: bool = False) -> None:
        """Read what has arrived, until `call` is ready, and do what is due."""
        if self._closed:
            return
        now = monotonic()
        due_s = self._session.next_s()
        due = due_s is not None and due_s <= now
        looks = due or self._suspects or self._line.broken
        # All is read before the session may say that somebody is silent or gone.
        if self._line.dirty:
            self._read(now, None if looks else call, woken=woken)
        if looks:
            self._look_for_break(now)
        if due or self._session.blocked or self._abandoned:
            self._session.flush()
            self._cancel_abandoned()
            self._session.tick(now)
            self._read(now, call)

    def _look_for_break(self, now: float) -> None:
        """Tell the session when the connection has broken, once all that came on it was read."""
        self._suspects = False
        if self._line.broke():
            self._read(now, None)
            if self._line.broken and not self._line.dirty:
                self._line.broken = False
                self._session.on_disconnected(now)

    def _read(self, now: float, call: Call | None, *, woken: bool = False) -> None:
        """`woken`: by the socket, most likely, so that it need not be asked first."""
        line, on_message = self._line, self._session.on_message
        line.dirty = True
        try:
            if not (woken or line.readable()):
                line.dirty = False
                return
            for _ in range(TURN_MESSAGES):
                # Not bound outside of the loop: a message may make the session connect anew.
                on_message(now, line.recv())
                if call is not None and call.ready:
                    return
        except zmq.Again:
            self._line.dirty = False
        except zmq.ContextTerminated:
            # The given context was ended under this client: let go of it, or its `term` waits forever.
            self._session.close()
            self._shut(0)

    def _after_send(self) -> None:
        """A call on the socket may have eaten the edge that a sleeping leader waits for."""
        self._line.dirty = True
        if self._leader is None:
            return
        self._turn(None)
        due_s = self._session.next_s()
        if self._line.dirty or (due_s is not None and due_s < self._sleeps_until_s):
            self._line.bell.ring()

    def _cancel_abandoned(self) -> None:
        while self._abandoned:
            self._session.cancel(self._abandoned.popleft())

    def _shut(self, linger_ms: int) -> zmq.Context[zmq.Socket[bytes]] | None:
        self._closed = True
        self._keeper.end()
        if self._leader is None:
            self._line.bell.close()
        return self._line.close(linger_ms)

    # --- the lead, under the mutex -------------------------------------------------------------

    def _nap_s(self) -> float:
        """How long who leads may sleep now."""
        now = self._leader_s = monotonic()
        if self._session.blocked and self._line.stirs():
            # The connection came while `recv` found nothing: what waits for it can leave.
            self._line.dirty = True
        if self._line.dirty:
            return 0.0
        due_s = self._session.next_s()
        nap_s = self._nap_most_s if due_s is None else min(self._nap_most_s, max(0.0, due_s - now))
        self._sleeps_until_s = now + nap_s
        return nap_s

    def _hand_over(self) -> None:
        """Make a waiting thread the leader. The one that came last: it has just been served, so it will stay longest."""
        if self._followers:
            seat, _ = self._followers.popitem()
            seat.call.waiter = None
            self._leader, self._leader_s = seat, monotonic()
            seat.gate.release()
        else:
            self._leader = None
            if self._closed:
                self._line.bell.close()
            elif self._session.calls:
                self._call_keeper()

    def _call_up(self, seat: _Seat) -> None:
        """Wake a follower: its call is ready."""
        if seat in self._followers:
            del self._followers[seat]
            seat.gate.release()

    def _leave(self, seat: _Seat) -> None:
        """An exception, such as KeyboardInterrupt, ended the waiting."""
        seat.call.waiter = None
        self._followers.pop(seat, None)
        if self._leader is seat:
            self._hand_over()

    def _call_keeper(self) -> None:
        """See that the keeper is awake when something is due next: nobody else may be, if the caller reads later."""
        due_s = self._session.next_s()
        if self._parked or (due_s is not None and due_s < self._looks_s):
            self._parked = False
            self._looks_s = 0.0
            self._keeper.wake()

    def _look(self) -> float | None:
        """The keeper's round: see that Pings go out, and that somebody leads. Returns how long it may sleep, None: until it is woken."""
        with self._mutex:
            if self._leader is None:
                self._line.dirty = self._suspects = True
                self._turn(None)
            elif monotonic() - self._leader_s > 3 * NAP_S:
                # An interrupt hit its thread in the few instructions where nothing guards the lead.
                self._line.renew_poller()
                self._hand_over()
            now = monotonic()
            if self._session.calls:
                self._busy_s = now
            self._parked = now - self._busy_s > PARK_NAPS * self._nap_most_s
            if self._parked:
                return None
            if self._leader is None:
                # Nobody sleeps on the socket, so nobody sees at once when it can be written to or has an answer to a Hello.
                nap_s = min(self._nap_s(), GREETING_NAP_S if self._session.greets else NAP_S)
            else:
                # Who leads does what is due, but may leave before.
                due_s = self._session.next_s()
                nap_s = self._nap_most_s if due_s is None else min(self._nap_most_s, max(NAP_LEAST_S, due_s - monotonic()))
            # Not a moment later than what is due then, or each request would wake the keeper for it.
            self._looks_s = now + nap_s
            return nap_s
