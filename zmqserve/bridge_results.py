"""What a bridge gives a pipeline: maps in the encoding of their job, with its own id and metadata.

A result has ``error``, ``vectors`` or ``text``; a message with ``chunk`` is a piece of an answer whose job said ``stream``, and its result
comes after the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec.structs import asdict

from .bridge_jobs import JSON, Envelope
from .errors import ZmqserveError
from .messages import Timings, TokenLogprob, Usage
from .results import Completion, CompletionChoice, StreamChunk

if TYPE_CHECKING:
    from .results import Array


def of_answer(envelope: Envelope, model: str, answer: Completion) -> bytes:
    """A whole answer: `text`, `token_ids` and `finish_reason` of the first choice, all `choices` where there are more."""
    told: dict[str, Any] = {"model": model, **_choice(answer.choices[0])}
    if len(answer.choices) > 1:
        told["choices"] = [_choice(choice) for choice in answer.choices]
    told |= {"usage": asdict(answer.usage), "timings": asdict(answer.timings), "resumed": answer.resumed}
    return _encoded(envelope, told)


def of_vectors(envelope: Envelope, model: str, vectors: Array, usage: Usage, timings: Timings) -> bytes:
    """Vectors of `shape` (texts, dimensions): in msgpack raw little-endian float32, row by row; in JSON lists of numbers."""
    told = vectors.tolist() if envelope.encoding is JSON else vectors.astype("<f4").tobytes()
    how = {"shape": list(vectors.shape), "dtype": "float32", "usage": asdict(usage), "timings": asdict(timings)}
    return _encoded(envelope, {"model": model, "vectors": told, **how})


def of_chunk(envelope: Envelope, chunk: StreamChunk) -> bytes:
    """A piece of an answer; `seq` counts them from 0."""
    told = {"seq": chunk.seq, "index": chunk.index, "text": chunk.text, "token_ids": chunk.token_ids}
    if chunk.logprobs is not None:
        told["logprobs"] = _logprobs(chunk.logprobs)
    return _encoded(envelope, {"chunk": told})


def of_error(envelope: Envelope, error: ZmqserveError) -> bytes:
    """What went wrong; `name` is that of the class in errors.py, `retryable` whether the same job may work later."""
    told = {
        "code": error.code,
        "name": type(error).__name__,
        "message": error.message,
        "retryable": error.retryable,
        "data": dict(error.data),
    }
    return _encoded(envelope, {"error": told})


def _encoded(envelope: Envelope, told: Mapping[str, Any]) -> bytes:
    return envelope.encoding.encode({"id": envelope.id, "metadata": envelope.metadata, **told})


def _choice(choice: CompletionChoice) -> dict[str, Any]:
    told: dict[str, Any] = {"text": choice.text, "token_ids": choice.token_ids, "finish_reason": choice.finish_reason}
    if choice.logprobs is not None:
        told["logprobs"] = _logprobs(choice.logprobs)
    return told


def _logprobs(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [asdict(entry) | {"top": [asdict(top) for top in entry.top]} for entry in entries]
