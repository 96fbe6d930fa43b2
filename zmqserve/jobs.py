"""What passes between BaseModelWorker and a backend: the request as a job, and the deltas that answer it."""

from __future__ import annotations

from typing import TypeVar

from msgspec import Struct

from .errors import InvalidParameter, Unsupported
from .messages import CountTokens, Embed, Generate, TokenLogprob
from .resuming import check_resume


class Delta(Struct, frozen=True, gc=False):
    """What a backend yields: the next piece of choice `index`.

    `text` is new text only, never part of a character or of a stop string; it may be empty while ids arrive.
    `token_ids`: the ids that this delta stands for. `logprobs`: one entry per id, when asked for.
    `finish_reason` on the last delta of a choice: ``stop`` or ``length``; a generator that just ends means ``stop``.
    """

    text: str
    token_ids: list[int] | tuple[int, ...] = ()
    index: int = 0
    logprobs: list[TokenLogprob] | None = None
    finish_reason: str | None = None


class Vectors(Struct, frozen=True, gc=False):
    """What `embed` returns: `data` is float32, little-endian, row by row, of `shape` (texts, dimensions)."""

    data: bytes
    shape: tuple[int, int]
    prompt_tokens: int


class GenerateJob:
    """One Generate as its backend sees it. The backend sets `prompt_tokens` (and `cached_tokens`) before its last delta.

    `completion_tokens` are the ids of the deltas so far, those resumed included; a backend that has no ids sets it too.
    `deadline_s` is on the clock of time.monotonic, None without one.
    """

    __slots__ = ("cached_tokens", "completion_tokens", "deadline_s", "prompt_tokens", "request")

    def __init__(self, request: Generate, deadline_s: float | None = None) -> None:
        self.request = request
        self.deadline_s = deadline_s
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0

    def __repr__(self) -> str:
        return f"GenerateJob(rid={self.request.rid}, model={self.request.model!r})"


def _no_prompt(request: Generate | CountTokens) -> InvalidParameter:
    """The error for a request that has not just one prompt, or an empty one."""
    forms: dict[str, object] = {"prompt": request.prompt, "messages": request.messages}
    if isinstance(request, Generate):
        forms["token_ids"] = request.token_ids
    given = [name for name, value in forms.items() if value is not None]
    if len(given) != 1:
        names = " or ".join(given) or "none"
        return InvalidParameter(f"give exactly one of {', '.join(forms)}: got {names}", data={"parameter": "prompt", "given": given})
    return InvalidParameter(f"{given[0]} is empty: there is nothing to answer", data={"parameter": given[0]})


R = TypeVar("R", bound=Generate | Embed | CountTokens)


def checked(request: R) -> R:
    """The request, if it is one that can be answered at all. Raises InvalidParameter or Unsupported otherwise."""
    if isinstance(request, Embed):
        if not request.texts:
            raise InvalidParameter("texts is empty: give at least one text to embed", data={"parameter": "texts"})
        if "" in request.texts:
            position = request.texts.index("")
            raise InvalidParameter(f"texts[{position}] is empty: there is nothing to embed", data={"parameter": "texts"})
    else:
        ids = request.token_ids if isinstance(request, Generate) else None
        forms = (request.prompt, request.messages, ids)
        if forms.count(None) != 2 or not any(forms):
            raise _no_prompt(request)
        if isinstance(request, Generate) and request.token_ids is not None and len(request.token_ids) % 4:
            message = f"token_ids must be u32, 4 bytes each: got {len(request.token_ids)} bytes"
            raise InvalidParameter(message, data={"parameter": "token_ids"})
        if isinstance(request, Generate):
            check_resume(request)
    if not isinstance(request, CountTokens) and request.extra:
        reserved = sorted(request.extra)
        raise Unsupported(f"extra is reserved, nothing serves {', '.join(reserved)} yet", data={"parameters": reserved})
    return request
