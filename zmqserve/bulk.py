"""Many prompts with a bounded number of them asked at once: what may be asked now, and which results may be handed on. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

from . import forks
from .answering import completed
from .asking import Ask
from .call import Call
from .errors import ConnectionFailed, ZmqserveError
from .params import invalid
from .requests import Prompt, check_switch
from .results import MapResult

AHEAD = 16
"""In order, a slow answer holds back those after it: up to so many times `concurrency` may be finished and wait for it."""

Progress = Callable[[int, int | None], object]
"""Told how many have ended, and of how many if that is known."""


def check_prompts(prompts: object, *, awaits: bool) -> None:
    """Raise InvalidParameter for what cannot be many prompts. A text's characters and a mapping's keys are not meant to be.

    `awaits`: they may come from an asynchronous iterable.
    """
    if isinstance(prompts, str | bytes | bytearray | memoryview | Mapping) or not (
        hasattr(prompts, "__iter__") or (awaits and hasattr(prompts, "__aiter__"))
    ):
        only = ", not an asynchronous one (AsyncClient.map takes those)" if hasattr(prompts, "__aiter__") else ""
        raise invalid("prompts", prompts, f"a list, or another iterable, of prompts{only}")


class Bulk:
    """The state of a `map`. `ask` makes a prompt's request; `total` of them, if that is known; `progress` is called after each end.

    `failure`: why no more can be asked: to be raised once what was asked before has ended and was handed on.
    """

    def __init__(
        self, ask: Callable[[Prompt], Ask], *, concurrency: int, ordered: bool, progress: Progress | None, total: int | None
    ) -> None:
        if type(concurrency) is not int or concurrency < 1:
            raise invalid("concurrency", concurrency, "an integer from 1")
        if progress is not None and not callable(progress):
            raise invalid("progress", progress, "a function")
        self.failure: ConnectionFailed | None = None
        self._ask = ask
        self._concurrency = concurrency
        self._ordered = check_switch("ordered", ordered)
        self._progress = progress
        self._total = total
        self._begun = self._ended = self._given = 0
        self._prompts: dict[int, Prompt] = {}
        self._ready: deque[MapResult] = deque()
        self._held: dict[int, MapResult] = {}

    def __repr__(self) -> str:
        return f"Bulk({self._begun} begun, {self._ended} ended, {self._given} handed on)"

    @property
    def room(self) -> bool:
        """Whether one more may be asked."""
        ahead = self._begun - self._given if self._ordered else 0
        return self.failure is None and len(self._prompts) < self._concurrency and ahead < self._concurrency * AHEAD

    @property
    def idle(self) -> bool:
        """Whether none is being asked."""
        return not self._prompts

    def begin(self, prompt: Prompt) -> tuple[int, Ask | None]:
        """Its index and what to ask; None if it can't be asked, which is its result."""
        index = self._begun
        self._begun += 1
        self._prompts[index] = prompt
        try:
            return index, self._ask(prompt)
        except ZmqserveError as error:
            self._put(MapResult(index, self._prompts.pop(index), error=error))
            return index, None

    def refuse(self, index: int, error: ZmqserveError) -> None:
        """It could not be sent: this is its result, or the `failure` when no other can be sent, either."""
        prompt = self._prompts.pop(index)
        if isinstance(error, ConnectionFailed):
            self.failure = error
        else:
            self._put(MapResult(index, prompt, error=error))

    def end(self, index: int, call: Call) -> None:
        """Its call has ended."""
        if not call.sent and isinstance(call.end, ConnectionFailed):
            self.refuse(index, call.end)
            return
        prompt, end = self._prompts.pop(index), call.end
        # Not raised to be caught: the traceback would keep it all until the garbage collector comes.
        self._put(MapResult(index, prompt, error=end) if isinstance(end, ZmqserveError) else MapResult(index, prompt, completed(call)))

    def next(self) -> MapResult | None:
        """The next result, if it may be handed on now."""
        if self.failure is not None and self.idle:
            # Those before it will not come any more.
            self._ready += (self._held.pop(index) for index in sorted(self._held))
        if not self._ready:
            return None
        self._given += 1
        return self._ready.popleft()

    def _put(self, result: MapResult) -> None:
        self._ended += 1
        if self._ordered:
            self._held[result.index] = result
            while (following := self._held.pop(self._given + len(self._ready), None)) is not None:
                self._ready.append(following)
        else:
            self._ready.append(result)
        if self._progress is not None:
            self._progress(self._ended, self._total)


class Arrivals:
    """Tells which of several calls, opened with ``collect``, have ended; may be waited for like one. Calls end in any thread."""

    def __init__(self) -> None:
        self.waiter: Callable[[], object] | None = None
        self.open: dict[Call, int] = {}
        self._ended: deque[tuple[int, Call]] = deque()
        forks.watch(self)

    def __repr__(self) -> str:
        return f"Arrivals({len(self.open)} open, {len(self._ended)} ended)"

    @property
    def ready(self) -> bool:
        """Whether `take` has something."""
        return bool(self._ended)

    def watch(self, index: int, call: Call) -> None:
        """One more, known as `index`."""
        self.open[call] = index
        self._watch(call)

    def take(self) -> Iterator[tuple[int, Call]]:
        """Those that have ended since."""
        while self._ended:
            yield self._ended.popleft()

    def after_fork(self) -> None:
        """In a forked child: all have ended."""
        self.waiter = None
        while self.open:
            call, index = self.open.popitem()
            self._ended.append((index, call))

    def _watch(self, call: Call) -> None:
        call.waiter = lambda: self._woken(call)
        if call.end is not None:  # perhaps before the waiter was there
            self._woken(call)

    def _woken(self, call: Call) -> None:
        index = self.open.pop(call, None)
        if index is not None:
            self._ended.append((index, call))
            waiter, self.waiter = self.waiter, None
            if waiter is not None:
                waiter()
