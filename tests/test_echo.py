"""EchoWorker and StopMatcher, driven without sockets."""

from __future__ import annotations

import asyncio
import math
from array import array
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqserve.backends.echo import EchoWorker
from zmqserve.errors import ContextOverflow, InvalidParameter
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.messages import ChatMessage, CountTokens, Embed, Generate, pack_ids
from zmqserve.params import EmbedParams, SamplingParams
from zmqserve.stopping import StopMatcher, StopStrings

from .fakes.traced import peak_bytes


def echo(prompt: str | None = "a b c", *, worker: EchoWorker | None = None, **params: Any) -> list[Delta]:
    """All deltas of one answer. `messages` and `token_ids` may stand in for the prompt."""
    inputs = {name: params.pop(name) for name in ("messages", "token_ids") if name in params}
    request = Generate(1, "m", prompt=None if inputs else prompt, params=SamplingParams(**params), **inputs)
    job = GenerateJob(request)

    async def collect() -> list[Delta]:
        return [delta async for delta in (worker or EchoWorker()).generate(job)]

    return asyncio.run(collect())


def text(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def ids(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token for delta in deltas if delta.index == index for token in delta.token_ids]


def reason(deltas: list[Delta]) -> str | None:
    reasons = {delta.finish_reason for delta in deltas[-1:]}
    assert all(delta.finish_reason is None for delta in deltas[:-1])
    return reasons.pop()


def test_one_pass_over_the_words_without_max_tokens() -> None:
    deltas = echo(" a  b\nc ")
    assert [delta.text for delta in deltas] == ["a", " b", " c"]
    assert ids(deltas) == [0, 1, 2]
    assert reason(deltas) == "stop"


def test_goes_round_until_max_tokens() -> None:
    deltas = echo("a b c", max_tokens=5)
    assert text(deltas) == "a b c a b"
    assert ids(deltas) == [0, 1, 2, 3, 4]
    assert reason(deltas) == "length"
    assert text(echo("a b c", max_tokens=1)) == "a"


def test_messages_and_token_ids_are_prompts_too() -> None:
    assert text(echo(messages=[ChatMessage("system", "be brief"), ChatMessage("user", "a b")])) == "be brief a b"
    assert text(echo(token_ids=pack_ids([7, 65536]))) == "7 65536"


def test_a_stop_string_is_not_part_of_the_answer_even_across_tokens() -> None:
    deltas = echo("one two three four", stop=["o thr"])
    assert text(deltas) == "one tw"
    assert ids(deltas) == [0, 1, 2]
    assert reason(deltas) == "stop"


def test_a_stop_token_gives_its_id_and_no_text() -> None:
    deltas = echo("a b c", stop_token_ids=[1])
    assert (text(deltas), ids(deltas), reason(deltas)) == ("a", [0, 1], "stop")


def test_several_choices_and_the_prompt_before_them() -> None:
    deltas = echo("a b", n=2, echo=True)
    for index in (0, 1):
        assert text(deltas, index) == "a b a b"
        assert ids(deltas, index) == [0, 1]
        assert [delta.finish_reason for delta in deltas if delta.index == index] == [None, "stop"]


def test_min_tokens_goes_on_past_one_pass_and_past_stops() -> None:
    assert text(echo("a b", min_tokens=3)) == "a b a"
    assert text(echo("a b c", min_tokens=2, stop=["a", "b"], stop_token_ids=[1], max_tokens=9)) == "a b c "


def test_a_prompt_over_the_context_is_an_error_with_both_numbers() -> None:
    worker = EchoWorker(context_length=4)
    with pytest.raises(ContextOverflow) as caught:
        echo("a b c", worker=worker, max_tokens=2)
    assert (caught.value.context_length, caught.value.tokens) == (4, 5)
    with pytest.raises(ContextOverflow):
        echo("a b c d", worker=worker)
    shortened = echo("a b c", worker=worker)
    assert (text(shortened), reason(shortened)) == ("a", "length")


def test_a_prompt_without_words_is_an_error() -> None:
    with pytest.raises(InvalidParameter, match="no words"):
        echo(" \n ")


def test_faults_act_only_where_they_are_enabled() -> None:
    assert text(echo("a !raise")) == "a !raise"
    with pytest.raises(RuntimeError, match="!raise"):
        echo("a !raise", worker=EchoWorker(faults=True))


def test_counts_words() -> None:
    assert asyncio.run(EchoWorker().count_tokens(CountTokens(1, "m", prompt="a b  c"))) == 3


def embed(*texts: str, worker: EchoWorker | None = None, **params: Any) -> tuple[list[list[float]], int]:
    vectors = asyncio.run((worker or EchoWorker()).embed(Embed(1, "m", texts=list(texts), params=EmbedParams(**params))))
    rows, columns = vectors.shape
    numbers = array("f", vectors.data)
    assert len(numbers) == rows * columns
    return [numbers[row * columns : (row + 1) * columns].tolist() for row in range(rows)], vectors.prompt_tokens


def test_vectors_depend_on_their_text_alone() -> None:
    (first, second, third), tokens = embed("a b", "c", "a b")
    assert first == third != second
    assert len(first) == 384
    assert tokens == 5
    assert math.fsum(x * x for x in first) == pytest.approx(1.0, abs=1e-6)


def test_vectors_may_be_cut_raw_and_of_truncated_texts() -> None:
    (raw,), _ = embed("a", normalize=False, worker=EchoWorker(dimensions=100))
    assert len(raw) == 100
    assert all(-1 <= x <= 1 for x in raw)
    (short,), _ = embed("a", dimensions=8)
    assert len(short) == 8
    (cut, whole), tokens = embed("a b", "a", truncate_tokens=1)
    assert cut == whole
    assert tokens == 2
    with pytest.raises(InvalidParameter, match="at most 384"):
        embed("a", dimensions=385)
    with pytest.raises(ContextOverflow):
        embed("a b c", worker=EchoWorker(context_length=2))


@pytest.mark.parametrize("options", [{"delay_first_s": -1}, {"delay_per_token_s": math.nan}, {"dimensions": 0}, {"context_length": -1}])
def test_wrong_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(options))):
        EchoWorker(**options)


