"""The client for a program with a loop of its own, around zmq.Poller or whatever polls descriptors: no threads, no waiting."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeAlias, TypeVar, overload

import zmq

from .answering import Answering, completed
from .asking import Ask, Asking, ClientOptions, EmbedOptions, GenerateOptions, vectors_asked
from .call import Call
from .draining import Draining
from .driven import Driven
from .errors import ZmqserveError
from .forks import OneProcess
from .messages import Cancel, ControllerStatus, ModelCard, Timings, Usage
from .requests import Prompt, Turn, check_switch
from .results import Completion, ServedModel, StreamChunk, array_of, served

if TYPE_CHECKING:
    from typing import Unpack

    from .results import Array

T = TypeVar("T")


class PolledStream(Answering):
    """An answer while it is generated; made by PolledClient.generate and PolledClient.chat. Forgetting it cancels it."""

    def __init__(self, client: PolledClient, call: Call) -> None:
        super().__init__(call, call.rid)
        self._client = client
        self._open = call

    def __del__(self) -> None:
        if self._open.end is None and not sys.is_finalizing():
            self._client._driven.abandon(self._open)

    @property
    def done(self) -> bool:
        """Whether it has ended and all was taken."""
        return self._over

    def take(self) -> list[StreamChunk]:
        """The chunks that have come since the last time, perhaps none. Raises the typed error that ended the answer once those that
        came before it were taken."""
        chunks: list[StreamChunk] = []
        while not self._over:
            if chunks and not self._open.chunks and isinstance(self._open.end, ZmqserveError):
                self._client._note_now(self)  # the error is for the next time
                break
            chunk = self._next(self._open)
            if chunk is None:
                break
            chunks.append(chunk)
        return chunks

    def cancel(self) -> None:
        """Give it up; what has not been taken is dropped. Harmless when it has ended."""
        self._over = True
        self._client._driven.cancel(self._open)


class Pending(OneProcess, Generic[T]):
    """What was asked for and will be answered in one piece; made by the verbs of PolledClient. Forgetting it cancels it."""

    def __init__(self, client: PolledClient, call: Call, read: Callable[[Call], T]) -> None:
        self._client = client
        self._open = call
        self._read = read

    def __repr__(self) -> str:
        return f"Pending({self._open!r})"

    def __del__(self) -> None:
        if self._open.end is None and not sys.is_finalizing():
            self._client._driven.abandon(self._open)

    @property
    def rid(self) -> int:
        """The request's id, as it stands in the controller's log."""
        return self._open.rid

    @property
    def done(self) -> bool:
        """Whether there is a `result`."""
        return self._open.end is not None

    @property
    def usage(self) -> Usage | None:
        """Tokens, of what counts them (`generate`, `chat`, `embed`); None for others, and before the end."""
        return getattr(self._open.end, "usage", None)

    @property
    def timings(self) -> Timings | None:
        """Where the time went, and which worker answered; for those that have `usage`."""
        return getattr(self._open.end, "timings", None)

    def result(self) -> T:
        """The answer. Raises the typed error that ended it, and RuntimeError before its end and after `cancel`."""
        end = self._open.end
        if isinstance(end, ZmqserveError):
            raise end
        if end is None or isinstance(end, Cancel):
            raise RuntimeError("it has not been answered yet: wait until it is done" if end is None else "it was cancelled")
        return self._read(self._open)

    def cancel(self) -> None:
        """Give it up. Harmless when it has ended."""
        self._client._driven.cancel(self._open)


Asked: TypeAlias = PolledStream | Pending[Any]
W = TypeVar("W", bound=Asked)


class PolledClient(OneProcess):
    """Asks a controller, and through it the workers: the verbs of Client, which return at once.

    ::

        poller.register(client, zmq.POLLIN)  # it has a fileno()
        while ...:
            poller.poll(client.wait_ms())
            for asked in client.process():  # those that have news
                ...

    `process` is to be called when `fileno` is readable and when `wait_ms` has passed; it does all the work, on the thread that calls it.
    A stream's chunks are there to `take`, other verbs' answers as the `result` of a Pending. For one thread.
    endpoints, context, options: as in Client. Raises Unsupported on a system without epoll and kqueue.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._asking = Asking(endpoints, options)
        self._driven = Driven(self._asking, context)
        self._news: dict[int, Asked] = {}
        self._draining: Draining | None = None

    def __repr__(self) -> str:
        return f"PolledClient({', '.join(self.endpoints)}: {self._driven!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its controllers are."""
        return self._asking.endpoints

    def fileno(self) -> int:
        """A descriptor to poll for reading: the same as long as the client is open, whatever controller it is at."""
        return self._driven.fileno()

    def wait_ms(self) -> int | None:
        """How long nothing is due, in ms, as zmq.Poller.poll takes it; None: until `fileno` is readable."""
        wait_s = self._driven.wait_s()
        return None if wait_s is None else ceil(wait_s * 1000)

    def process(self) -> list[Asked]:
        """Read what has arrived and do what is due, without waiting. Returns the streams and pending answers that have news since the
        last time: chunks to take, or their end."""
        self._driven.process()
        news, self._news = self._news, {}
        for asked in news.values():
            if asked._open.end is None:
                self._watch(asked)
        return list(news.values())

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests from now on; what is still open after `timeout_s` is cancelled. Returns at once, whether all have ended:
        go on with `process` until it does, then close. Of several `timeout_s` the one that ends first counts."""
        if self._draining is None:
            self._draining = self._driven.drain(timeout_s)
        else:
            self._driven.close_within(timeout_s)
        return self._draining.ready

    def close(self) -> None:
        """Cancel what is open and close the socket. Streams and pending answers end with an error."""
        context = self._driven.close()
        if context is not None:
            context.term()

    # --- answers -------------------------------------------------------------------------------

    @overload
    def generate(self, model: str, prompt: Prompt, *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]) -> PolledStream: ...

    @overload
    def generate(
        self, model: str, prompt: Prompt, *, stream: Literal[False], **options: Unpack[GenerateOptions]
    ) -> Pending[Completion]: ...

    def generate(self, model: str, prompt: Prompt, *, stream: bool = True, **options: Any) -> PolledStream | Pending[Completion]:
        """Continue a prompt: a text, its token ids, or messages. Options as in Client.generate."""
        return self._generate(self._asking.generate(model, prompt, options), stream=stream)

    @overload
    def chat(
        self, model: str, messages: Sequence[Turn], *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]
    ) -> PolledStream: ...

    @overload
    def chat(
        self, model: str, messages: Sequence[Turn], *, stream: Literal[False], **options: Unpack[GenerateOptions]
    ) -> Pending[Completion]: ...

    def chat(self, model: str, messages: Sequence[Turn], *, stream: bool = True, **options: Any) -> PolledStream | Pending[Completion]:
        """Answer a conversation, put into the model's own chat template. Options as in Client.generate."""
        return self._generate(self._asking.chat(model, messages, options), stream=stream)

    def embed(self, model: str, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> Pending[Array]:
        """One vector per text: a float32 array of shape (texts, dimensions). Options as in Client.embed."""
        ask = self._asking.embed(model, texts, options)
        return self._pending(ask, lambda end: array_of(end, vectors_asked(ask)))

    def count_tokens(self, model: str, prompt: str | Sequence[Turn], *, timeout_s: float | None = None) -> Pending[int]:
        """How many tokens a prompt or conversation is, special tokens and chat template included."""
        return self._pending(self._asking.count_tokens(model, prompt, timeout_s), lambda end: int(end.count))

    def model_details(self, model: str, *, timeout_s: float | None = None) -> Pending[ModelCard]:
        """What one of the model's workers says about it."""
        return self._pending(self._asking.model_details(model, timeout_s), _card)

    # --- the network ---------------------------------------------------------------------------

    def models(self, *, timeout_s: float | None = None) -> Pending[list[ServedModel]]:
        """What is served, and by whom."""
        return self._pending(self._asking.models(timeout_s), lambda end: [served(status) for status in end.models])

    def status(self, *, timeout_s: float | None = None) -> Pending[ControllerStatus]:
        """The controller's state: its workers, models, queues and counters."""
        return self._pending(self._asking.status(timeout_s), _status)

    def drain_worker(self, worker: str, grace_s: float | None = None, *, timeout_s: float | None = None) -> Pending[int]:
        """Let a worker finish what it runs, within `grace_s` (None: the controller's setting), and go. Gives how much it still runs."""
        return self._pending(self._asking.drain_worker(worker, grace_s, timeout_s), lambda end: int(end.running))

    # --- how -----------------------------------------------------------------------------------

    def _generate(self, ask: Ask, *, stream: bool) -> PolledStream | Pending[Completion]:
        if not check_switch("stream", stream):
            return self._watched(Pending(self, self._driven.open(ask, collect=True), completed))
        return self._watched(PolledStream(self, self._driven.open(ask, collect=False)))

    def _pending(self, ask: Ask, read: Callable[[Any], T]) -> Pending[T]:
        return self._watched(Pending(self, self._driven.open(ask, collect=True), lambda call: read(call.end)))

    def _watched(self, asked: W) -> W:
        if asked._open.ready:
            self._note_now(asked)
        else:
            self._watch(asked)
        return asked

    def _watch(self, asked: Asked) -> None:
        """Note when there is news of it. Held weakly: one that is forgotten is cancelled."""
        asked._open.waiter = partial(_on_news, weakref.ref(self), weakref.ref(asked))

    def _note(self, asked: Asked) -> None:
        self._news[asked.rid] = asked

    def _note_now(self, asked: Asked) -> None:
        """Tell of it at the next `process`, for which there may be no other reason."""
        self._note(asked)
        self._driven.stir()


def _on_news(client: weakref.ref[PolledClient], asked: weakref.ref[Asked]) -> None:
    owner, what = client(), asked()
    if owner is None or what is None:
        return
    owner._note(what)


def _card(end: Any) -> ModelCard:
    card: ModelCard = end.card
    return card


def _status(end: Any) -> ControllerStatus:
    status: ControllerStatus = end.status
    return status
