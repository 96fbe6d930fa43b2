"""Whose turn it is: sequences in line, by the request that each belongs to."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping

from .sequences import TokenSequence


class Turns:
    """Sequences that wait. Their requests take turns, so that nobody waits behind all the choices of another's."""

    def __init__(self) -> None:
        self._lines: OrderedDict[object, deque[TokenSequence]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Turns({[len(line) for line in self._lines.values()]} by request)"

    def __bool__(self) -> bool:
        return bool(self._lines)

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def push(self, sequence: TokenSequence) -> None:
        """Behind the others of its request, which gets its turn after all that are here."""
        self._lines.setdefault(sequence.request, deque()).append(sequence)

    def push_back(self, sequences: Iterable[TokenSequence]) -> None:
        """Those that were out before: ahead of all, in this order."""
        for sequence in reversed(list(sequences)):
            self._lines.setdefault(sequence.request, deque()).appendleft(sequence)
            self._lines.move_to_end(sequence.request, last=False)

    def least(self, places: Mapping[object, int]) -> object:
        """The request that has the fewest places, of several the one whose turn it is."""
        return min(self._lines, key=lambda request: places.get(request, 0))

    def pop(self, request: object) -> TokenSequence:
        """The next sequence of a request that has some here; its next turn is after the others'."""
        line = self._lines.pop(request)
        sequence = line.popleft()
        if line:
            self._lines[request] = line
        return sequence

    def discard(self, sequence: TokenSequence) -> None:
        """It leaves, if it is here."""
        line = self._lines.get(sequence.request, deque())
        if sequence in line:
            line.remove(sequence)
            if not line:
                del self._lines[sequence.request]

    def clear(self) -> list[TokenSequence]:
        """All that are left, which leave."""
        left = [sequence for line in self._lines.values() for sequence in line]
        self._lines.clear()
        return left
