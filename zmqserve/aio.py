"""The client for asyncio: thousands of answers at once over one socket, on one event loop."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Iterable, Sequence, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

import zmq

from .answering import completed
from .asking import Ask, Asking, ClientOptions, EmbedOptions, GenerateOptions, vectors_asked
from .async_connection import AsyncConnection
from .async_prompts import Prompts
from .async_stream import AsyncStream
from .bulk import Arrivals, Bulk, Progress, check_prompts
from .call import Answer, Call
from .errors import ZmqserveError
from .forks import OneProcess
from .messages import ControllerStatus, Details, DrainReply, Embedding, ModelCard, Models, StatusReply, Tokens
from .requests import Prompt, Turn, check_switch
from .results import Completion, MapResult, ServedModel, array_of, served

if TYPE_CHECKING:
    from typing import Unpack

    from .results import Array

A = TypeVar("A", bound=Answer)


class AsyncClient(OneProcess):
    """Asks a controller, and through it the workers: the verbs of Client, to be awaited.

    endpoints: the controller's client side, or several to try in order; None: ``ZMQSERVE_CONTROLLER``, else
    ``tcp://127.0.0.1:5570``. Nothing is sent before the first request.
    context: a ZeroMQ context to share (needed for ``inproc://``), zmq.asyncio's, too; None: one of its own.
    options: see ClientOptions.

    It may be made anywhere and is then used on one event loop, by any number of tasks; a stream belongs to one of them at a time. A task
    that is cancelled while it waits for an answer cancels it on the worker, too. For signals, use the
    loop's ``add_signal_handler``. All verbs raise the errors of zmqserve.errors, and RuntimeError on another loop.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        self._asking = Asking(endpoints, options)
        self._connection = AsyncConnection(self._asking, context)

    def __repr__(self) -> str:
        return f"AsyncClient({', '.join(self.endpoints)}: {self._connection!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        await self.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its controllers are."""
        return self._asking.endpoints

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Take no new requests, wait until those that are open have ended, and close; what is open after `timeout_s` is cancelled.

        Returns whether all ended by themselves. What streams have received can still be read.
        """
        return await self._connection.drain(timeout_s)

    async def close(self) -> None:
        """Cancel open requests and close the socket. Other tasks' open verbs and streams end with an error."""
        await self._connection.close()

    # --- answers -------------------------------------------------------------------------------

    @overload
    def generate(self, model: str, prompt: Prompt, *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]) -> AsyncStream: ...

    @overload
    def generate(
        self, model: str, prompt: Prompt, *, stream: Literal[False], **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion]: ...

    def generate(self, model: str, prompt: Prompt, *, stream: bool = True, **options: Any) -> AsyncStream | Coroutine[Any, Any, Completion]:
        """Continue a prompt: a text, its token ids, or messages. Options as in Client.generate.

        Returns an AsyncStream, which may be awaited (it has been sent then), iterated or entered at once, or with ``stream=False``
        a coroutine of the Completion.
        """
        return self._generate(self._asking.generate(model, prompt, options), stream=stream)

    @overload
    def chat(
        self, model: str, messages: Sequence[Turn], *, stream: Literal[True] = True, **options: Unpack[GenerateOptions]
    ) -> AsyncStream: ...

    @overload
    def chat(
        self, model: str, messages: Sequence[Turn], *, stream: Literal[False], **options: Unpack[GenerateOptions]
    ) -> Coroutine[Any, Any, Completion]: ...

    def chat(
        self, model: str, messages: Sequence[Turn], *, stream: bool = True, **options: Any
    ) -> AsyncStream | Coroutine[Any, Any, Completion]:
        """Answer a conversation, put into the model's own chat template. Returns as `generate`."""
        return self._generate(self._asking.chat(model, messages, options), stream=stream)

    def map(
        self,
        model: str,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        progress: Progress | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncGenerator[MapResult, None]:
        """Generate for many prompts: Client.map for ``async for``. The prompts may come from an asynchronous iterator, too."""
        check_prompts(prompts, awaits=True)
        total = len(prompts) if isinstance(prompts, Sized) else None
        bulk = Bulk(self._asking.each(model, options), concurrency=concurrency, ordered=ordered, progress=progress, total=total)
        return self._map(bulk, Prompts(prompts))

    def embed(self, model: str, texts: Sequence[str], **options: Unpack[EmbedOptions]) -> Coroutine[Any, Any, Array]:
        """One vector per text: a coroutine of a float32 array of shape (texts, dimensions). Options as in Client.embed."""
        return self._vectors(self._asking.embed(model, texts, options))

    async def count_tokens(self, model: str, prompt: str | Sequence[Turn], *, timeout_s: float | None = None) -> int:
        """How many tokens a prompt or conversation is, special tokens and chat template included."""
        return (await self._answer(self._asking.count_tokens(model, prompt, timeout_s), Tokens)).count

    async def model_details(self, model: str, *, timeout_s: float | None = None) -> ModelCard:
        """What one of the model's workers says about it."""
        return (await self._answer(self._asking.model_details(model, timeout_s), Details)).card

    # --- the network ---------------------------------------------------------------------------

    async def models(self, *, timeout_s: float | None = None) -> list[ServedModel]:
        """What is served, and by whom."""
        return [served(status) for status in (await self._answer(self._asking.models(timeout_s), Models)).models]

    async def status(self, *, timeout_s: float | None = None) -> ControllerStatus:
        """The controller's state: its workers, models, queues and counters."""
        return (await self._answer(self._asking.status(timeout_s), StatusReply)).status

    async def drain_worker(self, worker: str, grace_s: float | None = None, *, timeout_s: float | None = None) -> int:
        """Let a worker finish what it runs, within `grace_s` (None: the controller's setting), and go. Returns how much it still runs."""
        return (await self._answer(self._asking.drain_worker(worker, grace_s, timeout_s), DrainReply)).running

    # --- how -----------------------------------------------------------------------------------

    def _generate(self, ask: Ask, *, stream: bool) -> AsyncStream | Coroutine[Any, Any, Completion]:
        return AsyncStream(self._connection, ask) if check_switch("stream", stream) else self._completion(ask)

    async def _completion(self, ask: Ask) -> Completion:
        return completed(await self._finished(ask))

    async def _vectors(self, ask: Ask) -> Array:
        return array_of(await self._answer(ask, Embedding), vectors_asked(ask))

    async def _answer(self, ask: Ask, kind: type[A]) -> A:
        """Ask and wait. The session sees to it that the end is an answer of this kind or an error."""
        end = (await self._finished(ask)).end
        if isinstance(end, kind):
            return end
        raise cast("ZmqserveError", end)

    async def _map(self, bulk: Bulk, prompts: Prompts) -> AsyncGenerator[MapResult, None]:
        arrivals = Arrivals()
        try:
            while not bulk.idle or not (prompts.over or bulk.failure is not None):
                for index, call in arrivals.take():
                    bulk.end(index, call)
                takes = bulk.room and prompts.take()
                if takes:
                    index, ask = bulk.begin(prompts.taken)
                    if ask is not None:
                        self._begin(bulk, arrivals, index, ask)
                # One for one: while results are taken, others are on their way.
                if (result := bulk.next()) is not None:
                    yield result
                elif takes:
                    continue
                elif bulk.room and prompts.awaited:
                    await prompts.wait(self._connection.wait(arrivals))
                elif not bulk.idle:
                    await self._connection.wait(arrivals)
            while (result := bulk.next()) is not None:
                yield result
            if bulk.failure is not None:
                raise bulk.failure
        finally:
            for call in list(arrivals.open):
                self._connection.cancel(call)
            await prompts.close()

    def _begin(self, bulk: Bulk, arrivals: Arrivals, index: int, ask: Ask) -> None:
        try:
            arrivals.watch(index, self._connection.begin(ask, collect=True, later=True))
        except ZmqserveError as error:
            bulk.refuse(index, error)

    async def _finished(self, ask: Ask) -> Call:
        """The request's call when it has ended. Whoever is cancelled meanwhile cancels it."""
        call = self._connection.begin(ask, collect=True, later=True)
        try:
            await self._connection.wait(call)
        except BaseException:
            self._connection.cancel(call)
            raise
        return call
