"""From what a caller of the SDK gives to the message that asks for it. Whatever can be wrong is said here, before anything is sent."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypedDict

from .errors import InvalidParameter
from .jobs import checked
from .messages import MAX_NAME, MAX_RID, ChatMessage, CountTokens, Drain, Embed, Generate, ModelDetails, pack_ids
from .params import EmbedParams, Guided, SamplingParams, invalid

Turn: TypeAlias = ChatMessage | Mapping[str, str]
Prompt: TypeAlias = str | Sequence[int] | Sequence[Turn]
"""A text, its token ids, or a conversation."""

MAX_PRIORITY = 100
MAX_DEADLINE_MS = 2**53
_NO_LISTS = (Mapping, bytes, bytearray, memoryview)
"""They look like lists. The bytes of a text that was not decoded would pass for token ids."""


class Sampling(TypedDict, total=False):
    """The fields of SamplingParams as keywords, for type checkers and editors; `stop` may be one text."""

    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    stop: str | list[str]
    stop_token_ids: list[int]
    seed: int | None
    n: int
    logprobs: int | None
    echo: bool
    ignore_eos: bool
    skip_special_tokens: bool
    guided: Guided | None


class EmbedFields(TypedDict, total=False):
    """The fields of EmbedParams as keywords."""

    dimensions: int | None
    normalize: bool | None
    truncate_tokens: int | None


class Routing:
    """How a request is treated on its way; see RequestOptions. Raises InvalidParameter for what cannot be sent."""

    __slots__ = ("affinity", "deadline_ms", "priority", "resume", "retries", "trace")

    def __init__(
        self,
        timeout_s: float | None,
        priority: int = 0,
        affinity: str | None = None,
        trace: str | None = None,
        *,
        resume: bool = True,
        retries: int = 0,
    ) -> None:
        self.deadline_ms = None if timeout_s is None else math.ceil(check_duration("timeout_s", timeout_s) * 1000)
        if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise invalid("priority", priority, f"an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
        self.priority = priority
        self.affinity = None if affinity is None else check_label("affinity", affinity)
        self.trace = None if trace is None else check_label("trace", trace)
        self.resume = check_switch("resume", resume)
        self.retries = check_count("retries", retries)

    def __repr__(self) -> str:
        return f"Routing(deadline_ms={self.deadline_ms}, priority={self.priority}, affinity={self.affinity!r}, trace={self.trace!r})"


def new_rid() -> int:
    """A request id. It is a capability, which nobody may guess: 63 random bits, never 0."""
    return int.from_bytes(os.urandom(8)) & MAX_RID or new_rid()


def generate(model: str, prompt: Prompt, params: SamplingParams, routing: Routing) -> Generate:
    """The request for a streamed answer."""
    text, turns, ids = _split(prompt)
    # Whatever jobs.checked would find is found by now.
    return Generate(
        new_rid(),
        check_name("model", model),
        routing.priority,
        routing.deadline_ms,
        routing.affinity,
        trace=routing.trace,
        prompt=text,
        messages=turns,
        token_ids=ids,
        params=params,
    )


def embed(model: str, texts: Sequence[str], params: EmbedParams, routing: Routing) -> Embed:
    """The request for one vector per text."""
    if isinstance(texts, str) or not _is_list(texts):
        raise invalid("texts", texts, "a list of texts (put a single one into a list)")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise invalid(f"texts[{position}]", text, "a text")
    return checked(
        Embed(
            new_rid(),
            check_name("model", model),
            routing.priority,
            routing.deadline_ms,
            routing.affinity,
            trace=routing.trace,
            texts=[exact(text) for text in texts],
            params=params,
        )
    )


def count_tokens(model: str, prompt: str | Sequence[Turn], routing: Routing) -> CountTokens:
    """The request for the length of a prompt or conversation."""
    text, turns, ids = _split(prompt)
    if ids is not None:
        raise invalid("prompt", prompt, "a text or messages; token ids are counted already")
    name = check_name("model", model)
    return checked(CountTokens(new_rid(), name, deadline_ms=routing.deadline_ms, prompt=text, messages=turns))


def model_details(model: str, routing: Routing) -> ModelDetails:
    """The request for a model's card, from one of its workers."""
    return ModelDetails(new_rid(), check_name("model", model), deadline_ms=routing.deadline_ms)