# --- stop strings ------------------------------------------------------------------------------


def stopped_by_hand(whole: str, stop: list[str]) -> tuple[str, bool]:
    """The definition: the first stop string to be completed ends the text; of several, the longest."""
    for end in range(1, len(whole) + 1):
        found = [text for text in stop if whole[:end].endswith(text)]
        if found:
            return whole[: end - max(map(len, found))], True
    return whole, False


pieces = st.lists(st.text("ab\U0001f600", max_size=5), max_size=12)
stops = st.lists(st.text("ab\U0001f600", min_size=1, max_size=6), max_size=4)


@settings(max_examples=300, deadline=None)
@given(pieces, stops)
def test_what_leaves_does_not_depend_on_how_the_text_is_cut(pieces: list[str], stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    left = ""
    for piece in pieces:
        leaves, stopped = matcher.feed(piece)
        left += leaves
        if stopped:
            break
    assert (left + matcher.flush(), matcher.stopped) == stopped_by_hand("".join(pieces), stop)


def test_only_what_may_begin_a_stop_string_is_held() -> None:
    matcher = StopMatcher(["###", "\nUser:"])
    assert matcher.feed("Hi#") == ("Hi", False)
    assert matcher.feed("!\nUs") == ("#!", False)
    assert matcher.feed("ers") == ("\nUsers", False)
    assert matcher.feed("\nUser: x") == ("", True)
    assert matcher.flush() == ""


def test_long_stop_strings_cost_one_step_per_character() -> None:
    matcher = StopMatcher(["a" * 1000 + "b"])
    steps = sum(len(matcher.feed("a")[0]) for _ in range(20_000))
    assert steps == 19_000
    assert len(matcher.flush()) == 1000


@given(st.lists(st.tuples(st.integers(0, 2), st.text("ab", max_size=5)), max_size=30), stops)
def test_matchers_of_the_same_stop_strings_do_not_disturb_each_other(pieces: list[tuple[int, str]], stop: list[str]) -> None:
    shared = StopStrings(stop)
    together, alone = [StopMatcher(shared) for _ in range(3)], [StopMatcher(stop) for _ in range(3)]
    for index, piece in pieces:
        assert together[index].feed(piece) == alone[index].feed(piece)
    assert [matcher.flush() for matcher in together] == [matcher.flush() for matcher in alone]


def test_many_choices_share_their_stop_strings() -> None:
    stop = [f"{number}" * 1024 for number in range(8)]
    one, many = (peak_bytes(partial(echo, "a b", stop=stop, n=n)) for n in (1, 128))
    assert many < 2 * one
