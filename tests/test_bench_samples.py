"""What `bench serve` asks and when: seeded, of the lengths that were meant, at the rate that was meant."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from bench.serve_arrivals import arrivals
from bench.serve_samples import RandomLengths, conversations, random_samples, range_ratio, sharegpt_samples

COUNT = 4000


def gaps(request_rate: float, burstiness: float, seed: int = 0) -> list[float]:
    due = arrivals(COUNT, request_rate, burstiness, seed)
    assert due == sorted(due)
    return [later - sooner for sooner, later in pairwise([0.0, *due])]


# --- arrivals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float) -> None:
    found = gaps(20.0, burstiness)
    assert statistics.mean(found) == pytest.approx(1 / 20)
    # A gamma distribution of shape k has a coefficient of variation of 1 / sqrt(k).
    assert statistics.stdev(found) * 20 == pytest.approx(1 / math.sqrt(burstiness), rel=0.1)


def test_gaps_of_a_poisson_process_are_exponential() -> None:
    found = gaps(10.0, 1.0)
    for share in (0.25, 0.5, 0.9):
        assert sum(gap <= -math.log(1 - share) / 10 for gap in found) / COUNT == pytest.approx(share, abs=0.03)


def test_infinite_burstiness_is_even_and_an_infinite_rate_is_at_once() -> None:
    assert arrivals(3, 10.0, math.inf, 0) == pytest.approx([0.1, 0.2, 0.3])
    assert arrivals(3, math.inf, 1.0, 0) == [0.0] * 3


def test_arrivals_are_of_the_seed() -> None:
    assert arrivals(50, 5.0, 1.0, 7) == arrivals(50, 5.0, 1.0, 7)
    assert arrivals(50, 5.0, 1.0, 7) != arrivals(50, 5.0, 1.0, 8)


# --- random prompts ----------------------------------------------------------------------------


def test_lengths_are_even_between_their_limits() -> None:
    samples = random_samples(COUNT, RandomLengths(100, 40, 0.3, 0.5, 0), range(1000, 2000), "ids", 1)
    inputs, outputs = [each.input_tokens for each in samples], [each.output_tokens for each in samples]
    assert (min(inputs), max(inputs), min(outputs), max(outputs)) == (70, 130, 20, 60)
    assert statistics.mean(inputs) == pytest.approx(100, rel=0.02)
    assert all(len(each.prompt) == each.input_tokens for each in samples)


def test_without_a_ratio_all_are_equal_and_an_output_is_one_token_at_least() -> None:
    samples = random_samples(20, RandomLengths(8, 1, 0.0, 0.9, 0), range(10), "ids", 1)
    assert {each.input_tokens for each in samples} == {8}
    assert {each.output_tokens for each in samples} == {1, 2}


def test_ids_are_of_the_range_and_prompts_share_the_prefix_alone() -> None:
    samples = random_samples(50, RandomLengths(16, 4, 0.0, 0.0, 5), range(1000, 32_000), "ids", 3)
    assert all(1000 <= int(token) < 32_000 for each in samples for token in each.prompt)
    assert len({tuple(each.prompt[:5]) for each in samples}) == 1
    assert len({tuple(each.prompt[5:9]) for each in samples}) == 50
    assert {each.input_tokens for each in samples} == {21}


def test_texts_have_as_many_words_and_a_conversation_is_one_turn() -> None:
    sample = random_samples(1, RandomLengths(12, 4, 0.0, 0.0, 2), range(10), "text", 3)[0]
    assert isinstance(sample.prompt, str)
    assert len(sample.prompt.split()) == sample.input_tokens == 14
    assert sample.as_prompt("chat") == [{"role": "user", "content": sample.prompt}]


def test_samples_are_of_the_seed() -> None:
    def drawn(seed: int) -> object:
        return random_samples(10, RandomLengths(10, 10, 0.5, 0.5, 0), range(100, 999), "ids", seed)

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


@pytest.mark.parametrize(("value", "ratios"), [("0.5", (0.5, 0.5)), ('{"input": 0.3, "output": 0.1}', (0.3, 0.1))])
def test_range_ratios(value: str, ratios: tuple[float, float]) -> None:
    assert range_ratio(value) == ratios


@pytest.mark.parametrize("value", ["1", "-0.1", "x", '{"input": 0.3}', "[1]"])
def test_range_ratios_that_cannot_be_meant(value: str) -> None:
    with pytest.raises(ValueError, match="is n"):
        range_ratio(value)


# --- conversations -----------------------------------------------------------------------------


def turns(*texts: str) -> dict[str, object]:
    return {"id": "x", "conversations": [{"from": "human", "value": text} for text in texts]}


def words(texts: object) -> list[int]:
    assert isinstance(texts, list)
    return [len(text.split()) for text in texts]


@pytest.mark.parametrize("lines", [True, False])
def test_a_file_is_an_array_or_lines(tmp_path: Path, lines: bool) -> None:
    entries = [turns("a b c d", "e f g h"), turns("alone"), turns("i", "j", "k")]
    path = tmp_path / "file"
    path.write_text("\n".join(map(json.dumps, entries)) + "\n\n" if lines else json.dumps(entries))
    assert conversations(path, 0, shuffle=False) == [("a b c d", "e f g h"), ("i", "j")]


@pytest.mark.parametrize(
    ("text", "why"),
    [("[1", "not JSON"), ('{"conversations": 1}', "line 1: not a conversation"), ("{}\nx", "line 2 is not JSON"), ("", "no conversation")],
)
def test_a_file_that_is_something_else_is_told_where(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(ValueError, match=why):
        conversations(path, 0)


def test_conversations_that_are_too_short_or_long_are_left_out() -> None:
    found = [("w " * n, "v " * m) for n, m in ((3, 9), (4, 4), (9, 3), (1025, 9), (1024, 1025), (1024, 1024))]
    samples = sharegpt_samples(found, 6, None, words, 0, oversample=False)
    assert [(each.input_tokens, each.output_tokens) for each in samples] == [(4, 4), (1024, 1024)]
    fixed = sharegpt_samples(found, 6, 2, words, 0, oversample=False)
    assert [(each.input_tokens, each.output_tokens) for each in fixed] == [(4, 2), (9, 2), (1024, 2), (1024, 2)]


def test_a_small_file_is_asked_again() -> None:
    found = [("a b c d", "e f g h"), ("i j k l m", "n o p q")]
    samples = sharegpt_samples(found, 10, None, words, 0)
    assert len(samples) == 10
    assert {each.input_tokens for each in samples} == {4, 5}
    with pytest.raises(ValueError, match="no conversation fits"):
        sharegpt_samples([("a", "b")], 10, None, words, 0)


def test_the_order_is_of_the_seed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(json.dumps([turns(str(number), "x") for number in range(30)]))
    assert conversations(path, 1) == conversations(path, 1)
    assert conversations(path, 1) != conversations(path, 2)
    assert sorted(conversations(path, 1)) == sorted(conversations(path, 2))
