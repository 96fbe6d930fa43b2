"""One thread that makes tokens for all requests, one sequence a step: for models that cannot be batched."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from zmqserve.errors import BackendError

from .sequences import Token, TokenSequence, hand_over


class Steps(Protocol):
    """A sequence that is made step by step."""

    def step(self) -> Token | None:
        """Make the next token; None if this step gave none."""


class StepLoop(threading.Thread):
    """A SequenceEngine that steps each sequence in turn, so that none waits for another's whole answer; one that fails, fails alone.

    `begin` makes the Steps of a sequence, on the thread. A step is one token or one piece of a prompt.
    """

    def __init__(self, name: str, begin: Callable[[TokenSequence], Steps]) -> None:
        super().__init__(name=name, daemon=True)
        self.on_death: Callable[[Exception], object] | None = None
        self._begin = begin
        self._changed = threading.Condition()
        self._opened: list[TokenSequence] = []
        self._closing = False
        self._busy = False
        self._stepped_s = 0.0

    def open(self, sequence: TokenSequence) -> None:
        with self._changed:
            if self._closing:
                raise BackendError("the worker is stopping")
            self._opened.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: TokenSequence) -> None:
        sequence.wanted = False

    def age_s(self) -> float:
        return max(0.0, time.monotonic() - self._stepped_s) if self._busy else 0.0

    def close(self, timeout_s: float = 5.0) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        """The thread."""
        active: dict[TokenSequence, Steps | None] = {}
        while True:
            active.update(dict.fromkeys(self._wait(idle=not active)))
            if self._closing:
                hand_over((sequence, BackendError("the worker stopped before the answer was complete")) for sequence in active)
                return
            for sequence, steps in list(active.items()):
                going = self._step(sequence, steps)
                if going is None:
                    del active[sequence]
                else:
                    active[sequence] = going

    def _wait(self, *, idle: bool) -> list[TokenSequence]:
        with self._changed:
            if idle:
                self._busy = False
                self._changed.wait_for(lambda: self._opened or self._closing)
                self._stepped_s = time.monotonic()
                self._busy = True
            opened, self._opened = self._opened, []
        return opened

    def _step(self, sequence: TokenSequence, steps: Steps | None) -> Steps | None:
        """What makes the next token, None if there will be none."""
        if not sequence.wanted:
            return None
        made: Token | Exception | None
        try:
            steps = steps or self._begin(sequence)
            made = steps.step()
        except Exception as error:  # noqa: BLE001
            made = error  # whatever it is, it belongs to this request
        self._stepped_s = time.monotonic()
        if made is None:
            return steps
        hand_over([(sequence, made)])
        return None if isinstance(made, Exception) or sequence.add(made) else steps
