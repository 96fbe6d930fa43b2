"""What moves messages between a client's socket and its session. It never waits; whoever owns it decides when to sleep, and on what."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from selectors import BaseSelector
from time import monotonic
from typing import Protocol

import zmq

from .asking import Ask, Asking
from .call import Call
from .line import Line
from .sockets import SocketLimits

TURN_S = 0.002
"""How long messages are read before others get their turn: by time, since one may hold a token or thousands."""
CLOSE_LINGER_MS = 100
"""How long the last Cancels may take to leave when a client with open requests is closed."""


class Awaited(Protocol):
    """What somebody may wait for: a Call, or something made of several. See there."""

    waiter: Callable[[], object] | None

    @property
    def ready(self) -> bool: ...


class Pump:
    """A Line and the Session on it. Not for several threads at once.

    `suspects`: the connection may have broken, `turn` is to look. `abandoned`: calls whose stream was forgotten; a finalizer may append.
    `selector` wakes for what there is to do; see Line. `on_terminated`: what to call when the given context was ended under this client.
    """

    def __init__(
        self,
        asking: Asking,
        context: zmq.Context[zmq.Socket[bytes]] | None,
        on_terminated: Callable[[], object],
        selector: BaseSelector | None = None,
    ) -> None:
        self.line = Line(context, SocketLimits(), asking.credentials, selector)
        self.session = asking.session(self.line)
        self.suspects = self.closed = False
        self.abandoned: deque[Call] = deque()
        self._on_terminated = on_terminated

    def __repr__(self) -> str:
        return f"Pump({self.session!r})"

    def open(self, now: float, ask: Ask, *, collect: bool, later: bool = False) -> Call:
        """Begin a request; see Session.open."""
        request, timeout_s, resume, retries, patient = ask
        return self.session.open(
            now, request, timeout_s=timeout_s, collect=collect, resume=resume, retries=retries, patient=patient, later=later
        )

    def turn(self, call: Awaited | None = None, *, woken: bool = False) -> bool:
        """Read what has arrived, until `call` is ready, and do what is due. `woken`: by the socket, most likely, so that it need not be
        asked first. Returns whether anything had arrived."""
        if self.closed:
            return False
        now = monotonic()
        if self.session.blocked:
            self.session.flush()
        due_s = self.session.next_s()
        due = due_s is not None and due_s <= now
        looks = due or self.suspects or self.line.broken
        # All is read before the session may say that somebody is silent or gone.
        had = self.line.dirty and self._read(now, None if looks else call, woken=woken)
        if looks:
            self.look_for_break(now)
        if due or self.session.blocked or self.abandoned:
            self.session.flush()
            self.cancel_abandoned()
            self.session.tick(now)
            had = self._read(now, call) or had
        return had

    def look_for_break(self, now: float) -> None:
        """Tell the session when the connection has broken, once all that came on it was read."""
        self.suspects = False
        if self.line.broke():
            self._read(now, None)
            if self.line.broken and not self.line.dirty:
                self.line.broken = False
                shut_out = self.line.shut_out if self.session.greets else ""
                self.session.on_disconnected(now)
                if shut_out:
                    self.line.hang_up()
                    self.session.on_shut_out(now, shut_out)

    def cancel_abandoned(self) -> None:
        """Give up the calls whose streams were forgotten."""
        while self.abandoned:
            self.session.cancel(self.abandoned.popleft())

    def after_fork(self) -> None:
        """In a forked child: let go of what is the parent's, without a word to anybody."""
        self.session.disinherit()
        self.closed = True

    @property
    def linger_ms(self) -> int:
        """What `shut` is to be given when it is asked for: Cancels of what is open should still leave."""
        return CLOSE_LINGER_MS if self.session.calls else 0

    def shut(self, linger_ms: int) -> zmq.Context[zmq.Socket[bytes]] | None:
        """Close the socket; see Line.close for what it returns. The session is to be closed before."""
        self.closed = True
        return self.line.close(linger_ms)

    def _read(self, now: float, call: Awaited | None, *, woken: bool = False) -> bool:
        line, on_message = self.line, self.session.on_message
        line.dirty = True
        had = False
        try:
            if not (woken or line.readable()):
                line.dirty = False
                return False
            until_s = now + TURN_S
            while True:
                # Not bound outside of the loop: a message may make the session connect anew.
                on_message(now, line.recv())
                had = True
                if (call is not None and call.ready) or monotonic() >= until_s:
                    break
        except zmq.Again:
            line.dirty = False
        except zmq.ContextTerminated:
            # Let go of it, or its `term` waits forever.
            self.session.close()
            self._on_terminated()
        return had
