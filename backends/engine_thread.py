"""What an engine's thread is when it has a queue of its own: its age, its end, and whether its model still runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .model_errors import out_of_memory, runs_no_more

MOST_BREAKS = 5
"""So often in a row a model may break on what cannot break a working one, before it is given up, as after a CUDA error that lasts."""
BREAK_S = 0.1
"""Between two of them."""


class EngineThread(threading.Thread):
    """A daemon: a hung step must not keep the process from ending. Subclasses guard what they are asked to do with `_changed`.

    `probe` is called, from the thread, after a step that failed: a forward that only a model that runs no more fails. `on_death`:
    what to call then, from the thread, which ends; what is still open is left to whoever ends the worker, and so may go on elsewhere.
    """

    def __init__(self, name: str, probe: Callable[[], object]) -> None:
        super().__init__(name=name, daemon=True)
        self.on_death: Callable[[Exception], object] | None = None
        self._probe = probe
        self._changed = threading.Condition()
        self._closing = False
        self._busy = False
        self._stepped_s = 0.0

    def age_s(self) -> float:
        """Seconds since the last step ended; 0 when there is nothing to do. From any thread."""
        return max(0.0, time.monotonic() - self._stepped_s) if self._busy else 0.0

    def close(self, timeout_s: float = 5.0) -> None:
        """End the thread after its present step; what is still open fails."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.is_alive():
            self.join(timeout_s)

    def _rest(self, until: Callable[[], object]) -> None:
        """With `_changed`: there is nothing to do, until there is or the end comes."""
        self._busy = False
        self._changed.wait_for(lambda: until() or self._closing)
        self._stepped_s = time.monotonic()
        self._busy = True

    def _died_with(self, error: Exception) -> bool:
        """Whether the model runs no more, after a step failed with `error`, which else belongs to its request alone."""
        if self.on_death is None:
            return False
        for _ in range(MOST_BREAKS):
            try:
                self._probe()
            except Exception as raised:  # noqa: BLE001 - it may be anything
                if out_of_memory(raised):
                    return False
                error = raised
            else:
                return False
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, BREAK_S):
                    return False
        self.on_death(runs_no_more(error))
        return True
