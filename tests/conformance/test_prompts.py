"""Forms of a prompt: text, token ids, conversations; and the prompt before the answer."""

from __future__ import annotations

import pytest

from zmqserve.errors import ContextOverflow

from .cases import case
from .network import Network

TURNS = [
    {"role": "user", "content": "1 2 3"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "5 6"},
]


@case("a prompt's text is its token ids", needs=["prompt", "token_ids", "ids"])
def test_text_and_ids_are_one_prompt(network: Network) -> None:
    subject = network.subject
    story = subject.prompts.story
    assert isinstance(story, str)
    by_text = network.greedy(story, 6)
    by_ids = network.greedy(subject.tokenizer().encode(story), 6)
    assert (by_ids.text, by_ids.ids, by_ids.usage) == (by_text.text, by_text.ids, by_text.usage)


@case("a conversation goes through the model's own template", needs=["token_ids", "ids"])
def test_a_conversation_is_its_template(network: Network) -> None:
    rendered = network.subject.tokenizer().encode_chat(TURNS)
    by_turns = network.greedy(TURNS, 6)
    by_ids = network.greedy(rendered, 6)
    assert (by_turns.text, by_turns.ids) == (by_ids.text, by_ids.ids)
    assert by_turns.usage.prompt_tokens == len(rendered)


@case("`echo`: the prompt comes first and is not counted", shows=["echo"], needs=["prompt"])
def test_echo(network: Network) -> None:
    story = network.subject.prompts.story
    assert isinstance(story, str)
    plain = network.greedy(story, 4)
    answer = network.greedy(story, 4, echo=True)
    assert answer.text.startswith(story)
    assert answer.text.removeprefix(story).strip() == plain.text.strip()
    assert (answer.ids, answer.usage) == (plain.ids, plain.usage)


@case("a prompt over the context is error 40303 with both numbers")
def test_a_prompt_over_the_context(network: Network) -> None:
    length = network.subject.context_length
    with pytest.raises(ContextOverflow) as caught:
        network.ask(network.subject.longer(length + 10), max_tokens=1)
    assert caught.value.code == 40303
    assert caught.value.context_length == length
    assert length < caught.value.tokens <= length + 200
    assert str(length) in caught.value.message
    assert str(caught.value.tokens) in caught.value.message


@case("`max_tokens` over the room is error 40303, and nothing is cut", shows=["max_tokens"])
def test_max_tokens_over_the_room(network: Network) -> None:
    subject = network.subject
    counted = network.greedy(subject.prompts.ends, 1).usage.prompt_tokens
    with pytest.raises(ContextOverflow) as caught:
        network.ask(subject.prompts.ends, temperature=0, max_tokens=subject.context_length)
    assert caught.value.context_length == subject.context_length
    needed = counted + subject.context_length
    # An API that cannot count tokens can only say that it is more.
    assert caught.value.tokens == needed or ("count_tokens" in subject.lacks and subject.context_length < caught.value.tokens <= needed)
