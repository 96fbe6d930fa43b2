"""Answers arrive piece by piece, and the pieces are the whole."""

from __future__ import annotations

from zmqserve.messages import Reply, unpack_ids

from .cases import case
from .network import Network
from .test_prompts import TURNS


@case("deltas of new text, numbered 0, 1, 2, ...")
def test_pieces_are_numbered_and_are_the_whole(network: Network) -> None:
    answer = network.greedy(network.subject.prompts.story, 8)
    assert [chunk.seq for chunk in answer.chunks] == list(range(len(answer.chunks)))
    assert len([chunk for chunk in answer.chunks if chunk.text]) >= 4
    assert "".join(chunk.text for chunk in answer.chunks) == answer.text
    assert answer.text.strip()


@case("token ids with each delta; the text is theirs", needs=["ids"])
def test_ids_come_with_their_text(network: Network) -> None:
    subject = network.subject
    answer = network.greedy(subject.prompts.story, 8)
    assert [i for chunk in answer.chunks for i in chunk.token_ids] == answer.ids
    assert len(answer.ids) == 8
    assert answer.text == subject.tokenizer().decode(subject.prompts.story, answer.ids)
    so_far: list[int] = []
    text = ""
    for chunk in answer.chunks:
        so_far += chunk.token_ids
        text += chunk.text
        assert subject.tokenizer().decode(subject.prompts.story, so_far).startswith(text), f"text before its ids at {chunk}"


@case("usage counts every id of an answer, its end too", needs=["ids"])
def test_usage_counts_the_ids(network: Network) -> None:
    ends = network.subject.prompts.ends
    whole = network.ask(ends, temperature=0)
    stopped = network.ask(ends, temperature=0, stop=[whole.text[-3:]])
    for answer in (whole, stopped):
        assert answer.usage.completion_tokens == len(answer.ids)


@case("an answer in one message is the streamed one")
def test_not_streamed_is_the_same_answer(network: Network) -> None:
    streamed = network.greedy(network.subject.prompts.story, 8)
    with network.wire() as wire:
        request = wire.request(network.subject.prompts.story, stream=False, temperature=0, max_tokens=8)
        wire.send(request)
        reply = wire.next()
    assert isinstance(reply, Reply), reply
    (choice,) = reply.choices
    assert (choice.text, unpack_ids(choice.token_ids), choice.finish_reason) == (streamed.text, streamed.ids, streamed.reason)
    assert reply.usage.completion_tokens == streamed.usage.completion_tokens == 8
    assert reply.usage.prompt_tokens == streamed.usage.prompt_tokens


@case("usage is what the tokenizer counts")
def test_usage_is_exact(network: Network) -> None:
    tokenizer = network.subject.tokenizer()
    asked = network.greedy(TURNS, 5)
    assert asked.usage.prompt_tokens == len(tokenizer.encode_chat(TURNS))
    told = network.greedy(network.subject.prompts.story, 8)
    assert told.usage.completion_tokens == 8


@case("usage of a text prompt is what the tokenizer counts", needs=["prompt"])
def test_usage_of_a_text_is_exact(network: Network) -> None:
    story = network.subject.prompts.story
    assert isinstance(story, str)
    assert network.greedy(story, 8).usage.prompt_tokens == len(network.subject.tokenizer().encode(story))


@case("answers made at the same time are those made alone")
def test_answers_made_together_are_those_made_alone(network: Network) -> None:
    prompts = network.subject.prompts
    asked = [prompts.story, prompts.ends, prompts.loop, prompts.tongues]
    alone = [network.greedy(prompt, 6) for prompt in asked]
    together = network.together([(prompt, {"temperature": 0, "max_tokens": 6}) for prompt in asked])
    assert [(answer.text, answer.ids) for answer in together] == [(answer.text, answer.ids) for answer in alone]
