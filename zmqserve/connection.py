"""One client's socket, shared by any number of threads, with no thread of its own between the socket and a reader.

The threads that wait for something take turns: one of them, the leader, sleeps in `poll` on the socket; what arrives it
hands to whom it belongs, and when it has its own it leaves the lead to another waiting thread. So a lone reader pays for
one wake-up per message, as with a bare socket; a thread in between would add a second.

`_mutex` guards the line and the session: every call on either happens under it, and nobody sleeps with it. A signal handler or a
finalizer may interrupt the very thread that has it, between any two instructions. Then it can't wait for that thread: what it closes
or cancels is left to another one. When the interpreter ends it has stopped all other threads, perhaps one that had it: nobody waits then.
"""

from __future__ import annotations

import _thread
import functools
import sys
import threading
import weakref
from time import monotonic
from typing import Any, cast

import zmq

from . import forks
from .asking import Ask, Asking
from .call import Call, Leaving
from .errors import ZmqserveError
from .keeper import Keeper
from .liveness import BEATS_PER_TTL
from .pump import Awaited, Pump
from .requests import check_timeout
from .session import closed
from .sockets import plain

NAP_S = 1.0
"""The longest sleep of a leader, and how often the keeper looks; with a short ttl it is the time between Pings."""
NAP_LEAST_S = 0.05
"""The shortest sleep of a keeper beside a leader."""
GREETING_NAP_S = 0.02
"""The sleep of a keeper that looks for a controller alone: for streams that nobody waits for just now."""
PARK_NAPS = 2
"""After so many of the longest sleeps without a request the keeper sleeps until there is one."""


class _Seat:
    """A thread that waits for its call. `gate` is what it sleeps on while another thread leads."""

    __slots__ = ("call", "gate", "thread")

    def __init__(self, call: Awaited) -> None:
        self.call = call
        self.gate = threading.Lock()
        self.thread = threading.get_ident()


