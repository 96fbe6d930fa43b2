"""Characters that several tokens make, and tokens that no reader wants."""

from __future__ import annotations

from itertools import pairwise

from .cases import case
from .network import Answer, Network


def is_whole(answer: Answer) -> bool:
    """Whether no piece of it has a part of a character."""
    return all("\ufffd" not in chunk.text for chunk in answer.chunks)


@case("emoji, CJK and combined characters are never split")
def test_characters_are_whole(network: Network) -> None:
    answer = network.greedy(network.subject.prompts.tongues, 16)
    assert is_whole(answer), [chunk.text for chunk in answer.chunks]
    assert any(0x2FFF < ord(character) < 0xA000 for character in answer.text)
    assert any(ord(character) > 0xFFFF for character in answer.text)


@case("the pieces of such text are the text of its ids", needs=["ids", "vocabulary"])
def test_characters_are_those_of_the_ids(network: Network) -> None:
    subject = network.subject
    tongues = subject.prompts.tongues
    answer = network.greedy(tongues, 16)
    assert any("\ufffd" in subject.tokenizer().decode(tongues, [token_id]) for token_id in answer.ids), "no character of several tokens"
    assert answer.text == subject.tokenizer().decode(tongues, answer.ids).rstrip("\ufffd")


@case("an answer cut inside a character ends before it", needs=["vocabulary"])
def test_an_answer_cut_inside_a_character(network: Network) -> None:
    answers = network.together([(network.subject.prompts.tongues, {"temperature": 0, "max_tokens": most}) for most in range(1, 8)])
    assert all(map(is_whole, answers))
    assert [answer.usage.completion_tokens for answer in answers] == list(range(1, 8))
    texts = [answer.text for answer in answers]
    assert all(longer.startswith(shorter) for shorter, longer in pairwise(texts))
    assert len(set(texts)) < len(texts), "each token was a character"


@case("`skip_special_tokens` false shows them", shows=["skip_special_tokens"], needs=["vocabulary", "ignore_eos"])
def test_special_tokens_are_shown_when_asked_for(network: Network) -> None:
    ends = network.subject.prompts.ends
    ended = network.ask(ends, temperature=0)
    most = ended.usage.completion_tokens + 3
    shown, hidden = (network.greedy(ends, most, ignore_eos=True, skip_special_tokens=skip) for skip in (False, True))
    end = network.subject.tokenizer().end
    assert shown.text.startswith(ended.text + end)
    assert end not in hidden.text
    assert shown.ids == hidden.ids
