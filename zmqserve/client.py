"""The client for programs that block: any number of threads may share one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, cast, overload

import zmq

from . import requests
from .call import Answer, Call, ClientRequest
from .config import CLIENT_ENDPOINT
from .connection import Connection
from .errors import InvalidEndpoint, InvalidParameter, MalformedMessage, Unsupported, ZmqserveError
from .messages import (
    ControllerStatus,
    Details,
    DrainReply,
    Embedding,
    Generate,
    ListModels,
    ModelCard,
    Models,
    Status,
    StatusReply,
    Tokens,
)
from .params import EmbedParams, SamplingParams
from .requests import EmbedOptions, Prompt, Routing, Sampling, Turn
from .results import Completion, ServedModel, served
from .sockets import SocketLimits, check_endpoint
from .stream import Stream, completed

if TYPE_CHECKING:
    from typing import TypeAlias, Unpack

    import numpy as np
    from numpy.typing import NDArray

    Vectors: TypeAlias = NDArray[np.float32]

ENDPOINTS_VARIABLE = "ZMQSERVE_CONTROLLER"
"""Environment variable for the controller's client endpoints; several are separated by commas."""

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%-]*")
"""What a host to connect to may be made of."""

A = TypeVar("A", bound=Answer)


class Client:
    """Asks a controller, and through it the workers.

    endpoints: the controller's client side, or several to try in order; None: ``ZMQSERVE_CONTROLLER``, else
    ``tcp://127.0.0.1:5570``. Nothing is sent before the first request.
    context: a ZeroMQ context to share (needed for ``inproc://``); None: one of its own.
    timeout_s: deadline of requests that name none; None: no deadline.
    connect_timeout_s: how long each endpoint may take to answer before ControllerUnreachable.
    ttl_s: the controller gives this client up after so much silence; the client does the same with a controller, by the ttl that that
    one tells (3 s by default), or this where it tells none.
    failover_s: requests under way whose controller was lost look for another (or the same, when it is back) for so long, then end
    as ControllerLost. New ones are tried at each endpoint once.
    resume: answers that have begun go on elsewhere, from where they were; False: they end with WorkerLost or ControllerLost.
    retries: how often a request is sent again that ends, before its first chunk, with an error that may pass (Overloaded, ...), each
    time after what the error's `retry_after_ms` says, within the deadline. Both stand for verbs that are not told otherwise.
    buffer_bytes: what may lie unread in one stream before it ends as SlowConsumer.
    name: shown by the controller.

    All verbs raise the errors of zmqserve.errors. Threads may share a client; a stream belongs to one thread.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        timeout_s: float | None = None,
        connect_timeout_s: float = 0.75,
        ttl_s: float = 3.0,
        failover_s: float = 10.0,
        resume: bool = True,
        retries: int = 0,
        buffer_bytes: int = 16 * 2**20,
        name: str = "",
    ) -> None:
        if endpoints is None:
            endpoints = os.environ.get(ENDPOINTS_VARIABLE, CLIENT_ENDPOINT).split(",")
        elif isinstance(endpoints, str):
            endpoints = [endpoints]
        self.endpoints = tuple(_to_connect(endpoint.strip()) for endpoint in endpoints)
        if not self.endpoints:
            raise InvalidParameter("endpoints is empty: name at least one controller", data={"parameter": "endpoints"})
        self._timeout_s = None if timeout_s is None else requests.check_duration("timeout_s", timeout_s)
        self._resume = requests.check_switch("resume", resume)
        self._retries = requests.check_count("retries", retries)
        self._connection = Connection(
            self.endpoints,
            context=context,
            name=name,
            ttl_s=requests.check_duration("ttl_s", ttl_s),
            connect_timeout_s=requests.check_duration("connect_timeout_s", connect_timeout_s),
            failover_s=requests.check_duration("failover_s", failover_s),
            buffer_bytes=buffer_bytes,
            limits=SocketLimits(),
        )

    def __repr__(self) -> str:
        return f"Client({', '.join(self.endpoints)}: {self._connection!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Cancel open requests and close the socket. Other threads' open verbs and streams end with an error."""
        self._connection.close()

    # --- answers -------------------------------------------------------------------------------

    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[True] = True,
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream: ...

    @overload
    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: Literal[False],
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion: ...

    def generate(
        self,
        model: str,
        prompt: Prompt,
        *,
        stream: bool = True,
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Any,
    ) -> Stream | Completion:
        """Continue a prompt: a text, its token ids, or messages. Returns a Stream, or with ``stream=False`` a Completion.

        params, and keywords such as ``max_tokens=32``, which win over it: see SamplingParams.
        timeout_s: the deadline, time in the queue included. priority: -100 to 100, lower is served first.
        affinity: requests with one key keep one worker, as far as load allows. trace: a W3C traceparent.
        resume, retries: see Client; None: as it says.
        """
        routing = self._routing(timeout_s, priority, affinity, trace, resume, retries)
        return self._generate(requests.generate(model, prompt, params, sampling, routing), routing, stream=stream)

    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Turn],
        *,
        stream: Literal[True] = True,
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Stream: ...

    @overload
    def chat(
        self,
        model: str,
        messages: Sequence[Turn],
        *,
        stream: Literal[False],
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Unpack[Sampling],
    ) -> Completion: ...

    def chat(
        self,
        model: str,
        messages: Sequence[Turn],
        *,
        stream: bool = True,
        params: SamplingParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
        **sampling: Any,
    ) -> Stream | Completion:
        """Answer a conversation, put into the model's own chat template. Options as in `generate`."""
        routing = self._routing(timeout_s, priority, affinity, trace, resume, retries)
        turns = requests.conversation(messages)
        return self._generate(requests.generate(model, turns, params, sampling, routing), routing, stream=stream)

    def embed(
        self,
        model: str,
        texts: Sequence[str],
        *,
        params: EmbedParams | None = None,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        retries: int | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Vectors:
        """One vector per text: a float32 array of shape (texts, dimensions). Needs numpy (Unsupported says how to get it)."""
        try:
            import numpy as np
        except ImportError:
            what = 'embed returns numpy arrays, and numpy is not installed: pip install "zmqserve[embeddings]"'
            raise Unsupported(what, data={"parameter": "embed"}) from None
        routing = self._routing(timeout_s, priority, affinity, trace, retries=retries)
        reply = self._ask(requests.embed(model, texts, params, options, routing), Embedding, routing)
        rows, columns = reply.shape
        if reply.dtype != "float32" or rows != len(texts) or columns < 0 or len(reply.data) != rows * columns * 4:
            what = f"{len(reply.data)} bytes of {reply.dtype} for {rows} x {columns}"
            raise MalformedMessage(f"the embedding of {len(texts)} texts is not one: {what}")
        return np.frombuffer(reply.data, dtype="<f4").reshape(rows, columns).astype(np.float32, copy=True)

    def count_tokens(self, model: str, prompt: str | Sequence[Turn], *, timeout_s: float | None = None) -> int:
        """How many tokens a prompt or conversation is, special tokens and chat template included."""
        routing = self._routing(timeout_s)
        return self._ask(requests.count_tokens(model, prompt, routing), Tokens, routing).count

    def model_details(self, model: str, *, timeout_s: float | None = None) -> ModelCard:
        """What one of the model's workers says about it."""
        routing = self._routing(timeout_s)
        return self._ask(requests.model_details(model, routing), Details, routing).card

    # --- the network ---------------------------------------------------------------------------

    def models(self) -> list[ServedModel]:
        """What is served, and by whom."""
        return [served(status) for status in self._ask(ListModels(requests.new_rid()), Models).models]

    def status(self) -> ControllerStatus:
        """The controller's state: its workers, models, queues and counters."""
        return self._ask(Status(requests.new_rid()), StatusReply).status

    def drain(self, worker: str, grace_s: float | None = None) -> int:
        """Let a worker finish what it runs, within `grace_s` (None: the controller's setting), and go. Returns how much it still runs."""
        return self._ask(requests.drain(worker, grace_s), DrainReply).running

    # --- how -----------------------------------------------------------------------------------

    def _routing(
        self,
        timeout_s: float | None = None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        resume: bool | None = None,
        retries: int | None = None,
    ) -> Routing:
        """With the client's defaults for what is None."""
        return Routing(
            self._timeout_s if timeout_s is None else timeout_s,
            priority,
            affinity,
            trace,
            resume=self._resume if resume is None else resume,
            retries=self._retries if retries is None else retries,
        )

    def _generate(self, request: Generate, routing: Routing, *, stream: bool) -> Stream | Completion:
        if stream:
            return Stream(self._connection, self._open(request, routing, collect=False))
        return completed(self._finished(request, routing))

    def _ask(self, request: ClientRequest, kind: type[A], routing: Routing | None = None) -> A:
        """Ask and wait. The session sees to it that the end is an answer of this kind or an error."""
        end = self._finished(request, routing or self._routing()).end
        if isinstance(end, kind):
            return end
        raise cast("ZmqserveError", end)

    def _finished(self, request: ClientRequest, routing: Routing) -> Call:
        """The request's call when it has ended. An interrupt cancels it."""
        call = self._open(request, routing, collect=True)
        try:
            self._connection.wait(call)
        except BaseException:
            self._connection.cancel(call)
            raise
        return call

    def _open(self, request: ClientRequest, routing: Routing, *, collect: bool) -> Call:
        timeout_s = None if routing.deadline_ms is None else routing.deadline_ms / 1000
        return self._connection.open(request, timeout_s=timeout_s, collect=collect, resume=routing.resume, retries=routing.retries)


def _to_connect(endpoint: str) -> str:
    """The endpoint, if a socket can be connected to it; InvalidEndpoint otherwise. A wrong one would look like an absent controller."""
    checked = check_endpoint(endpoint, bind=False)
    if checked.startswith("tcp://"):
        host = checked[6:].rpartition(":")[0]
        if host == "*":
            raise InvalidEndpoint(endpoint, "* is for binding; to connect, name the controller's host, like tcp://127.0.0.1:5570")
        if host[0] != "[" and _HOST.fullmatch(host) is None:
            raise InvalidEndpoint(endpoint, f"{host!r} is no host name or address")
    return checked
