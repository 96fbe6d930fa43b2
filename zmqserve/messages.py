"""Protocol version 1: every message that crosses a socket. This module is the protocol.

Two sockets, two framings (PROTOCOL.md is the same in prose, for other languages):

* client side: one payload frame, a msgpack array ``[tag, field, field, ...]``;
* worker side: two frames, a head (msgpack array ``[kind, epoch, ...]``) and a payload, which is
  empty where the kind needs none. A request's payload is the client's own message and an answer's
  payload is the message that the client gets: the controller passes both on untouched.

Rules of change: append fields with a default, never reorder, never reuse a tag or a kind. A reader
ignores array elements that it does not know. Token ids travel as little-endian u32 ``bytes``.
Durations are milliseconds in fields named ``*_ms``. Nothing is pickled and nothing is decoded as
``Any``. What flows per token is an array; what people read (cards, status, params) is a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeAlias, dataclass_transform

import msgspec
from msgspec import Meta, Struct

from .codec import decoder as decoder
from .codec import encode as encode
from .codec import pack_ids as pack_ids
from .codec import read as read
from .codec import unpack_ids as unpack_ids
from .params import EmbedParams, SamplingParams

PROTOCOL = 1
"""The version that this module speaks. A peer with another one is refused in its handshake."""

MAX_RID = 2**63 - 1
MAX_NAME = 256
"""Longest model, worker or controller name, in characters."""

MAX_PINGED = 100_000
"""Most rids in one Ping, and so most requests that one client may have open."""
MAX_MODELS = 1000
"""Most models that one worker may serve."""
MAX_SLOTS = 1_000_000
"""Most slots of one worker."""
MAX_SPEED = 1e9
"""The highest speed of one worker."""
MAX_LISTED = 100
"""Most verbs, features or aliases of one model."""
MOST_URGENT = -100
"""The priority that goes before all others."""

Rid: TypeAlias = Annotated[int, Meta(ge=1, le=MAX_RID)]
Name: TypeAlias = Annotated[str, Meta(min_length=1, max_length=MAX_NAME)]
Names: TypeAlias = Annotated[list[Name], Meta(max_length=MAX_LISTED)]
Label: TypeAlias = Annotated[str, Meta(max_length=MAX_NAME)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Millis: TypeAlias = Annotated[int, Meta(ge=1, le=2**53)]
Elapsed: TypeAlias = Annotated[float, Meta(ge=0)]
Priority: TypeAlias = Annotated[int, Meta(ge=MOST_URGENT, le=100)]
Scalar: TypeAlias = str | int | float | list[str]


# Told to type checkers again: they do not see that `frozen` is inherited.
@dataclass_transform(frozen_default=True)
class _Array(Struct, array_like=True, frozen=True, gc=False):
    """A struct that travels as an array of its fields, in order."""


@dataclass_transform(frozen_default=True)
class _Map(Struct, frozen=True, gc=False):
    """A struct that travels as a map; a reader ignores keys that it does not know."""


# --- parts of messages -------------------------------------------------------------------------


class ChatMessage(_Array):
    """One turn of a conversation; `role` is what the model's chat template knows (user, assistant, ...)."""

    role: Name
    content: str


class Resume(_Array):
    """What a client already holds of an answer whose worker was lost.

    `token_ids`: received ids (u32). `characters`: text delivered, in Unicode code points.
    `next_seq`: the seq that the next chunk must carry. `prompt_token_ids`: the prompt's ids, if known.
    """

    token_ids: bytes
    characters: Count
    next_seq: Count
    prompt_token_ids: bytes | None = None


class TopLogprob(_Array):
    """One of the likeliest tokens at a position."""

    token_id: int
    text: str
    logprob: float


class TokenLogprob(_Array):
    """The chosen token's log probability (natural logarithm) and the likeliest ones beside it."""

    token_id: int
    text: str
    logprob: float
    top: list[TopLogprob] = []


class Usage(_Array):
    """Tokens counted by the model's tokenizer; resumed tokens count as completion."""

    prompt_tokens: Count
    completion_tokens: Count
    cached_tokens: Count = 0


class Timings(_Array):
    """Where the time went, in ms: `queue_ms` waiting in controllers, the others from arrival at the worker."""

    worker: str
    queue_ms: float = 0.0
    first_ms: float = 0.0
    total_ms: float = 0.0


