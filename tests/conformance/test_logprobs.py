"""Log probabilities of the tokens chosen and of those beside them."""

from __future__ import annotations

import math

import pytest

from .cases import case
from .network import Answer, Network
from .reference import logprobs


@case("`logprobs`: one entry per token; the likeliest, sorted", shows=["logprobs"])
def test_the_likeliest_are_sorted(network: Network) -> None:
    answer = network.greedy(network.subject.prompts.story, 6, logprobs=4)
    assert len(answer.logprobs) == 6
    for entry in answer.logprobs:
        values = [top.logprob for top in entry.top]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert sum(map(math.exp, values)) <= 1 + 1e-4
        assert (entry.top[0].token_id, entry.top[0].text, entry.top[0].logprob) == (entry.token_id, entry.text, entry.logprob)
    assert "".join(entry.text for entry in answer.logprobs) == answer.text


@case("`logprobs` come with the ids of their delta", shows=["logprobs"], needs=["ids"])
def test_they_come_with_their_ids(network: Network) -> None:
    answer = network.greedy(network.subject.prompts.story, 6, logprobs=2)
    for chunk in answer.chunks:
        assert [entry.token_id for entry in chunk.logprobs or []] == chunk.token_ids
    assert answer.ids == network.greedy(network.subject.prompts.story, 6).ids


@case("`logprobs` 0: the chosen token alone", shows=["logprobs"])
def test_of_the_chosen_alone(network: Network) -> None:
    story = network.subject.prompts.story
    answer = network.greedy(story, 4, logprobs=0)
    full = network.greedy(story, 4, logprobs=4)
    assert [entry.top for entry in answer.logprobs] == [[]] * 4
    assert [entry.logprob for entry in answer.logprobs] == pytest.approx([entry.logprob for entry in full.logprobs], abs=1e-3)
    assert network.greedy(story, 4).completion.logprobs is None


@case("`logprobs` are those of the model itself", shows=["logprobs"], needs=["reference", "ids"])
def test_greedy_ones_are_the_models_own(network: Network) -> None:
    check_against_the_model(network, network.greedy(network.subject.prompts.story, 6, logprobs=4))


@case("`logprobs` of a sampled answer are before temperature and cuts", shows=["logprobs"], needs=["reference", "ids", "seed"])
def test_sampled_ones_are_the_models_own(network: Network) -> None:
    story = network.subject.prompts.story
    answer = network.ask(story, temperature=2.0, top_k=50, repetition_penalty=1.3, seed=11, max_tokens=6, logprobs=4)
    check_against_the_model(network, answer)


def check_against_the_model(network: Network, answer: Answer) -> None:
    """A kernel of another library may differ by its rounding, hence the tolerance."""
    subject = network.subject
    story = subject.prompts.story
    assert isinstance(story, str)
    rows = logprobs(subject.directory(), subject.tokenizer().encode(story), answer.ids)
    assert len(answer.logprobs) == len(rows)
    for entry, row in zip(answer.logprobs, rows, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id], abs=2e-3)
        best = sorted(row, reverse=True)[: len(entry.top)]
        assert [top.logprob for top in entry.top] == pytest.approx(best, abs=2e-3)
        assert [row[top.token_id] for top in entry.top] == pytest.approx(best, abs=2e-3)
