"""What a request may ask of a backend. Both travel as maps, so that a parameter which the reader does not know
is an error that names it, and never ignored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from itertools import compress
from operator import is_not, ne
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct
from msgspec.structs import astuple

from .errors import InvalidParameter

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 1024
MAX_STOP_TOTAL = 8192
"""Characters of all of them: a worker needs some hundred bytes for each."""


class _Range(NamedTuple):
    """What a number may be; an exclusive bound is written as the next float."""

    kind: type
    low: float
    high: float
    text: str


_ABOVE_ZERO = math.ulp(0.0)
_MAX_INT = 2**31 - 1
_RANGES: Mapping[str, _Range] = {
    "max_tokens": _Range(int, 1, _MAX_INT, "an integer >= 1"),
    "min_tokens": _Range(int, 0, _MAX_INT, "an integer >= 0"),
    "temperature": _Range(float, 0, 100, "a number from 0 to 100"),
    "top_p": _Range(float, _ABOVE_ZERO, 1, "a number above 0 and at most 1"),
    "top_k": _Range(int, 0, _MAX_INT, "an integer >= 0 (0: no limit)"),
    "min_p": _Range(float, 0, 1, "a number from 0 to 1"),
    "presence_penalty": _Range(float, -2, 2, "a number from -2 to 2"),
    "frequency_penalty": _Range(float, -2, 2, "a number from -2 to 2"),
    "repetition_penalty": _Range(float, _ABOVE_ZERO, 100, "a number above 0 and at most 100"),
    "seed": _Range(int, 0, 2**63 - 1, "an integer from 0 to 2**63 - 1"),
    "n": _Range(int, 1, 128, "an integer from 1 to 128"),
    "logprobs": _Range(int, 0, 100, "an integer from 0 to 100"),
    "dimensions": _Range(int, 1, 1_000_000, "an integer >= 1"),
    "truncate_tokens": _Range(int, 1, _MAX_INT, "an integer >= 1"),
}
_FLAGS = frozenset({"echo", "ignore_eos", "skip_special_tokens", "normalize"})


class Guided(Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """Guided decoding: exactly one of a JSON schema (as JSON text), a regular expression, a list of choices, a grammar (EBNF)."""

    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise invalid("guided", given, "exactly one of json, regex, choice and grammar")
        value = getattr(self, given[0])
        texts = value if given[0] == "choice" else [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise invalid(f"guided.{given[0]}", value, "a list of texts, none empty" if given[0] == "choice" else "a text, not empty")


class SamplingParams(Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """How to choose the next token and when to stop. Values are checked here, on the client and again on the worker.

    max_tokens: at most so many (from 1); None: what the context leaves. Those of a resumed answer count.
    min_tokens: no end-of-sequence token before so many (from 0, at most max_tokens).
    temperature: 0 (greedy) to 100; logits are divided by it.
    top_p: above 0, at most 1: only the likeliest tokens whose probabilities add up to it. 1: all.
    top_k: only so many of the likeliest tokens (from 0). 0: all.
    min_p: 0 to 1: only tokens at least so likely as this part of the likeliest one's probability. 0: all.
    presence_penalty, frequency_penalty: -2 to 2, taken off the logits of tokens that the answer has; the second once for each time.
    repetition_penalty: above 0, at most 100: logits of tokens that prompt or answer have are divided by it (multiplied, below 0). 1: none.
    stop: at most 64 texts of 1 to 1024 characters, 8192 in all, that end the answer and are not part of it.
    stop_token_ids: at most 1024 ids that end the answer, and are not part of its text.
    seed: 0 to 2**63 - 1; the same request with the same seed has the same answer, alone in its batch. None: another each time.
    n: how many answers to the prompt (1 to 128).
    logprobs: how many of the likeliest tokens to report at each position (0 to 100; 0: the chosen one only). None: nothing.
    echo: begin with the prompt's text.
    ignore_eos: go on after the model's end-of-sequence token.
    skip_special_tokens: leave special tokens out of the text.
    guided: what the answer must be like; see Guided.

    Raises InvalidParameter, which names the parameter, the value and the range.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: list[str] = []
    stop_token_ids: list[int] = []
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    guided: Guided | None = None

    def __post_init__(self) -> None:
        _check_scalars(self)
        stop = self.stop
        if not isinstance(stop, list) or (stop and (len(stop) > MAX_STOP_STRINGS or not all(_is_stop(text) for text in stop))):
            raise invalid("stop", stop, f"a list of at most {MAX_STOP_STRINGS} texts of 1 to {MAX_STOP_CHARACTERS} characters")
        if stop and (total := sum(map(len, stop))) > MAX_STOP_TOTAL:
            raise invalid("stop", stop, f"at most {MAX_STOP_TOTAL} characters long in all ({total} are given)")
        ids = self.stop_token_ids
        if not isinstance(ids, list) or (ids and (len(ids) > 1024 or not all(type(i) is int and 0 <= i < 2**32 for i in ids))):
            raise invalid("stop_token_ids", ids, "a list of at most 1024 token ids (0 to 2**32 - 1)")
        if self.guided is not None and not isinstance(self.guided, Guided):
            raise invalid("guided", self.guided, "a Guided")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise invalid("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")

    def changed(self) -> list[str]:
        """Names of the parameters that are not at their default: what a backend must honour or refuse."""
        return list(compress(self.__struct_fields__, map(ne, astuple(self), _DEFAULTS)))


