"""Stop strings in text that comes in pieces: what may be the beginning of one is held back until it is known."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection


class _Node:
    """A state of the automaton: the longest end of the text that begins a stop string; `depth` characters of it.

    `match` is the length of the longest stop string that ends here, 0 if none does.
    """

    __slots__ = ("depth", "fail", "match", "next")

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.next: dict[str, _Node] = {}
        self.fail: _Node | None = None
        self.match = 0


class StopStrings:
    """Those of one request, for all its choices: made once, since that takes a quarter of a kilobyte a character, and never changed.

    Aho & Corasick, "Efficient string matching" (1975): one step per character of a text whatever the number of stop strings.
    """

    __slots__ = ("root",)

    def __init__(self, stop: Collection[str]) -> None:
        self.root = _automaton(stop) if stop else _NOTHING


class StopMatcher:
    """Finds the first stop string to be completed, and tells what text may leave before that.

    The result does not depend on how the text was cut into pieces. Where several end at one character, the longest counts.
    """

    def __init__(self, stop: StopStrings | Collection[str]) -> None:
        self._root = (stop if isinstance(stop, StopStrings) else StopStrings(stop)).root
        self._node = self._root
        self._held = ""
        self.stopped = False

    def __repr__(self) -> str:
        return f"StopMatcher(held={self._held!r}, stopped={self.stopped})"

    def feed(self, text: str) -> tuple[str, bool]:
        """What may leave now that `text` has come, and whether a stop string was completed: then nothing more will leave."""
        if not self._root.next:
            return text, False
        return self._advance(text), self.stopped

    def flush(self) -> str:
        """The text has ended: what was held back was no stop string after all."""
        rest, self._held = self._held, ""
        self._node = self._root
        return rest

    def _advance(self, text: str) -> str:
        if self.stopped:
            return ""
        root = self._root
        node = self._node
        for position, character in enumerate(text, 1):
            following = node.next.get(character)
            while following is None and node.fail is not None:
                node = node.fail
                following = node.next.get(character)
            node = following or root
            if node.match:
                self.stopped = True
                whole = self._held + text[:position]
                self._held = ""
                return whole[: len(whole) - node.match]
        self._node = node
        whole = self._held + text
        leaves = len(whole) - node.depth
        self._held = whole[leaves:]
        return whole[:leaves]


_NOTHING = _Node(0)
"""The automaton without stop strings."""


def _automaton(stop: Collection[str]) -> _Node:
    root = _Node(0)
    for text in stop:
        node = root
        for character in text:
            node = node.next.setdefault(character, _Node(node.depth + 1))
        node.match = node.depth
    waiting = deque(root.next.values())
    for child in waiting:
        child.fail = root
    while waiting:
        node = waiting.popleft()
        for character, child in node.next.items():
            fail = node.fail
            while fail is not None and character not in fail.next:
                fail = fail.fail
            child.fail = root if fail is None else fail.next[character]
            child.match = child.match or child.fail.match
            waiting.append(child)
    return root
