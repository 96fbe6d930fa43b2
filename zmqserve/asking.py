"""From a caller's arguments to what is to be asked: the same for all clients, with what one client says for all its requests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any, NamedTuple, TypedDict, cast

from . import requests
from .call import ClientRequest
from .config import CLIENT_ENDPOINT
from .credentials import KeyFile, KeyFiles, credentials
from .errors import InvalidEndpoint, InvalidParameter, Unsupported
from .messages import Drain, Embed, ListModels, Status
from .params import EmbedParams, P, SamplingParams, build, invalid, unknown
from .peer import Wire
from .requests import EmbedFields, Prompt, Routing, Sampling, Turn, check_count, check_duration, check_label, check_switch
from .session import Session
from .sockets import check_endpoint

ENDPOINTS_VARIABLE = "ZMQSERVE_CONTROLLER"
"""Environment variable for the controller's client endpoints; several are separated by commas."""

MOST_KEPT = 256
"""How many different sets of options a client keeps checked."""

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%-]*")
"""What a host to connect to may be made of."""


class ClientOptions(TypedDict, total=False):
    """What every client may be told when it is made; durations are in seconds.

    timeout_s: deadline of requests that name none (default None: no deadline).
    connect_timeout_s: how long each endpoint may take to answer before ControllerUnreachable. After long silence the connection that
    there is has as long before (0.75).
    ttl_s: the controller gives this client up after so much silence; the client does the same with a controller, by the ttl that that
    one tells (3 s by default), or this where it tells none (3.0).
    failover_s: requests under way whose controller was lost look for another (or the same, when it is back) for so long, then end
    as ControllerLost. New ones are tried at each endpoint once, those of a `map` for so long, too (10.0).
    resume: answers that have begun go on elsewhere, from where they were; False: they end with WorkerLost or ControllerLost (True).
    retries: how often a request is sent again that ends, before its first chunk, with an error that may pass (Overloaded, ...), each
    time after what the error's `retry_after_ms` says, within the deadline (0).
    buffer_bytes: what may lie unread in one stream before it ends as SlowConsumer (16 MiB).
    name: shown by the controller ("").
    key, controller_key: files of keys, for CURVE: this client's pair, as `zmqserve keys new` makes it, and the public key of the
    controller's port for clients, one for all endpoints or one for each (those named by ``ZMQSERVE_KEY`` and ``ZMQSERVE_CONTROLLER_KEY``,
    if any).
    """

    timeout_s: float | None
    connect_timeout_s: float
    ttl_s: float
    failover_s: float
    resume: bool
    retries: int
    buffer_bytes: int
    name: str
    key: KeyFile | None
    controller_key: KeyFiles | None


class RequestOptions(TypedDict, total=False):
    """How one request is treated on its way.

    timeout_s: the deadline, time in the queue included (None: as the client says). priority: -100 to 100, lower is served first (0).
    affinity: requests with one key keep one worker, as far as load allows. trace: a W3C traceparent. retries: as the client says.
    """

    timeout_s: float | None
    priority: int
    affinity: str | None
    trace: str | None
    retries: int | None


class GenerateOptions(Sampling, RequestOptions, total=False):
    """Fields of SamplingParams, which win over `params`, and RequestOptions. `resume`: None is as the client says."""

    params: SamplingParams | None
    resume: bool | None


class EmbedOptions(EmbedFields, RequestOptions, total=False):
    """Fields of EmbedParams, which win over `params`, and RequestOptions."""

    params: EmbedParams | None


class Ask(NamedTuple):
    """A request, and what the session is to know of it; see Session.open."""

    request: ClientRequest
    timeout_s: float | None = None
    resume: bool = True
    retries: int = 0
    patient: bool = False