class Choice(_Array):
    """One whole answer of a request that was not streamed."""

    text: str
    token_ids: bytes
    finish_reason: str
    logprobs: list[TokenLogprob] | None = None


class ModelCard(_Map, omit_defaults=True):
    """A model as its worker offers it.

    `fingerprint` stands for tokenizer + weights + dtype: equal ones give equal tokens. `verbs` are what may be asked
    (``generate chat embed count_tokens model_details``), `features` what may be asked of them (``resume``, ``logprobs``, ...).
    `context_length` is in tokens, prompt and completion together; 0 when there is no bound. `resume`, with the feature of that name:
    how an answer goes on elsewhere, by parameter that is not at its default (``greedy`` for temperature 0, ``sampling`` above it
    without a seed): ``exact``, ``approximate`` or ``refused``; exact for what is not named.
    `slots`: how many of the worker's slots the model may have at a time; None: all of them.
    `fingerprints`: others beside `fingerprint` that workers below have, where the worker is a controller.
    """

    name: Name
    fingerprint: Label = ""
    context_length: Count = 0
    verbs: Names = []
    features: Names = []
    aliases: Names = []
    embedding_dim: Count = 0
    source: str = ""
    resume: dict[Label, Label] = {}
    slots: Annotated[int, Meta(ge=0, le=MAX_SLOTS)] | None = None
    fingerprints: Names = []


class Limits(_Map, omit_defaults=True):
    """What a controller accepts, told in its Welcome."""

    message_bytes: Count = 0
    queue_requests: Count = 0
    queue_bytes: Count = 0
    default_deadline_ms: Count = 0
    ttl_ms: Count = 0
    client_requests: Count = 0
    client_bytes: Count = 0


class WorkerStatus(_Map):
    """One worker as its controller sees it; `free` slots are what dispatch may still use, `controllers` the ids of all below it, `key`
    the name of the key that it registered with."""

    name: str
    backend: str
    state: str
    models: list[str]
    slots: int
    running: int
    others: int = 0
    free: int = 0
    speed: float = 1.0
    waiting: int = 0
    step_age_ms: float = 0.0
    heard_ms: float = 0.0
    up_s: float = 0.0
    finished: int = 0
    version: str = ""
    controllers: list[str] = []
    key: str = ""


class ModelStatus(_Map):
    """One model: its card, who serves it and what waits for it."""

    card: ModelCard
    state: str
    workers: list[str]
    running: int = 0
    waiting: int = 0
    waiting_bytes: int = 0
    slots: int = 0


class ControllerStatus(_Map):
    """A controller's whole state, as `zmqserve status` shows it. `counters` only ever rise. `key`: the name of the asker's key. One that
    is no admin's is shown its own requests and the models that it may use, with their load, and no counters."""

    controller: str
    version: str
    protocol: int
    dispatch: str
    up_s: float
    client_endpoints: list[str]
    worker_endpoints: list[str]
    workers: list[WorkerStatus]
    models: list[ModelStatus]
    clients: int = 0
    running: int = 0
    waiting: int = 0
    outbox_bytes: int = 0
    counters: dict[str, int] = {}
    key: str = ""


# --- client -> controller ----------------------------------------------------------------------


class Hello(_Array, tag=1):
    """First message of a client that wants to know its controller; answered by Welcome or Error."""

    protocol: int
    client: Label = ""


class _Request(_Array):
    """The leading fields of every request that a worker answers, which are all that a controller reads of it.

    `priority`: lower is served first. `deadline_ms` counts from arrival. `affinity`: requests with one key keep one worker.
    `attempts`: workers already lost by this request. `fingerprint`: only models with this one may serve (resume).
    `trace`: a W3C traceparent.
    """

    rid: Rid
    model: Name
    priority: Priority = 0
    deadline_ms: Millis | None = None
    affinity: Label | None = None
    attempts: Count = 0
    fingerprint: Label | None = None
    trace: Label | None = None


class Generate(_Request, tag=2):
    """Ask for an answer. Exactly one of `prompt`, `messages` and `token_ids` is set; `extra` is reserved and must be empty."""

    stream: bool = True
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    token_ids: bytes | None = None
    params: SamplingParams = SamplingParams()
    resume: Resume | None = None
    extra: dict[str, msgspec.Raw] | None = None


