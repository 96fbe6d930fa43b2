"""One thread that runs an embedding model on batches of texts, whatever requests these belong to."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from zmqserve.errors import BackendError
from zmqserve.jobs import Vectors
from zmqserve.logs import Logger

from .engine_thread import EngineThread
from .model_errors import out_of_memory

if TYPE_CHECKING:
    from .embedding_model import Row

log = Logger("zmqserve.transformers")
Matrix = np.ndarray[Any, np.dtype[np.float32]]


class Encoder(Protocol):
    """An EmbeddingModel, as far as the loop needs it."""

    def vectors(self, rows: Sequence[Row]) -> Matrix: ...


class Request:
    """The texts of one request, and who waits for their vectors. `finish` makes the answer of them, on the loop's thread.

    `begun`: one of them was in a batch.
    """

    def __init__(self, rows: Sequence[Row], finish: Callable[[Matrix], Vectors]) -> None:
        self.wanted = True
        self.begun = False
        self.left = deque(Text(self, position, row) for position, row in enumerate(rows))
        self.answer: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        self._event_loop = asyncio.get_running_loop()
        self._finish = finish
        self._vectors: list[Matrix | None] = [None] * len(rows)
        self._missing = len(rows)

    def __repr__(self) -> str:
        return f"Request({self._missing} of {len(self._vectors)} texts missing{'' if self.wanted else ', not wanted'})"

    def next(self) -> Text | None:
        """The first of its texts that is in no batch yet."""
        while self.left and self.left[0].taken:
            self.left.popleft()
        return self.left[0] if self.left else None

    def put(self, position: int, vector: Matrix) -> None:
        """The vector of one text."""
        self._vectors[position] = vector
        self._missing -= 1
        if self._missing or not self.wanted:
            return
        try:
            answer = self._finish(np.stack([vector for vector in self._vectors if vector is not None]))
        except Exception as error:  # noqa: BLE001 - it belongs to this request
            self.fail(error)
        else:
            self._settle(self.answer.set_result, answer)

    def fail(self, error: Exception) -> None:
        """End without an answer."""
        self._settle(self.answer.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], outcome: Vectors | Exception) -> None:
        self.wanted = False
        try:
            self._event_loop.call_soon_threadsafe(lambda: None if self.answer.done() else settle(outcome))
        except RuntimeError:  # the event loop is closed: nobody waits
            pass


class Text:
    """One text that waits. Texts are ordered by length, and by age among equals."""

    __slots__ = ("key", "position", "request", "row", "taken")

    def __init__(self, request: Request, position: int, row: Row) -> None:
        self.request = request
        self.position = position
        self.row = row
        self.key = (row.length, 0)
        self.taken = False


GATHER_SHARE = 0.1
"""Of a batch's time, what the next one may wait for as many texts. Who got answers asks again, and not all in one moment."""

GROW_BATCHES = 16
"""After so many batches that fitted, memory that was full may be free again: one may have twice as many tokens, up to what was set."""


