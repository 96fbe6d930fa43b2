"""The client for programs that block: any number of threads may share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

import zmq

from .answering import completed
from .asking import Ask, Asking, ClientOptions, EmbedOptions, GenerateOptions, vectors_asked
from .bulk import Arrivals, Bulk, Progress, check_prompts
from .call import Answer, Call
from .connection import Connection
from .errors import ZmqserveError
from .forks import OneProcess
from .messages import ControllerStatus, Details, DrainReply, Embedding, ModelCard, Models, StatusReply, Tokens
from .requests import Prompt, Turn, check_switch
from .results import Completion, MapResult, ServedModel, array_of, served
from .stream import Stream

if TYPE_CHECKING:
    from typing import Unpack

    from .results import Array

A = TypeVar("A", bound=Answer)


class Client(OneProcess):
    """Asks a controller, and through it the workers.

    endpoints: the controller's client side, or several to try in order; None: ``ZMQSERVE_CONTROLLER``, else
    ``tcp://127.0.0.1:5570``. Nothing is sent before the first request.
    context: a ZeroMQ context to share (needed for ``inproc://``), zmq.asyncio's, too; None: one of its own.
    options: see ClientOptions.

    All verbs raise the errors of zmqserve.errors. Threads may share a client; a stream belongs to one thread. A forked child has a client
    of its own in its place, and what was open there ends with ConnectionFailed. A signal handler may close the client and its streams at
    any time; to ask something there raises RuntimeError where it has interrupted this client's own work.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._asking = Asking(endpoints, options)
        self._connection = Connection(self._asking, context)

    def __repr__(self) -> str:
        return f"Client({', '.join(self.endpoints)}: {self._connection!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its controllers are."""
        return self._asking.endpoints

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests, wait until those that are open have ended, and close; what is open after `timeout_s` is cancelled.

        Returns whether all ended by themselves. What streams have received can still be read.
        """
        return self._connection.drain(timeout_s)

    def close(self) -> None:
        """Cancel open requests and close the socket. Other threads' open verbs and streams end with an error."""
        self._connection.close()

    # --- answers -------------------------------------------------------------------------------

    @overload
    def generate(self, model: str, prompt: Prompt, *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]) -> Stream: ...

    @overload
    def generate(self, model: str, prompt: Prompt, *, stream: Literal[False], **options: Unpack[GenerateOptions]) -> Completion: ...

    def generate(self, model: str, prompt: Prompt, *, stream: bool = True, **options: Any) -> Stream | Completion:
        """Continue a prompt: a text, its token ids, or messages. Returns a Stream, or with ``stream=False`` a Completion.

        options: fields of SamplingParams such as ``max_tokens=32``, `params` (a SamplingParams, over which they win), ``timeout_s``,
        ``priority``, ``affinity``, ``trace``, ``resume``, ``retries``: see RequestOptions and GenerateOptions.
        """
        return self._generate(self._asking.generate(model, prompt, options), stream=stream)

    @overload
    def chat(self, model: str, messages: Sequence[Turn], *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]) -> Stream: ...

    @overload
    def chat(self, model: str, messages: Sequence[Turn], *, stream: Literal[False], **options: Unpack[GenerateOptions]) -> Completion: ...

    def chat(self, model: str, messages: Sequence[Turn], *, stream: bool = True, **options: Any) -> Stream | Completion:
        """Answer a conversation, put into the model's own chat template. Options as in `generate`."""
        return self._generate(self._asking.chat(model, messages, options), stream=stream)

    def map(
        self,
        model: str,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        progress: Progress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Iterator[MapResult]:
        """Generate for many prompts, `concurrency` of them at once; yields one MapResult for each, with its answer or its error.

        ordered: in the prompts' order; otherwise as they end. progress: called after each end, as ``progress(ended, total)``; total is
        None where `prompts` has no length. options: as in `generate`, for each of them; give `retries` if queues may be full.
        Prompts are taken as there is room, and nothing new is asked while nobody takes results; while `prompts` makes the caller wait, no
        result is handed on (AsyncClient.map does, with an asynchronous iterator). Raises at once for wrong options.
        When its controller is lost, prompts look for another (or the same, when it is back) for `failover_s`; then, and at once when there
        was none at first, it raises ConnectionFailed, after the results of all that had been asked. Closing the iterator cancels what
        is open.
        """
        check_prompts(prompts, awaits=False)
        total = len(prompts) if isinstance(prompts, Sized) else None
        bulk = Bulk(self._asking.each(model, options), concurrency=concurrency, ordered=ordered, progress=progress, total=total)
        return self._map(bulk, iter(prompts))

    def embed(self, model: str, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> Array:
        """One vector per text: a float32 array of shape (texts, dimensions). Needs numpy (Unsupported says how to get it).

        options: fields of EmbedParams such as ``dimensions=64``, `params` (an EmbedParams, over which they win), and RequestOptions.
        """
        ask = self._asking.embed(model, texts, options)
        return array_of(self._answer(ask, Embedding), vectors_asked(ask))

    def count_tokens(self, model: str, prompt: str | Sequence[Turn], *, timeout_s: float | None = None) -> int:
        """How many tokens a prompt or conversation is, special tokens and chat template included."""
        return self._answer(self._asking.count_tokens(model, prompt, timeout_s), Tokens).count

    def model_details(self, model: str, *, timeout_s: float | None = None) -> ModelCard:
        """What one of the model's workers says about it."""
        return self._answer(self._asking.model_details(model, timeout_s), Details).card

    # --- the network ---------------------------------------------------------------------------

    def models(self, *, timeout_s: float | None = None) -> list[ServedModel]:
        """What is served, and by whom."""
        return [served(status) for status in self._answer(self._asking.models(timeout_s), Models).models]

    def status(self, *, timeout_s: float | None = None) -> ControllerStatus:
        """The controller's state: its workers, models, queues and counters."""
        return self._answer(self._asking.status(timeout_s), StatusReply).status

    def drain_worker(self, worker: str, grace_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """Let a worker finish what it runs, within `grace_s` (None: the controller's setting), and go. Returns how much it still runs."""
        return self._answer(self._asking.drain_worker(worker, grace_s, timeout_s), DrainReply).running

    # --- how -----------------------------------------------------------------------------------

    def _generate(self, ask: Ask, *, stream: bool) -> Stream | Completion:
        if check_switch("stream", stream):
            return Stream(self._connection, self._connection.open(ask, collect=False))
        return completed(self._finished(ask))

    def _answer(self, ask: Ask, kind: type[A]) -> A:
        """Ask and wait. The session sees to it that the end is an answer of this kind or an error."""
        end = self._finished(ask).end
        if isinstance(end, kind):
            return end
        raise cast("ZmqserveError", end)

    def _map(self, bulk: Bulk, prompts: Iterator[Prompt]) -> Iterator[MapResult]:
        arrivals = Arrivals()
        more = True
        try:
            while not bulk.idle or (more and bulk.failure is None):
                for index, call in arrivals.take():
                    bulk.end(index, call)
                takes = more and bulk.room
                if takes:
                    try:
                        index, ask = bulk.begin(next(prompts))
                    except StopIteration:
                        more = False
                    else:
                        if ask is not None:
                            self._begin(bulk, arrivals, index, ask)
                # One for one: while results are taken, others are on their way.
                if (result := bulk.next()) is not None:
                    yield result
                elif not takes and not bulk.idle:
                    self._connection.wait(arrivals)
            while (result := bulk.next()) is not None:
                yield result
            if bulk.failure is not None:
                raise bulk.failure
        finally:
            for call in list(arrivals.open):
                self._connection.cancel(call)

    def _begin(self, bulk: Bulk, arrivals: Arrivals, index: int, ask: Ask) -> None:
        try:
            arrivals.watch(index, self._connection.begin(ask, collect=True))
        except ZmqserveError as error:
            bulk.refuse(index, error)

    def _finished(self, ask: Ask) -> Call:
        """The request's call when it has ended. An interrupt cancels it."""
        call = self._connection.open(ask, collect=True)
        try:
            self._connection.wait(call)
        except BaseException:
            self._connection.cancel(call)
            raise
        return call
