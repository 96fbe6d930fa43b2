"""The thread that pings while requests are open and nobody waits for one."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable


class Keeper:
    """Calls `look` from a daemon thread. `look` returns how long, in seconds, the thread may sleep; None: until `wake`.

    `look` is a bound method and is held weakly: when its object is forgotten the thread ends, too.
    """

    def __init__(self, look: Callable[[], float | None]) -> None:
        self._wakes = wakes = threading.Event()
        self._look: weakref.WeakMethod[Callable[[], float | None]] = weakref.WeakMethod(look, lambda _: wakes.set())
        self._ends = False
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"Keeper({'not started' if self._thread is None else 'ending' if self._ends else 'looking'})"

    def start(self) -> None:
        """Begin to look; harmless when it has begun."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="zmqserve-keeper", daemon=True)
            with contextlib.suppress(RuntimeError):  # no new threads while the interpreter ends: whoever waits does what is due
                thread.start()
                self._thread = thread

    def wake(self) -> None:
        """Look now."""
        self._wakes.set()

    def end(self) -> None:
        """Look no more."""
        self._ends = True
        self._wakes.set()

    def join(self) -> None:
        """Wait until the thread is gone, unless this is it: a finalizer runs in any."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._ends:
            look = self._look()
            if look is None:
                return
            nap_s = look()
            # Hold nothing while asleep.
            del look
            self._wakes.wait(nap_s)
            self._wakes.clear()