class EmbeddingLoop(EngineThread):
    """Batches the texts of all requests: the next text of the request whose turn it is, with those nearest to it in length.

    So every request goes on in its turn, however many texts another one has, and little is padding. `batch_tokens`: what a batch
    may have, padding included, where the memory suffices; a longer text goes alone. `padding_tokens`: how much of it may be padding.
    `gather_share`: see GATHER_SHARE; after a pause nobody waits. A batch that fails is tried again in halves, so that only the text that
    it fails with fails its request. `probe`: rows whose vectors a model that fails with a text is asked for, see EngineThread.
    """

    def __init__(
        self,
        name: str,
        model: Encoder,
        probe: Sequence[Row],
        *,
        batch_tokens: int,
        padding_tokens: int,
        gather_share: float = GATHER_SHARE,
    ) -> None:
        super().__init__(name, lambda: model.vectors(probe))
        self._model = model
        self._batch_tokens = self._most_tokens = batch_tokens
        self._good_batches = 0
        self._padding_tokens = padding_tokens
        self._gather_share = gather_share
        self._opened: list[Request] = []
        self._dropped = False
        self._count = 0
        self._batch_texts = 0
        self._gather_until_s = 0.0
        self._waiting: list[Text] = []
        self._turns: deque[Request] = deque()

    async def embed(self, rows: Sequence[Row], finish: Callable[[Matrix], Vectors]) -> Vectors:
        """The answer for these texts. Raises what their batch or `finish` raised. When cancelled, no further text of them is computed."""
        request = Request(rows, finish)
        with self._changed:
            if self._closing:
                raise BackendError("the worker is stopping")
            self._opened.append(request)
            self._changed.notify()
        try:
            return await request.answer
        finally:
            if request.wanted:
                request.wanted = False
                self._dropped = True

    def waiting(self) -> int:
        """Requests of which no text was in a batch yet. From any thread."""
        return sum(not request.begun for request in (*tuple(self._opened), *tuple(self._turns)))

    def run(self) -> None:
        """The thread."""
        while self._take_in():
            batch = self._next_batch()
            if batch:
                began_s = time.monotonic()
                if not self._compute(batch):
                    return
                self._batch_texts = len(batch)
                self._gather_until_s = self._stepped_s + self._gather_share * (self._stepped_s - began_s)
        for request in (*self._turns, *self._opened):
            request.fail(BackendError("the worker stopped before the texts were embedded"))

    def _take_in(self) -> bool:
        """Wait for something to do and take in what has come; False at the end."""
        with self._changed:
            if not self._turns:
                self._rest(until=lambda: self._opened)
            self._changed.wait_for(self._enough, max(0.0, self._gather_until_s - time.monotonic()))
            if self._closing:
                return False
            opened, self._opened = [request for request in self._opened if request.wanted], []
        if self._dropped:
            self._dropped = False
            self._waiting = [text for text in self._waiting if text.request.wanted]
        for request in opened:
            for text in request.left:
                self._count += 1
                text.key = (text.row.length, self._count)
            self._waiting += request.left
            self._turns.append(request)
        if opened:
            self._waiting.sort(key=_key)
        return True

    def _enough(self) -> bool:
        """Whether as many texts wait as the last batch had."""
        return self._closing or len(self._waiting) + sum(len(request.left) for request in self._opened) >= self._batch_texts

    def _next_batch(self) -> list[Text]:
        while self._turns:
            request = self._turns.popleft()
            first = request.next() if request.wanted else None
            if first is not None:
                self._turns.append(request)
                return self._around(first)
        return []

    def _around(self, first: Text) -> list[Text]:
        """Take `first` and its neighbours in length, the nearest ones first, until the batch is full."""
        waiting = self._waiting
        low = bisect_left(waiting, first.key, key=_key)
        high = low + 1
        tokens = width = first.row.length
        while True:
            shorter = waiting[low - 1].row.length if low else None
            longer = waiting[high].row.length if high < len(waiting) else None
            nearest = sorted((abs(length - first.row.length), length) for length in (shorter, longer) if length is not None)
            for _, length in nearest:
                padded = max(width, length) * (high - low + 1)
                if padded <= self._batch_tokens and padded - tokens - length <= self._padding_tokens:
                    break
            else:
                break
            tokens += length
            width = max(width, length)
            if length == longer:
                high += 1
            else:
                low -= 1
        batch = waiting[low:high]
        del waiting[low:high]
        for text in batch:
            text.taken = text.request.begun = True
        return batch

    def _compute(self, batch: list[Text]) -> bool:
        """Returns whether the model still runs."""
        parts = [batch]
        while parts:
            part = [text for text in parts.pop() if text.request.wanted]
            error = self._try(part) if part else None
            if error is None:
                continue
            if len(part) == 1:
                if self._died_with(error):
                    return False
                part[0].request.fail(error)
                self._dropped = True
            else:
                self._note(part, error)
                half = len(part) // 2
                parts += [part[half:], part[:half]]
            # Its frames hold the memory of what was computed: the next part needs it.
            del error
        return True

    def _try(self, batch: list[Text]) -> Exception | None:
        try:
            vectors = self._model.vectors([text.row for text in batch])
        except Exception as error:  # noqa: BLE001 - it is of the text that it happens with alone
            return error
        finally:
            self._stepped_s = time.monotonic()
        for text, vector in zip(batch, vectors, strict=True):
            text.request.put(text.position, vector)
        self._grow()
        return None

    def _grow(self) -> None:
        self._good_batches += 1
        if self._good_batches >= GROW_BATCHES and self._batch_tokens < self._most_tokens:
            self._good_batches = 0
            self._batch_tokens = min(2 * self._batch_tokens, self._most_tokens)

    def _note(self, batch: list[Text], error: Exception) -> None:
        tokens = len(batch) * max(text.row.length for text in batch)
        if out_of_memory(error):
            self._good_batches = 0
            self._batch_tokens = max(1, min(self._batch_tokens, tokens // 2))
        why = f"{type(error).__name__}: {error}"
        log.warning("batch failed: again in halves", texts=len(batch), tokens=tokens, batch_tokens=self._batch_tokens, why=why)


def _key(text: Text) -> tuple[int, int]:
    return text.key