class EmbedParams(Struct, frozen=True, gc=False, omit_defaults=True, forbid_unknown_fields=True):
    """`dimensions`: cut vectors to so many (None: all). `normalize`: to length 1 (None: as the model says).
    `truncate_tokens`: cut each text to so many tokens, the model's special ones counted; None: a text over the context is an error."""

    dimensions: int | None = None
    normalize: bool | None = None
    truncate_tokens: int | None = None

    def __post_init__(self) -> None:
        _check_scalars(self)


P = TypeVar("P", SamplingParams, EmbedParams)


def build(kind: type[P], base: P | None, changes: Mapping[str, Any]) -> P:
    """`base` (or the defaults) with `changes`. A name that is no parameter is an InvalidParameter that lists those there are."""
    for name in changes:
        if name not in kind.__struct_fields__:
            raise unknown(name, "a parameter", kind.__struct_fields__)
    if base is not None and not isinstance(base, kind):
        raise invalid("params", base, f"{'an' if kind is EmbedParams else 'a'} {kind.__name__}")
    if "stop" in changes and isinstance(changes["stop"], str):
        changes = {**changes, "stop": [changes["stop"]]}
    if base is None:
        return kind(**changes)
    return msgspec.structs.replace(base, **changes) if changes else base


def unknown(name: str, what: str, known: Iterable[str]) -> InvalidParameter:
    """The error for a name that is not one of `known`, with the one that was meant, most likely."""
    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return InvalidParameter(f"{name!r} is not {what}{hint}; known: {', '.join(known)}", data={"parameter": name, "known": known})


def _check_scalars(params: SamplingParams | EmbedParams) -> None:
    # Most are at their default. Found by identity, since True equals 1, and without a step of the interpreter for each.
    for name in compress(params.__struct_fields__, map(is_not, astuple(params), params.__struct_defaults__)):
        value = getattr(params, name)
        allowed = _RANGES.get(name)
        if allowed is not None:
            numeric = type(value) is int or (allowed.kind is float and type(value) is float)
            if not (numeric and allowed.low <= value <= allowed.high):
                raise invalid(name, value, allowed.text)
        elif name in _FLAGS and type(value) is not bool:
            raise invalid(name, value, "true or false")


def _is_stop(text: object) -> bool:
    return isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS


def invalid(name: str, value: object, expected: str) -> InvalidParameter:
    """The error for a value that a parameter cannot have; `expected` says what it can be."""
    shown = repr(value)
    if len(shown) > 100:
        shown = shown[:97] + "..."
    return InvalidParameter(f"{name} must be {expected}, got {shown}", data={"parameter": name, "value": shown})


_DEFAULTS = astuple(SamplingParams())
