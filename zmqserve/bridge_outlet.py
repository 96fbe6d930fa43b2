"""Results on their way out of a bridge."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Outlet:
    """Messages that wait for the PUSH socket: as they come, or `ordered` by the numbers of their jobs, which count from 0.

    Each job puts any number of messages, the last of them with `last`.
    """

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._turn = 0
        self._ready: deque[tuple[bytes, bool]] = deque()
        self._behind: dict[int, list[tuple[bytes, bool]]] = {}

    def __repr__(self) -> str:
        return f"Outlet({len(self._ready)} ready, {len(self._behind)} jobs behind)"

    def __bool__(self) -> bool:
        return bool(self._ready)

    def put(self, number: int, message: bytes, *, last: bool) -> None:
        """A message of this job."""
        if self._ordered and number != self._turn:
            self._behind.setdefault(number, []).append((message, last))
            return
        self._ready.append((message, last))
        if self._ordered and last:
            self._next_turn()

    def flush(self, send: Callable[[bytes], bool]) -> int:
        """Send what is ready until `send` is False. Returns how many jobs have left with all their messages."""
        left = 0
        while self._ready and send(self._ready[0][0]):
            left += self._ready.popleft()[1]
        return left

    def _next_turn(self) -> None:
        ended = True
        while ended:
            self._turn += 1
            waiting = self._behind.pop(self._turn, [])
            self._ready += waiting
            ended = bool(waiting) and waiting[-1][1]
