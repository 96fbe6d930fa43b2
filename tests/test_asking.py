"""From a caller's options to a request: what was checked once is not checked again, and nothing that differs is taken for the same."""

from __future__ import annotations

from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.asking import MOST_KEPT, Ask, Asking
from zmqserve.errors import InvalidParameter
from zmqserve.params import EmbedParams, SamplingParams
from zmqserve.requests import new_rid


def generate(asking: Asking, **options: Any) -> tuple[Ask, m.Generate]:
    ask = asking.generate("m", "x", options)
    assert isinstance(ask.request, m.Generate)
    return ask, ask.request


@pytest.fixture
def asking() -> Asking:
    return Asking("tcp://127.0.0.1:5570", {"timeout_s": 7})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"max_tokens": 1}, {"max_tokens": True}),
        ({"max_tokens": 1}, {"max_tokens": 1.0}),
        ({"temperature": 1}, {"temperature": True}),
        ({"timeout_s": 1}, {"timeout_s": True}),
        ({"priority": 0}, {"priority": False}),
        ({"retries": 1}, {"retries": 1.0}),
        ({"resume": True}, {"resume": 1}),
        ({"echo": False}, {"echo": 0}),
        ({"max_tokens": 2, "min_tokens": 1}, {"max_tokens": 2, "min_tokens": True}),
    ],
)
def test_a_wrong_value_that_equals_a_right_one_is_refused_after_it_and_before(
    asking: Asking, right: dict[str, Any], wrong: dict[str, Any]
) -> None:
    assert right == wrong
    for _ in range(2):
        with pytest.raises(InvalidParameter):
            generate(asking, **wrong)
        generate(asking, **right)


def test_each_set_of_options_has_its_own_request(asking: Asking) -> None:
    sets: list[dict[str, Any]] = [
        {},
        {"max_tokens": 1},
        {"max_tokens": 2},
        {"top_k": 1},
        {"max_tokens": 1, "top_k": 2},
        {"max_tokens": 2, "top_k": 1},
        {"stop": "a"},
        {"stop": ["a", "b"]},
        {"seed": None},
        {"params": SamplingParams(top_k=9)},
        {"params": SamplingParams(top_k=9), "max_tokens": 1},
    ]
    expected = [
        SamplingParams(),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=2),
        SamplingParams(top_k=1),
        SamplingParams(max_tokens=1, top_k=2),
        SamplingParams(max_tokens=2, top_k=1),
        SamplingParams(stop=["a"]),
        SamplingParams(stop=["a", "b"]),
        SamplingParams(),
        SamplingParams(top_k=9),
        SamplingParams(top_k=9, max_tokens=1),
    ]
    for _ in range(3):
        assert [generate(asking, **options)[1].params for options in sets] == expected
    # Names that both verbs know, and none of either.
    assert [asking.embed("m", ["x"], options).request.params for options in ({}, {"priority": 1})] == [EmbedParams()] * 2  # type: ignore[union-attr]
    assert generate(asking, priority=1)[1].params == SamplingParams()


def test_how_it_is_treated_is_said_for_each_set_of_options(asking: Asking) -> None:
    for _ in range(2):
        ask, request = generate(asking, priority=-3, affinity="k", retries=2, resume=False)
        assert (ask.timeout_s, ask.retries, ask.resume) == (7.0, 2, False)
        assert (request.priority, request.affinity, request.deadline_ms) == (-3, "k", 7000)
        ask, request = generate(asking, timeout_s=0.5, priority=3)
        assert (ask.timeout_s, ask.retries, ask.resume) == (0.5, 0, True)
        assert (request.priority, request.affinity, request.deadline_ms) == (3, None, 500)
    assert generate(Asking(None, {}))[0].timeout_s is None


def test_what_a_caller_changes_between_two_requests_counts(asking: Asking) -> None:
    stop = ["a"]
    params = SamplingParams(stop=stop)
    assert generate(asking, stop=stop)[1].params.stop == ["a"]
    assert generate(asking, params=params)[1].params.stop == ["a"]
    stop.append("b")
    assert generate(asking, stop=stop)[1].params.stop == ["a", "b"]
    assert generate(asking, params=params)[1].params.stop == ["a", "b"]
    stop.append("")
    with pytest.raises(InvalidParameter, match="stop must be"):
        generate(asking, stop=stop)


def test_a_value_whose_equality_lies_is_checked_each_time(asking: Asking) -> None:
    class Chameleon(int):
        good = True

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return hash(1)

    generate(asking, max_tokens=1)
    with pytest.raises(InvalidParameter, match="max_tokens must be"):
        generate(asking, max_tokens=Chameleon(5))
    with pytest.raises(InvalidParameter, match="max_tokens must be"):
        generate(asking, max_tokens={1})


def test_what_is_wrong_stays_wrong(asking: Asking) -> None:
    for _ in range(3):
        with pytest.raises(InvalidParameter, match="max_tokens must be an integer >= 1, got 0"):
            generate(asking, max_tokens=0)
        with pytest.raises(InvalidParameter, match=r"did you mean 'max_tokens'"):
            generate(asking, max_token=1)
        with pytest.raises(InvalidParameter, match="'resume' is not a parameter"):
            asking.embed("m", ["x"], {"resume": True})


def test_endlessly_many_sets_of_options_are_not_kept(asking: Asking) -> None:
    for seed in range(3 * MOST_KEPT):
        assert generate(asking, seed=seed)[1].params.seed == seed
        assert len(asking._kept) <= MOST_KEPT


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(asking: Asking, prompt: Any) -> None:
    with pytest.raises(InvalidParameter, match="prompt is empty"):
        asking.generate("m", prompt, {})


def test_rids_are_of_63_bits_and_never_the_same() -> None:
    rids = {new_rid() for _ in range(10_000)}
    assert len(rids) == 10_000
    assert 0 < min(rids) < m.MAX_RID // 1000
    assert m.MAX_RID - m.MAX_RID // 1000 < max(rids) <= m.MAX_RID