class Embed(_Request, tag=3):
    """Ask for one vector per text."""

    texts: list[str] = []
    params: EmbedParams = EmbedParams()
    extra: dict[str, msgspec.Raw] | None = None


class CountTokens(_Request, tag=4):
    """Ask how many tokens a prompt or conversation is, special tokens and chat template included."""

    prompt: str | None = None
    messages: list[ChatMessage] | None = None


class ModelDetails(_Request, tag=5):
    """Ask a worker of the model for its card."""


class ListModels(_Array, tag=6):
    """Ask which models are served."""

    rid: Rid


class Status(_Array, tag=7):
    """Ask for the controller's state."""

    rid: Rid


class Drain(_Array, tag=8):
    """Let a worker finish what it runs, give it nothing new, and let it go. `grace_ms`: after it the rest moves."""

    rid: Rid
    worker: Name
    grace_ms: Millis | None = None


class Cancel(_Array, tag=9):
    """Stop a request. It ends with Done(cancelled), or with what won the race. Harmless when it has ended."""

    rid: Rid


class Ping(_Array, tag=10):
    """Sent every second while requests are open: a client silent for `ttl_ms` is given up. `rids`: those it has open."""

    ttl_ms: Millis
    rids: Annotated[list[Rid], Meta(max_length=MAX_PINGED)] = []


# --- controller -> client ----------------------------------------------------------------------


class Welcome(_Array, tag=33):
    """The answer to Hello."""

    protocol: int
    controller: str
    limits: Limits
    version: str = ""


class Pong(_Array, tag=34):
    """The answer to Ping. `unknown`: the rids that this controller does not hold for this client."""

    controller: str
    unknown: list[int] = []


class GoAway(_Array, tag=35):
    """The controller is leaving: send nothing new here."""

    why: str


class Chunk(_Array, tag=36):
    """A piece of one answer: `text` is the delta, `index` the choice (n > 1), `seq` rises by one per request."""

    rid: int
    seq: int
    index: int
    text: str
    token_ids: bytes
    logprobs: list[TokenLogprob] | None = None


class FirstChunk(Chunk, tag=36):
    """A Chunk as a reader takes it, and as a worker sends the first of an answer (a resumed one too): with `fingerprint`, which
    stands for the model that makes the answer and is what a resume must ask for. Later chunks leave it out."""

    fingerprint: str | None = None


class Chunks(_Array, tag=37):
    """Chunks of any of this client's requests, made in one step of the worker."""

    chunks: list[Chunk]


class Done(_Array, tag=38):
    """The end of a streamed answer. `finish_reasons[i]` is choice i's: stop, length or cancelled.

    `seq` continues the chunks' count. `last`, if any, is the last chunk and carries the same seq.
    """

    rid: int
    seq: int
    finish_reasons: list[str]
    usage: Usage
    timings: Timings
    last: Chunk | None = None


class Reply(_Array, tag=39):
    """The whole answer of a request with ``stream=false``."""

    rid: int
    choices: list[Choice]
    usage: Usage
    timings: Timings


class Embedding(_Array, tag=40):
    """Vectors as raw little-endian bytes, row by row. `dtype` is float32; `shape` is (texts, dimensions)."""

    rid: int
    dtype: str
    shape: tuple[int, int]
    data: bytes
    usage: Usage
    timings: Timings


class Tokens(_Array, tag=41):
    """The answer to CountTokens. `context_length` as in ModelCard."""

    rid: int
    count: int
    context_length: int = 0


class Details(_Array, tag=42):
    """The answer to ModelDetails."""

    rid: int
    card: ModelCard


class Models(_Array, tag=43):
    """The answer to ListModels."""

    rid: int
    models: list[ModelStatus]


class StatusReply(_Array, tag=44):
    """The answer to Status."""

    rid: int
    status: ControllerStatus


class DrainReply(_Array, tag=45):
    """The answer to Drain: the worker was told; `running` requests are still on it."""

    rid: int
    worker: str
    running: int


class Error(_Array, tag=46):
    """A request's end without an answer; rid 0 where the request could not be told. `code`: see errors.py."""

    rid: int
    code: int
    message: str
    retryable: bool = False
    retry_after_ms: int | None = None
    data: dict[str, Scalar] = {}


