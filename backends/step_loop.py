"""One thread that makes tokens for all requests, one sequence a step: for models that cannot be batched."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from zmqserve.errors import BackendError

from .engine_thread import EngineThread
from .sequences import Token, TokenSequence, hand_over


class Steps(Protocol):
    """A sequence that is made step by step."""

    def step(self) -> Token | None:
        """Make the next token; None if this step gave none."""


class StepLoop(EngineThread):
    """A SequenceEngine in which requests take turns, a step each, and so do the sequences of one request; one that fails, fails alone.

    `begin` makes the Steps of a sequence, on the thread. A step is one token or one piece of a prompt. `probe`: see EngineThread.
    """

    def __init__(self, name: str, begin: Callable[[TokenSequence], Steps], probe: Callable[[], object]) -> None:
        super().__init__(name, probe)
        self._begin = begin
        self._opened: list[TokenSequence] = []
        self._active: dict[object, deque[TokenSequence]] = {}
        self._steps: dict[TokenSequence, Steps] = {}

    def open(self, sequence: TokenSequence) -> None:
        sequence.cached_tokens = -1
        with self._changed:
            if self._closing:
                raise BackendError("the worker is stopping")
            self._opened.append(sequence)
            self._changed.notify()

    def cancel(self, sequence: TokenSequence) -> None:
        sequence.wanted = False

    def run(self) -> None:
        """The thread."""
        while self._take_in():
            for request, line in list(self._active.items()):
                while line and not line[0].wanted:
                    self._steps.pop(line.popleft(), None)
                if line and not self._step(line):
                    return
                if not line:
                    del self._active[request]
        left = [*self._opened, *(sequence for line in self._active.values() for sequence in line)]
        hand_over((sequence, BackendError("the worker stopped before the answer was complete")) for sequence in left)

    def _take_in(self) -> bool:
        """Wait for something to do and take in what has come; False at the end."""
        with self._changed:
            if not self._active:
                self._rest(until=lambda: self._opened)
            if self._closing:
                return False
            opened, self._opened = self._opened, []
        for sequence in opened:
            self._active.setdefault(sequence.request, deque()).append(sequence)
        return True

    def _step(self, line: deque[TokenSequence]) -> bool:
        """One step of a request's next sequence, which comes last then; False if the model runs no more."""
        sequence = line.popleft()
        made: Token | Exception | None
        try:
            steps = self._steps.get(sequence)
            if steps is None:
                sequence.cached_tokens = 0
                steps = self._steps[sequence] = self._begin(sequence)
            made = steps.step()
        except Exception as error:  # noqa: BLE001
            made = error  # whatever it is, it belongs to this request
        self._stepped_s = time.monotonic()
        if isinstance(made, Exception) and self._died_with(made):
            return False
        if made is not None:
            hand_over([(sequence, made)])
        if isinstance(made, Exception) or (made is not None and sequence.add(made)):
            self._steps.pop(sequence, None)
        else:
            line.append(sequence)
        return True