class Connection:
    """A session on a DEALER, for `asking`'s controllers. `context`: None makes one, which `close` ends."""

    def __init__(self, asking: Asking, context: zmq.Context[zmq.Socket[bytes]] | None) -> None:
        self._asking, self._context = asking, None if context is None else plain(context)
        self._nap_most_s = min(NAP_S, asking.ttl_s / BEATS_PER_TTL)
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        self._mutex = threading.RLock()
        self._pump = Pump(self._asking, self._context, functools.partial(_shut, weakref.ref(self)))
        self._leader: _Seat | None = None
        self._leader_s = self._sleeps_until_s = 0.0
        self._torn = False
        self._followers: dict[_Seat, None] = {}
        self._parked = False
        self._looks_s = 0.0
        self._busy_s = 0.0
        self._keeper = Keeper(self._look)

    def __del__(self) -> None:
        # Forgotten without `close`. Nothing that lives longer refers to a connection.
        if not sys.is_finalizing() and hasattr(self, "_keeper") and not self._pump.closed:
            context = self._shut(0)
            if context is not None:
                context.term()

    def __repr__(self) -> str:
        return f"Connection({'closed' if self._pump.closed else self._pump.session!r})"

    def after_fork(self) -> object:
        """In a forked child: begin anew. With a context of the caller's it can't: that is the parent's, and it is closed."""
        parents = self._pump, self._keeper
        was_closed = self._pump.closed
        self._pump.after_fork()
        if not was_closed and self._context is None:
            self._begin()
        else:
            self._mutex = threading.RLock()
        return parents

    # --- what readers do -----------------------------------------------------------------------

    def begin(self, ask: Ask, *, collect: bool) -> Call:
        """Send a request, now or as soon as a controller is there. Raises as Session.open."""
        self._check_outside()
        with self._mutex:
            now = self._busy_s = monotonic()
            if self._leader is None:
                # Nobody slept on the socket, so nobody has seen it yet.
                self._pump.look_for_break(now)
            if self._pump.closed:
                raise closed()
            call = self._pump.open(now, ask, collect=collect)
            self._after_send()
            self._keeper.start()
            self._call_keeper()
        return call

    def open(self, ask: Ask, *, collect: bool) -> Call:
        """Send a request: it has left when this returns. Raises as Session.open, and what kept it from being sent."""
        call = self.begin(ask, collect=collect)
        if not call.sent:
            try:
                self.wait(Leaving(call))
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
        if call.end is not None or sys.is_finalizing():
            return
        if self._inside:
            _thread.start_new_thread(self.cancel, (call,))
            return
        with self._mutex:
            self._pump.session.cancel(call)
            self._after_send()

    def abandon(self, call: Call) -> None:
        """`cancel` for a finalizer, which waits for nothing and takes no lock: an interrupt could keep it from giving that back."""
        self._pump.abandoned.append(call)
        self._keeper.wake()

    def wait(self, call: Awaited) -> None:
        """Sleep until `call` has something to read or has ended. One thread per call."""
        self._check_outside()
        seat = _Seat(call)
        pump, line = self._pump, self._pump.line
        woken = False
        try:
            while True:
                with self._mutex:
                    call.waiter = None
                    leads = self._leads(seat)
                    if leads:
                        line.bell.clear()
                        pump.turn(call, woken=woken)
                    if call.ready:
                        if leads:
                            self._hand_over()
                        return
                    if leads:
                        call.waiter = line.bell.ring
                        poller, nap_s = line.poller, self._nap_s()
                    else:
                        seat.gate.acquire(blocking=False)
                        self._followers[seat] = None
                        call.waiter = functools.partial(self._call_up, seat)
                if not leads:
                    seat.gate.acquire()
                elif nap_s > 0:
                    events = poller.poll(nap_s * 1000)
                    woken = bool(events)
                    if woken and line.tells_break(events):
                        pump.suspects = True
                    line.dirty = True
        except BaseException:
            with self._mutex:
                self._leave(seat)
            raise

    def drain(self, timeout_s: float | None) -> bool:
        """Take no new requests, sleep until none is open, or for `timeout_s`, and close. Returns whether all ended by themselves."""
        check_timeout(timeout_s)
        self._check_outside()
        with self._mutex:
            if self._pump.closed:
                return True
            draining = self._pump.session.drain(monotonic(), timeout_s)
            self._after_send()
            self._call_keeper()
        self.wait(draining)
        self.close()
        return draining.whole

    def close(self) -> None:
        """Cancel what is open, wake everybody, close the socket. Harmless when it is closed, and when the interpreter ends."""
        if sys.is_finalizing():
            return
        if self._inside:
            _thread.start_new_thread(self.close, ())
            return
        with self._mutex:
            if self._pump.closed:
                return
            linger_ms = self._pump.linger_ms
            self._pump.session.close()
            context = self._shut(linger_ms)
        self._keeper.join()
        if context is not None:
            context.term()

    # --- signal handlers and finalizers --------------------------------------------------------

    @property
    def _inside(self) -> bool:
        """Whether this thread has the mutex: then it was interrupted there, and what it was about to do is half done."""
        return bool(cast("Any", self._mutex)._is_owned())  # as threading.Condition asks

    def _check_outside(self) -> None:
        if sys.is_finalizing():
            raise RuntimeError("a finalizer asks the client when the interpreter has ended all threads; `atexit` is in time for that")
        if self._inside:
            what = "a signal handler or finalizer asks the client that it has interrupted; there it may only close it, or its streams"
            raise RuntimeError(what)

    # --- the socket, under the mutex -----------------------------------------------------------

    def _after_send(self) -> None:
        """A call on the socket may have eaten the edge that a sleeping leader waits for."""
        self._pump.line.dirty = True
        if self._leader is None:
            return
        self._pump.turn(None)
        due_s = self._pump.session.next_s()
        if self._pump.line.dirty or (due_s is not None and due_s < self._sleeps_until_s):
            self._pump.line.bell.ring()

    def _shut(self, linger_ms: int) -> zmq.Context[zmq.Socket[bytes]] | None:
        self._keeper.end()
        if self._leader is None:
            self._pump.line.bell.close()
        return self._pump.shut(linger_ms)

    # --- the lead, under the mutex -------------------------------------------------------------

    def _leads(self, seat: _Seat) -> bool:
        """Whether this seat leads. It takes the lead if nobody has it, or another seat of the same thread, which can't lead now."""
        leader = self._leader
        if leader is None:
            self._leader = seat
        elif leader is not seat and leader.thread == seat.thread:
            # A signal handler waits, and its thread was waiting, too, and perhaps polls. Or an interrupt tore it away before.
            self._pump.line.renew_poller()
            self._leader, self._torn = seat, True
        return self._leader is seat

    def _nap_s(self) -> float:
        """How long who leads may sleep now."""
        now = self._leader_s = monotonic()
        if self._pump.session.blocked and self._pump.line.stirs():
            # The connection came while `recv` found nothing: what waits for it can leave.
            self._pump.line.dirty = True
        if self._pump.line.dirty:
            return 0.0
        due_s = self._pump.session.next_s()
        nap_s = self._nap_most_s if due_s is None else min(self._nap_most_s, max(0.0, due_s - now))
        self._sleeps_until_s = now + nap_s
        return nap_s

    def _hand_over(self) -> None:
        """Make a waiting thread the leader. The one that came last: it has just been served, so it will stay longest."""
        if self._torn:
            # Whoever led before perhaps polls still: it is to see what there is for it.
            self._torn = False
            self._pump.line.bell.ring()
        if self._followers:
            seat, _ = self._followers.popitem()
            seat.call.waiter = None
            self._leader, self._leader_s = seat, monotonic()
            seat.gate.release()
        else:
            self._leader = None
            if self._pump.closed:
                self._pump.line.bell.close()
            elif self._pump.session.calls:
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
        due_s = self._pump.session.next_s()
        if self._parked or (due_s is not None and due_s < self._looks_s):
            self._parked = False
            self._looks_s = 0.0
            self._keeper.wake()

    def _look(self) -> float | None:
        """The keeper's round: see that Pings go out, and that somebody leads. Returns how long it may sleep, None: until it is woken."""
        with self._mutex:
            if self._pump.abandoned:
                self._after_send()
            if self._leader is None:
                self._pump.line.dirty = self._pump.suspects = True
                self._pump.turn(None)
            elif monotonic() - self._leader_s > 3 * NAP_S:
                # An interrupt hit its thread in the few instructions where nothing guards the lead.
                self._pump.line.renew_poller()
                self._hand_over()
            now = monotonic()
            if self._pump.session.calls:
                self._busy_s = now
            self._parked = now - self._busy_s > PARK_NAPS * self._nap_most_s
            if self._parked:
                return None
            if self._leader is None:
                # Nobody sleeps on the socket, so nobody sees at once when it can be written to or has an answer to a Hello.
                nap_s = min(self._nap_s(), GREETING_NAP_S if self._pump.session.greets else NAP_S)
            else:
                # Who leads does what is due, but may leave before.
                due_s = self._pump.session.next_s()
                nap_s = self._nap_most_s if due_s is None else min(self._nap_most_s, max(NAP_LEAST_S, due_s - monotonic()))
            # Not a moment later than what is due then, or each request would wake the keeper for it.
            self._looks_s = now + nap_s
            return nap_s


def _shut(connection: weakref.ref[Connection]) -> None:
    """The given context was ended. A pump must not keep its owner alive."""
    owner = connection()
    if owner is not None:
        owner._shut(0)
