"""Parameters: the same check on the client (constructor) and on the worker (wire), with a message that names name, value and range."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqserve import messages, params
from zmqserve.errors import InvalidParameter
from zmqserve.params import EmbedParams, Guided, SamplingParams, build

Kind = type[Any]

TINY = math.ulp(0.0)
BIG = 2**31 - 1
RANGES: list[tuple[Kind, str, list[Any], list[Any]]] = [
    (SamplingParams, "max_tokens", [None, 1, BIG], [0, -1, BIG + 1, 1.5, "5", True]),
    (SamplingParams, "min_tokens", [0, 5, BIG], [-1, BIG + 1, 0.5, None, False]),
    (SamplingParams, "temperature", [0, 0.0, 0.7, 1, 100], [-0.1, 100.1, math.nan, math.inf, "hot", True, None]),
    (SamplingParams, "top_p", [TINY, 0.5, 1, 1.0], [0, 0.0, 1.1, -1, math.nan, None]),
    (SamplingParams, "top_k", [0, 1, BIG], [-1, 1.5, None]),
    (SamplingParams, "min_p", [0, 0.5, 1], [-0.1, 1.1, math.nan]),
    (SamplingParams, "presence_penalty", [-2, 0, 2], [-2.1, 2.1]),
    (SamplingParams, "frequency_penalty", [-2, 0, 2], [-2.1, 2.1]),
    (SamplingParams, "repetition_penalty", [TINY, 1, 100], [0, -1, 100.5]),
    (SamplingParams, "seed", [None, 0, 2**63 - 1], [-1, 2**63, 0.5]),
    (SamplingParams, "n", [1, 128], [0, 129, 1.0]),
    (SamplingParams, "logprobs", [None, 0, 100], [-1, 101, True]),
    (SamplingParams, "echo", [True, False], [1, "yes", None]),
    (SamplingParams, "ignore_eos", [True, False], [0, None]),
    (SamplingParams, "skip_special_tokens", [True, False], [1, None]),
    (
        SamplingParams,
        "stop",
        [[], ["a"], ["é" * 1024], ["x"] * 64, ["x" * 1024] * 8, ["x" * 128] * 64],
        [[""], ["y" * 1025], ["x"] * 65, [*["x" * 1024] * 8, "y"], "x", [1], None],
    ),
    (SamplingParams, "stop_token_ids", [[], [0, 2**32 - 1], [1] * 1024], [[-1], [2**32], [1] * 1025, [1.5], [True], None]),
    (EmbedParams, "dimensions", [None, 1, 1_000_000], [0, 1_000_001, 1.5]),
    (EmbedParams, "normalize", [None, True, False], [1, "yes"]),
    (EmbedParams, "truncate_tokens", [None, 1, BIG], [0, -1, 2.5]),
]
GOOD = [(kind, name, value) for kind, name, values, _ in RANGES for value in values]
BAD = [(kind, name, value) for kind, name, _, values in RANGES for value in values]


def over_the_wire(kind: Kind, fields: dict[str, Any]) -> Any:
    """What a worker reads when a client in another language sends this map inside a request."""
    routed: list[Any] = [1, "m", 0, None, None, 0, None, None]
    request = [3, *routed, ["x"], fields] if kind is EmbedParams else [2, *routed, True, "x", None, None, fields]
    return messages.read(messages.decoder(messages.Request), messages.encode(request)).params


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def test_every_parameter_has_a_range_here() -> None:
    listed = {(kind, name) for kind, name, _, _ in RANGES}
    fields = {(kind, name) for kind in (SamplingParams, EmbedParams) for name in kind.__struct_fields__}
    assert listed == fields - {(SamplingParams, "guided")}


@pytest.mark.parametrize(("kind", "name", "value"), GOOD)
def test_a_value_in_range_is_taken_by_constructor_and_wire_alike(kind: Kind, name: str, value: Any) -> None:
    assert getattr(kind(**{name: value}), name) == value
    assert getattr(build(kind, None, {name: value}), name) == value
    assert over_the_wire(kind, {name: value}) == kind(**{name: value})


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_a_value_out_of_range_is_refused_with_its_name_and_itself(kind: Kind, name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        kind(**{name: value})
    assert str(caught.value).startswith(f"{name} must be ")
    assert str(caught.value).endswith(f", got {shown(value)}")
    assert caught.value.parameter == name
    assert caught.value.data["value"] == shown(value)


@pytest.mark.parametrize(("kind", "name", "value"), BAD)
def test_the_wire_refuses_what_the_constructor_refuses(kind: Kind, name: str, value: Any) -> None:
    """A wrong type is already refused by the decoder, which names the field; a wrong value by the same check as above."""
    with pytest.raises(InvalidParameter, match=rf"^{name}\b") as caught:
        over_the_wire(kind, {name: value})
    assert caught.value.parameter == name


@pytest.mark.parametrize(("name", "text"), [(name, allowed.text) for name, allowed in params._RANGES.items()])
def test_the_message_says_the_range(name: str, text: str) -> None:
    kind: Kind = SamplingParams if name in SamplingParams.__struct_fields__ else EmbedParams
    with pytest.raises(InvalidParameter, match=r" must be ") as caught:
        kind(**{name: -999})
    assert str(caught.value) == f"{name} must be {text}, got -999"


def test_min_tokens_over_max_tokens_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"min_tokens must be at most max_tokens \(3\), got 4"):
        SamplingParams(max_tokens=3, min_tokens=4)


@pytest.mark.parametrize("fields", [{}, {"json": "{}", "regex": "a"}])
def test_guided_decoding_takes_exactly_one_form(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match="exactly one of json, regex, choice and grammar"):
        Guided(**fields)
    with pytest.raises(InvalidParameter, match="exactly one of json, regex, choice and grammar"):
        over_the_wire(SamplingParams, {"guided": fields})


@pytest.mark.parametrize(
    "fields", [{"json": 5}, {"regex": ""}, {"choice": []}, {"choice": "yes"}, {"choice": ["yes", ""]}, {"grammar": b"x"}]
)
def test_guided_decoding_takes_texts_only(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=r"guided\.\w+ must be a (list of )?text"):
        Guided(**fields)
    with pytest.raises(InvalidParameter, match=r"^guided"):
        over_the_wire(SamplingParams, {"guided": fields})


def test_guided_must_be_guided() -> None:
    value: Any = {"json": "{}"}
    with pytest.raises(InvalidParameter, match=r"guided must be a Guided, got \{'json'"):
        SamplingParams(guided=value)


def test_an_unknown_parameter_is_named_on_both_ways() -> None:
    with pytest.raises(InvalidParameter, match="'beam_width' is not a parameter; known: max_tokens, ") as built:
        build(SamplingParams, None, {"beam_width": 4})
    assert built.value.parameter == "beam_width"
    with pytest.raises(InvalidParameter, match="'beam_width' is not a parameter") as read:
        over_the_wire(SamplingParams, {"beam_width": 4})
    assert read.value.parameter == "beam_width"
    with pytest.raises(InvalidParameter, match="'dtype' is not a parameter"):
        over_the_wire(EmbedParams, {"dtype": "float16"})
    with pytest.raises(InvalidParameter, match="'lark' is not a parameter"):
        over_the_wire(SamplingParams, {"guided": {"lark": "x"}})


def test_build_puts_changes_over_a_base_and_checks_them() -> None:
    base = SamplingParams(max_tokens=5, temperature=0.0)
    assert build(SamplingParams, base, {"seed": 1}) == SamplingParams(max_tokens=5, temperature=0.0, seed=1)
    assert build(SamplingParams, base, {}) is base
    assert build(SamplingParams, None, {"stop": "END"}).stop == ["END"]
    with pytest.raises(InvalidParameter, match="top_p must be"):
        build(SamplingParams, base, {"top_p": 2})


def test_changed_names_what_a_backend_must_honour_or_refuse() -> None:
    assert SamplingParams().changed() == []
    assert SamplingParams(temperature=1.0, stop=[]).changed() == []
    assert SamplingParams(seed=0, stop=["x"], temperature=0.0).changed() == ["temperature", "stop", "seed"]


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(stop=["y" * 5000])
    assert len(str(caught.value)) < 300


VALUES = st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=5) | st.booleans() | st.lists(st.integers(-2, 2**33))


@given(st.dictionaries(st.sampled_from(SamplingParams.__struct_fields__), VALUES))
def test_constructor_and_wire_never_disagree(fields: dict[str, Any]) -> None:
    """Whatever the values: both take them and read the same, or both refuse with a typed error."""
    try:
        built: SamplingParams | None = SamplingParams(**fields)
    except InvalidParameter:
        built = None
    try:
        read = over_the_wire(SamplingParams, fields)
    except InvalidParameter:
        read = None
    assert read == built