# --- worker side -------------------------------------------------------------------------------

READY, LOAD, BUSY, DRAINING, BYE, FIRST, MORE, DONE, FAILED = range(65, 74)
"""Kinds that a worker sends. FIRST, MORE, DONE and FAILED carry a client's message as payload."""

WELCOME, REFUSED, REQUEST, CANCEL, BEAT, REREGISTER, DRAIN = range(97, 104)
"""Kinds that a controller sends to a worker."""


class WorkerHead(_Array):
    """Head of what a worker sends. `client` is the number that came with the request.

    `epoch` is the one that came with WELCOME. Before that it is 0; a READY that answers REREGISTER repeats its epoch.

    FIRST, DONE, FAILED and BUSY name their `rid`. DONE and FAILED say how the request ended, for the controller's books:
    `outcome` (a finish reason, or ``ok``), `code` (FAILED) and the tokens used.
    """

    kind: int
    epoch: Count
    client: Count = 0
    rid: Count = 0
    outcome: Label = ""
    code: int = 0
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class ControllerHead(_Array):
    """Head of what a controller sends to a worker. REQUEST: `deadline_ms` is what is left of it, `queue_ms` what it waited."""

    kind: int
    epoch: Count
    client: Count = 0
    rid: Count = 0
    deadline_ms: Millis | None = None
    attempts: Count = 0
    queue_ms: Elapsed = 0.0


class Ready(_Array):
    """Payload of READY: register me. A worker says it first with state ``loading`` and no slots, then ``ready``.

    `ttl_ms`: give me up after that much silence. `controllers`: ids of all controllers below, when the worker is one.
    """

    protocol: int
    name: Name
    backend: Label
    state: Label
    models: Annotated[list[ModelCard], Meta(max_length=MAX_MODELS)]
    slots: Annotated[int, Meta(ge=0, le=MAX_SLOTS)]
    speed: Annotated[float, Meta(gt=0, le=MAX_SPEED)]
    ttl_ms: Millis
    controllers: Names = []
    version: Label = ""


class Load(_Array):
    """Payload of LOAD, the worker's heartbeat. `yours` of the `running` are this controller's; `waiting` is the engine's queue."""

    running: Count
    waiting: Count
    yours: Count
    step_age_ms: Elapsed = 0.0


class WorkerWelcome(_Array):
    """Payload of WELCOME; the epoch is in its head. `ttl_ms`: give this controller up after that much silence.

    `message_bytes`: a larger message drops the connection; 0: not told.
    """

    protocol: int
    controller: Name
    ttl_ms: Millis
    version: Label = ""
    message_bytes: Count = 0


class Refused(_Array):
    """Payload of REFUSED. With `retry_after_ms` the worker may try again, without it must not with this offer."""

    code: int
    why: str
    retry_after_ms: Millis | None = None


# --- views: the leading fields only ------------------------------------------------------------


class Peek(_Array):
    """The tag of any client-side message and, in a request, its rid."""

    tag: int
    rid: int = 0


class RequestHeader(_Array):
    """What a controller reads of Generate, Embed, CountTokens and ModelDetails: the tag, then the fields of `_Request`."""

    tag: int
    rid: Rid
    model: Name
    priority: Priority = 0
    deadline_ms: Millis | None = None
    affinity: Label | None = None
    attempts: Count = 0
    fingerprint: Label | None = None
    trace: Label | None = None


Request: TypeAlias = Generate | Embed | CountTokens | ModelDetails
FromClient: TypeAlias = Request | Hello | ListModels | Status | Drain | Cancel | Ping
ToClient: TypeAlias = (
    Welcome | Pong | GoAway | FirstChunk | Chunks | Done | Reply | Embedding | Tokens | Details | Models | StatusReply | DrainReply | Error
)

VERBS: Mapping[int, str] = {2: "generate", 3: "embed", 4: "count_tokens", 5: "model_details"}
"""Tag of each request that a worker answers, and the verb that a ModelCard names it by."""


def more_head(epoch: int, client: int) -> bytes:
    """The one form of a MORE head that the controller's fast path knows: ``[71, epoch, client]``, shortest integers."""
    return encode((MORE, epoch, client))
