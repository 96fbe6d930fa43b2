"""Jobs as a bridge takes them from a pipeline: one msgpack or JSON map each, with an id and metadata that are the pipeline's own.

::

    {"id": 7, "metadata": {"row": 12}, "prompt": "a b c", "params": {"max_tokens": 5}}

Exactly one of ``prompt`` (a text), ``messages`` (a conversation), ``token_ids`` and ``texts`` (to be embedded); the rest may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import msgspec
from msgspec import Raw, Struct

from .errors import InvalidParameter, MalformedMessage, RequestError
from .params import EmbedParams, Guided, SamplingParams, unknown
from .requests import check_duration, check_name

_ASKS = ("prompt", "messages", "token_ids", "texts")
_ROUTING = ("priority", "affinity", "trace")


class _Labels(Struct):
    """What of a job is only passed through, whatever else is wrong with it."""

    id: Raw = Raw()
    metadata: Raw = Raw()


class _Fields(Struct, forbid_unknown_fields=True):
    id: Raw = Raw()
    metadata: Raw = Raw()
    model: str | None = None
    prompt: str | None = None
    messages: list[Any] | None = None
    token_ids: list[int] | None = None
    texts: list[str] | None = None
    params: dict[str, Any] | None = None
    timeout_s: float | None = None
    priority: int | None = None
    affinity: str | None = None
    trace: str | None = None
    stream: bool = False


class Encoding:
    """msgpack or JSON. `null` is how it writes nothing."""

    def __init__(self, name: str, codec: Any, null: bytes) -> None:
        self.name = name
        self.null = Raw(null)
        self.encode = cast("msgspec.msgpack.Encoder", codec.Encoder()).encode
        self.labels = cast("msgspec.msgpack.Decoder[_Labels]", codec.Decoder(_Labels)).decode
        self.fields = cast("msgspec.msgpack.Decoder[_Fields]", codec.Decoder(_Fields)).decode

    def __repr__(self) -> str:
        return f"Encoding({self.name!r})"


MSGPACK = Encoding("msgpack", msgspec.msgpack, b"\xc0")
JSON = Encoding("json", msgspec.json, b"null")


class Envelope(NamedTuple):
    """What goes back with each result of a job: its encoding, and its id and metadata as they stood there, byte for byte."""

    encoding: Encoding
    id: Raw
    metadata: Raw


class Job(NamedTuple):
    """What is asked. `options` are those of Client.generate, Client.chat or Client.embed; `ask` says which: the key that named the input.

    `timeout_s`: from when the job was taken; None: the bridge's.
    """

    model: str
    ask: str
    input: Any
    options: dict[str, Any]
    timeout_s: float | None
    stream: bool


def read(frames: Sequence[bytes], model: str | None, most_bytes: int) -> tuple[Envelope, Job | RequestError]:
    """A message as a job, or what is wrong with it. `model`: of jobs that name none; `most_bytes`: a larger job is refused."""
    payload = frames[-1]
    encoding = encoding_of(payload)
    labels: _Labels | _Fields
    found: Job | RequestError
    try:
        _check_size(frames, most_bytes)
        labels = fields = _decoded(encoding, payload)
        found = _job(fields, model)
    except RequestError as error:
        labels, found = _labels(encoding, payload), error
    return Envelope(encoding, _own(labels.id, encoding), _own(labels.metadata, encoding)), found


def encoding_of(payload: bytes) -> Encoding:
    """JSON is text that begins with ``{``, perhaps after white space; a msgpack map begins with a byte from 128. What is neither is
    answered in the encoding that is closer."""
    return MSGPACK if payload[:1] >= b"\x80" else JSON


def _decoded(encoding: Encoding, payload: bytes) -> _Fields:
    try:
        if encoding is JSON:
            payload.decode()  # what is passed through is not looked at otherwise
        return encoding.fields(payload)
    except UnicodeDecodeError:
        raise MalformedMessage("the job is neither a msgpack map nor JSON in UTF-8") from None
    except RecursionError:
        raise MalformedMessage("the job is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from None
    except msgspec.DecodeError as error:
        raise MalformedMessage(f"the job is not {encoding.name}: {error}") from None


def _explained(text: str) -> RequestError:
    """msgspec's words with our names: a job's keys are parameters to who wrote it."""
    strange = re.search(r"unknown field `(.+?)`", text)
    if strange is not None:
        return unknown(strange[1], "a key of a job", _Fields.__struct_fields__)
    wrong = re.search(r"(.*) - at `\$\.(.+?)`$", text)
    if wrong is not None:
        return InvalidParameter(f"{wrong[2]}: {wrong[1]}", data={"parameter": re.split(r"\W", wrong[2])[0]})
    return MalformedMessage(f"the job is not a map with texts as keys: {text}")


def _labels(encoding: Encoding, payload: bytes) -> _Labels:
    try:
        if encoding is JSON:
            payload.decode()
        return encoding.labels(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return _Labels()


def _own(label: Raw, encoding: Encoding) -> Raw:
    """A copy: the label alone would keep the whole job in memory."""
    return label.copy() if bytes(label) else encoding.null


def _check_size(frames: Sequence[bytes], most_bytes: int) -> None:
    if len(frames) > 1:
        raise MalformedMessage(f"a job is one frame, this message has {len(frames)}")
    size = len(frames[0])
    if size > most_bytes:
        what = f"the job is {size} bytes, this bridge takes at most {most_bytes}"
        raise InvalidParameter(what, data={"parameter": "job_bytes", "bytes": size, "limit_bytes": most_bytes})


def _job(fields: _Fields, model: str | None) -> Job:
    name = fields.model if fields.model is not None else model
    if name is None:
        raise InvalidParameter("the job names no model, and the bridge has no --model", data={"parameter": "model"})
    check_name("model", name)
    asks = [ask for ask in _ASKS if getattr(fields, ask) is not None]
    if len(asks) != 1:
        what = f"a job has exactly one of {', '.join(_ASKS)}; this one has {' and '.join(asks) or 'none'}"
        raise InvalidParameter(what, data={"parameter": asks[-1] if asks else "prompt"})
    (ask,) = asks
    if fields.stream and ask == "texts":
        raise InvalidParameter("stream must be false for texts: vectors come in one piece", data={"parameter": "stream"})
    timeout_s = None if fields.timeout_s is None else check_duration("timeout_s", fields.timeout_s)
    options = {routing: getattr(fields, routing) for routing in _ROUTING if getattr(fields, routing) is not None}
    return Job(name, ask, getattr(fields, ask), options | _params(fields.params or {}, ask), timeout_s, fields.stream)


def _params(params: dict[str, Any], ask: str) -> dict[str, Any]:
    """Parameters as keywords of the SDK, which says what is wrong with them. What it calls otherwise is no parameter here."""
    kind = EmbedParams if ask == "texts" else SamplingParams
    for name in params:
        if name not in kind.__struct_fields__:
            raise unknown(name, "a parameter", kind.__struct_fields__)
    if params.get("guided") is None:
        return params
    try:
        return params | {"guided": msgspec.convert(params["guided"], Guided)}
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, InvalidParameter):
            raise error.__cause__ from None
        raise InvalidParameter(f"guided: {error}", data={"parameter": "guided"}) from None
