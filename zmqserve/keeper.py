"""The thread that pings while requests are open and nobody waits for one."""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from collections.abc import Callable


class Keeper:
    """Calls `look` from a daemon thread. `look` returns how long, in seconds, the thread may sleep; None: until `wake`.

    `look` is a bound method and is held weakly: when its object is forgotten the thread ends, too.
    """

    def __init__(self, look: Callable[[], float | None]) -> None:
        # Not an Event: a finalizer may run inside of its `wait`, in this thread, and `set` would wait there for itself.
        wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._wakes = wakes
        self._look: weakref.WeakMethod[Callable[[], float | None]] = weakref.WeakMethod(look, lambda _: wakes.put(None))
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
        self._wakes.put(None)

    def end(self) -> None:
        """Look no more."""
        self._ends = True
        self._wakes.put(None)

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
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=nap_s)
                while True:
                    self._wakes.get_nowait()
