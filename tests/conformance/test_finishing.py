"""Why an answer ends, and where."""

from __future__ import annotations

from .cases import case
from .network import Answer, Network


def straddling(answer: Answer, start: int) -> str:
    """A text of `answer` from within one chunk into the next, the first from chunk `start` on that stands nowhere before."""
    texts = [chunk.text for chunk in answer.chunks]
    for k in range(start, len(texts) - 1):
        if len(texts[k]) < 2 or not texts[k + 1]:
            continue
        text = texts[k][-2:] + texts[k + 1][:2]
        if answer.text.find(text) == len("".join(texts[: k + 1])) - 2:
            return text
    raise AssertionError(f"no such text in {texts}")


def ids_of(network: Network, answer: Answer) -> list[int]:
    """The ids of a whole answer, from the tokenizer where the backend tells none."""
    return answer.ids or network.subject.tokenizer().encode(answer.text)


def check_stopped(network: Network, answer: Answer, made: list[int], end: int) -> None:
    """It is `made`, and was ended by the id `end`, which has no text."""
    assert answer.text == network.subject.tokenizer().decode(network.subject.prompts.story, made)
    assert (answer.reason, answer.usage.completion_tokens) == ("stop", len(made) + 1)
    assert answer.ids == [*made, end] or "ids" in network.subject.lacks


@case("ends by itself: stop")
def test_an_answer_ends_by_itself(network: Network) -> None:
    answer = network.ask(network.subject.prompts.ends, temperature=0)
    assert answer.reason == "stop"
    assert 0 < answer.usage.completion_tokens < 24


@case("`max_tokens`: so many and no more, length", shows=["max_tokens"])
def test_max_tokens(network: Network) -> None:
    for most in (1, 4):
        answer = network.ask(network.subject.prompts.ends, temperature=0, max_tokens=most)
        assert (answer.reason, answer.usage.completion_tokens) == ("length", most)


@case("`stop` over two deltas: the text ends before it", shows=["stop"])
def test_a_stop_string_over_two_deltas(network: Network) -> None:
    story = network.subject.prompts.story
    whole = network.greedy(story, 8)
    stop = straddling(whole, 2)
    answer = network.greedy(story, 8, stop=["never said", stop])
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.reason == "stop"
    assert "".join(chunk.text for chunk in answer.chunks) == answer.text
    assert answer.usage.completion_tokens < whole.usage.completion_tokens


@case("text that only began like a `stop` arrives")
def test_what_began_like_a_stop_string_arrives(network: Network) -> None:
    story = network.subject.prompts.story
    whole = network.greedy(story, 8)
    answer = network.greedy(story, 8, stop=[whole.text[-3:] + "never", whole.text[3:6] + "never"])
    assert (answer.text, answer.reason) == (whole.text, "length")


@case("`stop_token_ids`: the id ends the answer and has no text", shows=["stop_token_ids"])
def test_a_stop_id(network: Network) -> None:
    story = network.subject.prompts.story
    ids = ids_of(network, network.greedy(story, 8))
    place = next(k for k in range(2, len(ids)) if ids[k] not in ids[:k])
    answer = network.greedy(story, 8, stop_token_ids=[ids[place]])
    check_stopped(network, answer, ids[:place], ids[place])


@case("`min_tokens` holds off the model's end", shows=["min_tokens"])
def test_min_tokens_holds_off_the_end(network: Network) -> None:
    ends = network.subject.prompts.ends
    least = network.ask(ends, temperature=0).usage.completion_tokens + 3
    assert network.ask(ends, temperature=0, min_tokens=least).usage.completion_tokens >= least


@case("`min_tokens` holds off `stop`", shows=["min_tokens"])
def test_min_tokens_holds_off_stop_strings(network: Network) -> None:
    story = network.subject.prompts.story
    whole = network.greedy(story, 8)
    assert network.greedy(story, 8, stop=[whole.text[:3]]).usage.completion_tokens < 4
    held = network.greedy(story, 8, stop=[whole.text[:3]], min_tokens=5)
    assert held.usage.completion_tokens >= 5
    assert held.text.startswith(whole.text[:3])


@case("`min_tokens` holds off `stop_token_ids`", shows=["min_tokens"], needs=["stop_token_ids"])
def test_min_tokens_holds_off_stop_ids(network: Network) -> None:
    story = network.subject.prompts.story
    end = ids_of(network, network.greedy(story, 8))[1]
    assert network.greedy(story, 8, stop_token_ids=[end]).usage.completion_tokens == 2
    assert network.greedy(story, 8, stop_token_ids=[end], min_tokens=5).usage.completion_tokens >= 5


@case("`ignore_eos` goes on past the model's end", shows=["ignore_eos"])
def test_ignore_eos(network: Network) -> None:
    ends = network.subject.prompts.ends
    ended = network.ask(ends, temperature=0)
    most = ended.usage.completion_tokens + 4
    answer = network.greedy(ends, most, ignore_eos=True)
    assert (answer.reason, answer.usage.completion_tokens) == ("length", most)
    assert answer.text.startswith(ended.text)
    assert answer.ids[: len(ended.ids)] == ended.ids