class Asking:
    """What one client says for all its requests. Raises InvalidParameter and InvalidEndpoint for what cannot be meant.

    endpoints: the controllers' client side, in the order in which they are tried; None: ``ZMQSERVE_CONTROLLER``, else
    ``tcp://127.0.0.1:5570``.
    """

    def __init__(self, endpoints: str | Sequence[str] | None, options: Mapping[str, Any]) -> None:
        for name in options:
            if name not in ClientOptions.__annotations__:
                raise unknown(name, "an option of a client", ClientOptions.__annotations__)
        if endpoints is None:
            endpoints = (os.environ.get(ENDPOINTS_VARIABLE) or CLIENT_ENDPOINT).split(",")
        elif isinstance(endpoints, str):
            endpoints = [endpoints]
        if not isinstance(endpoints, Sequence) or not all(isinstance(endpoint, str) for endpoint in endpoints):
            raise invalid("endpoints", endpoints, "an endpoint like tcp://127.0.0.1:5570, or a list of them")
        self.endpoints = tuple(_to_connect(endpoint.strip()) for endpoint in endpoints)
        if not self.endpoints:
            raise InvalidParameter("endpoints is empty: name at least one controller", data={"parameter": "endpoints"})
        self.credentials = credentials(options.get("key"), options.get("controller_key"), self.endpoints)
        timeout_s = options.get("timeout_s")
        self._timeout_s = None if timeout_s is None else check_duration("timeout_s", timeout_s)
        self._resume = check_switch("resume", options.get("resume", True))
        self._retries = check_count("retries", options.get("retries", 0))
        self.ttl_s = check_duration("ttl_s", options.get("ttl_s", 3.0))
        self._connect_timeout_s = check_duration("connect_timeout_s", options.get("connect_timeout_s", 0.75))
        self._failover_s = check_duration("failover_s", options.get("failover_s", 10.0))
        self._buffer_bytes = check_count("buffer_bytes", options.get("buffer_bytes", 16 * 2**20))
        self._name = check_label("name", options.get("name", ""))
        self._kept: dict[tuple[object, ...], tuple[Routing, Any]] = {}

    def __repr__(self) -> str:
        return f"Asking({', '.join(self.endpoints)})"

    def session(self, wire: Wire) -> Session:
        """A session with these controllers, over a wire."""
        return Session(
            wire,
            self.endpoints,
            random=Random(),
            name=self._name,
            ttl_s=self.ttl_s,
            connect_timeout_s=self._connect_timeout_s,
            failover_s=self._failover_s,
            buffer_bytes=self._buffer_bytes,
        )

    def generate(self, model: str, prompt: Prompt, options: Mapping[str, Any]) -> Ask:
        """A streamed answer to a prompt."""
        routing, params = self._checked(GenerateOptions, SamplingParams, options)
        return _ask(requests.generate(model, prompt, params, routing), routing)

    def chat(self, model: str, messages: Sequence[Turn], options: Mapping[str, Any]) -> Ask:
        """A streamed answer to a conversation."""
        return self.generate(model, requests.conversation(messages), options)

    def each(self, model: str, options: Mapping[str, Any]) -> Callable[[Prompt], Ask]:
        """What makes the request for each of many prompts. Raises at once for what is wrong with all of them."""
        routing, params = self._checked(GenerateOptions, SamplingParams, options)
        requests.check_name("model", model)
        return lambda prompt: _ask(requests.generate(model, prompt, params, routing), routing, patient=True)

    def embed(self, model: str, texts: Sequence[str], options: Mapping[str, Any]) -> Ask:
        """One vector per text. Raises Unsupported without numpy: the caller is to get an array."""
        try:
            import numpy as np  # noqa: F401 - better said now than after the work
        except ImportError:
            what = 'embed returns numpy arrays, and numpy is not installed: pip install "zmqserve[embeddings]"'
            raise Unsupported(what, data={"parameter": "embed"}) from None
        routing, params = self._checked(EmbedOptions, EmbedParams, options)
        return _ask(requests.embed(model, texts, params, routing), routing)

    def count_tokens(self, model: str, prompt: str | Sequence[Turn], timeout_s: float | None) -> Ask:
        """The length of a prompt."""
        routing = self._routing({"timeout_s": timeout_s})
        return _ask(requests.count_tokens(model, prompt, routing), routing)

    def model_details(self, model: str, timeout_s: float | None) -> Ask:
        """A model's card."""
        routing = self._routing({"timeout_s": timeout_s})
        return _ask(requests.model_details(model, routing), routing)

    def models(self, timeout_s: float | None) -> Ask:
        """What is served."""
        return _ask(ListModels(requests.new_rid()), self._routing({"timeout_s": timeout_s}))

    def status(self, timeout_s: float | None) -> Ask:
        """The controller's state."""
        return _ask(Status(requests.new_rid()), self._routing({"timeout_s": timeout_s}))

    def drain_worker(self, worker: str, grace_s: float | None, timeout_s: float | None) -> Ask:
        """To let a worker finish and go."""
        request: Drain = requests.drain(worker, grace_s)
        return _ask(request, self._routing({"timeout_s": timeout_s}))

    def _checked(self, known: type, kind: type[P], options: Mapping[str, Any]) -> tuple[Routing, P]:
        """How it is treated and its parameters. A set of options whose values can't change is checked the first time only."""
        types = tuple(map(type, options.values()))
        if not _PLAIN.issuperset(types):
            return self._split(known, kind, options)
        # With the types: True is equal to 1, and is no number of tokens.
        key = (kind, *options.items(), types)
        kept = self._kept.get(key)
        if kept is None:
            kept = self._split(known, kind, options)
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[key] = kept
        return kept

    def _split(self, known: type, kind: type[P], options: Mapping[str, Any]) -> tuple[Routing, P]:
        for name in options:
            if name not in known.__annotations__:
                raise unknown(name, "a parameter", sorted(known.__annotations__))
        routing = self._routing({name: options[name] for name in _ROUTING if name in options})
        fields = {name: value for name, value in options.items() if name not in _ROUTING and name != "params"}
        return routing, build(kind, options.get("params"), fields)

    def _routing(self, given: Mapping[str, Any]) -> Routing:
        """With the client's word for what is None."""
        told = {name: value for name, value in given.items() if value is not None}
        return Routing(**{"timeout_s": self._timeout_s, "resume": self._resume, "retries": self._retries} | told)


def vectors_asked(ask: Ask) -> int:
    """How many vectors are to come: by what was sent, since the caller's list may change meanwhile."""
    return len(cast("Embed", ask.request).texts)


_ROUTING = frozenset({*RequestOptions.__annotations__, "resume"})
_PLAIN = frozenset({type(None), bool, int, float, str})
"""Types whose values can't change and are equal to none that means something else, except to one of another of these types."""


def _ask(request: ClientRequest, routing: Routing, *, patient: bool = False) -> Ask:
    timeout_s = None if routing.deadline_ms is None else routing.deadline_ms / 1000
    return Ask(request, timeout_s, routing.resume, routing.retries, patient)


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
