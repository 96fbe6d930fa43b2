"""A client's socket on an asyncio event loop: one reader for all that is open, a task is woken once a message and takes all there is."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import weakref
from collections.abc import Callable
from functools import partial
from time import monotonic

import zmq

from . import forks
from .asking import Ask, Asking
from .call import Call, Leaving
from .driven import Driven
from .errors import ZmqserveError
from .pump import Awaited
from .requests import check_timeout


class AsyncConnection:
    """A Driven on the loop in which the first request is opened. Not for other threads, except `abandon`."""

    def __init__(self, asking: Asking, context: zmq.Context[zmq.Socket[bytes]] | None) -> None:
        self._asking = asking
        self._context = context
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fd = -1
        self._stirred = False
        self._timer: asyncio.TimerHandle | None = None
        self._due_s: float | None = None
        self._driven = self._new_driven()
        forks.watch(self)

    def __repr__(self) -> str:
        return f"AsyncConnection({self._driven!r})"

    def __del__(self) -> None:
        # Forgotten without `close`, perhaps found so in another thread.
        loop = self._loop
        if loop is not None and not loop.is_closed() and not sys.is_finalizing():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_retire, loop, self._fd, self._driven)

    def after_fork(self) -> None:
        """In a forked child: the parent's loop is left alone, since both have its descriptors."""
        self._loop = None
        self._forget_loop()

    def begin(self, ask: Ask, *, collect: bool, later: bool = False) -> Call:
        """Send a request, now or as soon as a controller is there; `later`: at the end of this turn of the loop, with others that are
        begun in it. Raises as Session.open."""
        self._attach()
        return self._driven.open(ask, collect=collect, later=later)

    async def open(self, ask: Ask, *, collect: bool) -> Call:
        """Send a request: it has left when this returns. Raises as Session.open, and what kept it from being sent."""
        call = self.begin(ask, collect=collect)
        if not call.sent:
            try:
                await self.wait(Leaving(call))
            except BaseException:
                self.cancel(call)
                raise
            if not call.sent and isinstance(call.end, ZmqserveError):
                raise call.end
        return call

    def check_loop(self) -> None:
        """Raise RuntimeError on another loop than the one that this is used on."""
        if self._loop is not None and self._loop is not asyncio.get_running_loop() and not self._loop.is_closed():
            raise RuntimeError("this AsyncClient is in use on another event loop; make one for each loop")

    async def wait(self, call: Awaited) -> None:
        """Return when `call` has something to read or has ended. One task per call."""
        if call.ready:
            return
        loop = self._attach()  # perhaps it was opened on another one, and ends with this
        while not call.ready:
            woken: asyncio.Future[None] = loop.create_future()
            call.waiter = partial(_wake, woken)
            try:
                await woken
            finally:
                call.waiter = None

    def cancel(self, call: Call) -> None:
        """Give a request up; harmless when it has ended."""
        self._driven.cancel(call)

    def abandon(self, call: Call) -> None:
        """`cancel` for a finalizer, from any thread."""
        self._driven.abandon(call)
        loop = self._loop  # which may let go of it meanwhile
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._process)

    async def drain(self, timeout_s: float | None) -> bool:
        """Take no new requests, wait until none is open, or for `timeout_s`, and close. Returns whether all ended by themselves."""
        check_timeout(timeout_s)
        if self._driven.pump.closed:
            return True
        self._attach()
        draining = self._driven.drain(timeout_s)
        await self.wait(draining)
        await self.close()
        return draining.whole

    async def close(self) -> None:
        """Cancel what is open, wake everybody, close the socket. Harmless when it is closed."""
        self.check_loop()
        self._detach()
        context = self._driven.close()
        if context is None:
            return
        try:
            # It waits for the last messages to leave.
            await asyncio.to_thread(context.term)
        except RuntimeError:
            context.term()  # the interpreter is ending and has no threads any more

    def _new_driven(self) -> Driven:
        stir = weakref.WeakMethod(self._stir)
        return Driven(self._asking, self._context, lambda: _read(stir))

    # --- on the loop ---------------------------------------------------------------------------

    def _attach(self) -> asyncio.AbstractEventLoop:
        """Be on the running loop."""
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return loop
        self.check_loop()
        if self._loop is not None:
            # That one is closed, and nobody waits any more for what was open there.
            context = self._driven.close()
            if context is not None:
                context.term()
            self._detach()
            self._driven = self._new_driven()
        self._loop = loop
        self._fd = self._driven.fileno()
        if self._fd >= 0:
            loop.add_reader(self._fd, _read, weakref.WeakMethod(self._process))
        return loop

    def _detach(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None and not loop.is_closed():
            if self._timer is not None:
                self._timer.cancel()
            if self._fd >= 0:
                loop.remove_reader(self._fd)
        self._forget_loop()

    def _forget_loop(self) -> None:
        self._timer, self._due_s, self._fd, self._stirred = None, None, -1, False

    def _stir(self) -> None:
        """Look at the socket at the end of this turn: what was sent in it may have eaten the edge that tells of news."""
        if not self._stirred and self._loop is not None and not self._loop.is_closed():
            self._stirred = True
            self._loop.call_soon(self._process)

    def _process(self) -> None:
        self._stirred = False
        self._driven.process()
        wait_s = self._driven.wait_s()
        if self._driven.pump.closed:
            self._detach()
        elif wait_s is not None and self._loop is not None:
            due_s = monotonic() + wait_s
            if self._due_s is None or due_s < self._due_s:
                if self._timer is not None:
                    self._timer.cancel()
                self._due_s = due_s
                self._timer = self._loop.call_later(wait_s, _read, weakref.WeakMethod(self._on_due))

    def _on_due(self) -> None:
        self._timer = self._due_s = None
        self._process()


def _read(process: weakref.WeakMethod[Callable[[], None]]) -> None:
    """The event loop must not keep a client alive that was forgotten."""
    if (do := process()) is not None:
        do()


def _wake(woken: asyncio.Future[None]) -> None:
    if not woken.done():
        try:
            woken.set_result(None)
        except RuntimeError:
            pass  # its loop is closed, nobody waits


def _retire(loop: asyncio.AbstractEventLoop, fd: int, driven: Driven) -> None:
    if fd >= 0:
        loop.remove_reader(fd)
    context = driven.close()
    if context is not None:
        context.term()
