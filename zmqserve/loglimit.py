"""Keeps what peers do over and over from filling the log. Pure: `tick` tells it the time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

WINDOW_S = 1.0
MOST_ALIKE = 100
"""Lines in a window of one event about one worker (or about none); what comes beyond is counted."""
MOST_KINDS = 10_000
"""Different ones in a window: as many workers as may come at once, when a controller starts again."""


class LogLimit:
    """A `report` that passes on to another one, not more lines of a kind than may be; how many were left out is said afterwards."""

    def __init__(self, report: Callable[..., None], now: float) -> None:
        self._report = report
        self._ends_s = now + WINDOW_S
        self._seen: Counter[tuple[str, object]] = Counter()
        self._left_out: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"LogLimit({len(self._seen)} kinds, {self._left_out.total()} left out)"

    def __call__(self, event: str, **fields: object) -> None:
        """Report a line, or leave it out."""
        kind = event, fields.get("worker")
        if self._seen[kind] < MOST_ALIKE and (kind in self._seen or len(self._seen) < MOST_KINDS):
            self._seen[kind] += 1
            self._report(event, **fields)
        else:
            self._left_out[event] += 1

    def tick(self, now: float) -> None:
        """Time has passed."""
        if now >= self._ends_s:
            self._ends_s = now + WINDOW_S
            self._seen.clear()
            left_out, self._left_out = self._left_out, Counter()
            for event, lines in left_out.items():
                self._report("log lines left out", level="warning", of=event, lines=lines)
