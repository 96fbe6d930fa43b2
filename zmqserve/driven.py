"""One client's socket for one thread that has a loop of its own, such as asyncio's or one around zmq.Poller: no threads, no locks."""

from __future__ import annotations

import functools
import selectors
import sys
import weakref
from collections.abc import Callable
from time import monotonic

import zmq

from . import forks
from .asking import Ask, Asking
from .call import Call
from .draining import Draining
from .errors import Unsupported
from .pump import Pump
from .session import closed
from .sockets import plain


class Driven:
    """A session on a DEALER. Whoever owns it calls `process` when `fileno` is readable and when `wait_s` has passed.

    `stir`: called when `process` has something to do that `fileno` may not tell; None: `fileno` tells it then.
    `context`: None makes one, which `close` hands back to be ended.
    """

    def __init__(self, asking: Asking, context: zmq.Context[zmq.Socket[bytes]] | None, stir: Callable[[], object] | None = None) -> None:
        self._asking, self._context, self._given_stir = asking, None if context is None else plain(context), stir
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        # epoll or kqueue: a descriptor that stays the same while sockets come and go.
        self._selector = selectors.DefaultSelector()
        if not hasattr(self._selector, "fileno"):
            raise Unsupported("this needs epoll or kqueue, which this system does not have; use Client", data={"parameter": "fileno"})
        self.pump = Pump(self._asking, self._context, functools.partial(_shut, weakref.ref(self)), self._selector)
        self._selector.register(self.pump.line.bell.fd, selectors.EVENT_READ)
        self.stir = self._given_stir or self.pump.line.bell.ring

    def __repr__(self) -> str:
        return f"Driven({'closed' if self.pump.closed else self.pump.session!r})"

    def after_fork(self) -> object:
        """In a forked child: begin anew, with another `fileno`. With a context of the caller's it can't, and is closed."""
        parents = self.pump, self._selector
        was_closed = self.pump.closed
        self.pump.after_fork()
        if not was_closed and self._context is None:
            self._begin()
        return parents

    def fileno(self) -> int:
        """A descriptor to poll for reading; the same for as long as this lives. -1 when it is closed."""
        return -1 if self.pump.closed else self._selector.fileno()

    def wait_s(self) -> float | None:
        """After how many seconds `process` is due at the latest; None: when `fileno` says so."""
        due_s = self.pump.session.next_s()
        return None if due_s is None or self.pump.closed else max(0.0, due_s - monotonic())

    def process(self) -> None:
        """Read what has arrived, as much as one turn may, and do what is due. Never waits."""
        pump = self.pump
        if pump.closed:
            return
        pump.line.bell.clear()
        pump.line.dirty = True
        if not pump.turn():
            # Then it may have been the end of the connection that woke it.
            pump.look_for_break(monotonic())
        if pump.line.dirty or pump.abandoned:
            self.stir()

    def open(self, ask: Ask, *, collect: bool, later: bool = False) -> Call:
        """Begin a request; see Session.open. It leaves now (`later`: in the next `process`), or once a controller answers."""
        pump, now = self.pump, monotonic()
        if pump.closed:
            raise closed()
        if not pump.session.calls:
            # Perhaps nobody has looked for long.
            pump.look_for_break(now)
        call = pump.open(now, ask, collect=collect, later=later)
        self.stir()
        return call

    def cancel(self, call: Call) -> None:
        """Give a request up; harmless when it has ended."""
        if call.end is None:
            self.pump.session.cancel(call)
            self.stir()

    def abandon(self, call: Call) -> None:
        """`cancel` for a finalizer, which runs in any thread and between any two instructions: the next `process` does it."""
        self.pump.abandoned.append(call)

    def drain(self, timeout_s: float | None) -> Draining:
        """Take no new requests; see Session.drain."""
        draining = self.pump.session.drain(monotonic(), timeout_s)
        self.stir()
        return draining

    def close_within(self, timeout_s: float | None) -> None:
        """What is still open after `timeout_s` is cancelled; see Session.close_within."""
        if self.pump.session.close_within(monotonic(), timeout_s):
            self.stir()

    def close(self) -> zmq.Context[zmq.Socket[bytes]] | None:
        """Cancel what is open and close the socket. Returns the context to be ended, if it was made here: that may take a moment."""
        if self.pump.closed:
            return None
        linger_ms = self.pump.linger_ms
        self.pump.session.close()
        return self._shut(linger_ms)

    def _shut(self, linger_ms: int) -> zmq.Context[zmq.Socket[bytes]] | None:
        context = self.pump.shut(linger_ms)
        self.pump.line.bell.close()
        self._selector.close()
        return context

    def __del__(self) -> None:
        # Forgotten without `close`.
        if not sys.is_finalizing() and hasattr(self, "stir") and not self.pump.closed:
            context = self._shut(0)
            if context is not None:
                context.term()


def _shut(driven: weakref.ref[Driven]) -> None:
    """The given context was ended. A pump must not keep its owner alive."""
    owner = driven()
    if owner is not None:
        owner._shut(0)