def drain(worker: str, grace_s: float | None) -> Drain:
    """The request to let a worker finish and go."""
    grace_ms = None if grace_s is None else math.ceil(check_duration("grace_s", grace_s) * 1000)
    return Drain(new_rid(), check_name("worker", worker), grace_ms)


def conversation(messages: Sequence[Turn]) -> list[ChatMessage]:
    """Messages as the protocol says them. Keys other than role and content would change the answer, so they are not ignored."""
    if isinstance(messages, str | Mapping) or not _is_list(messages):
        raise invalid("messages", messages, "a list of messages")
    return [_turn(position, turn) for position, turn in enumerate(messages)]


def check_name(what: str, name: object) -> str:
    """`name`, if it can be a model's or worker's; InvalidParameter otherwise."""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise invalid(what, name, f"a name of 1 to {MAX_NAME} characters")
    return exact(name)


def check_label(what: str, label: object) -> str:
    """`label`, if it can stand beside a request; InvalidParameter otherwise."""
    if not isinstance(label, str) or len(label) > MAX_NAME:
        raise invalid(what, label, f"a text of at most {MAX_NAME} characters")
    label = exact(label)
    try:
        label.encode()
    except UnicodeEncodeError:
        raise invalid(what, label, "a text without lone surrogates, which are no characters") from None
    return label


def exact(text: str) -> str:
    """The same characters as a plain str: what is only derived from it, as numpy's texts are, has no form in msgpack."""
    return text if type(text) is str else str.__str__(text)


def check_duration(what: str, seconds: object) -> float:
    """`seconds`, if it is a time above zero that the protocol can say; InvalidParameter otherwise."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_DEADLINE_MS / 1000:
        raise invalid(what, seconds, "a number of seconds above 0")
    return float(seconds)


def check_wait(what: str, seconds: object) -> float:
    """`seconds`, if it is a time that somebody may wait, from zero; InvalidParameter otherwise."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds <= MAX_DEADLINE_MS / 1000:
        raise invalid(what, seconds, "a number of seconds from 0")
    return float(seconds)


def check_timeout(timeout_s: object) -> float | None:
    """`timeout_s`, if it is a time that somebody may wait, or None, which is no bound; InvalidParameter otherwise."""
    return None if timeout_s is None else check_wait("timeout_s", timeout_s)


def check_switch(what: str, value: object) -> bool:
    """`value`, if it is true or false; InvalidParameter otherwise."""
    if not isinstance(value, bool):
        raise invalid(what, value, "True or False")
    return value


def check_count(what: str, value: object) -> int:
    """`value`, if it is a number of times; InvalidParameter otherwise."""
    if type(value) is not int or value < 0:
        raise invalid(what, value, "an integer from 0")
    return value


def _split(prompt: Prompt) -> tuple[str | None, list[ChatMessage] | None, bytes | None]:
    """The prompt, which is not empty, in the field that is for its kind."""
    if not isinstance(prompt, str) and not _is_list(prompt):
        raise invalid("prompt", prompt, "a text, a list of token ids or a list of messages")
    if len(prompt) == 0:
        raise InvalidParameter("prompt is empty: there is nothing to answer", data={"parameter": "prompt"})
    if isinstance(prompt, str):
        return exact(prompt), None, None
    if isinstance(prompt[0], ChatMessage | Mapping):
        return None, [_turn(position, turn) for position, turn in enumerate(prompt)], None
    try:
        return None, None, pack_ids(prompt)  # type: ignore[arg-type]
    except (TypeError, OverflowError):
        raise invalid("prompt", prompt, "a text, a list of messages, or a list of token ids from 0 to 2**32 - 1") from None


def _is_list(value: object) -> bool:
    """Whether it has places that are counted: lists, tuples and arrays, but no mapping, set, generator or raw bytes."""
    return hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, _NO_LISTS)


def _turn(position: int, turn: object) -> ChatMessage:
    where = f"messages[{position}]"
    if isinstance(turn, Mapping):
        if set(turn) != {"role", "content"}:
            raise invalid(where, dict(turn), "a mapping of role and content, and nothing else")
        turn = ChatMessage(turn["role"], turn["content"])
    if not isinstance(turn, ChatMessage):
        raise invalid(where, turn, "a ChatMessage or a mapping of role and content")
    role = check_name(f"{where}.role", turn.role)
    if not isinstance(turn.content, str):
        raise invalid(f"{where}.content", turn.content, "a text")
    return ChatMessage(role, exact(turn.content))
