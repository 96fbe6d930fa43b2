"""Several answers to one prompt."""

from __future__ import annotations

from .cases import case
from .network import Network


@case("`n` answers, each with its index and end", shows=["n"])
def test_n_answers(network: Network) -> None:
    alone = network.greedy(network.subject.prompts.story, 5)
    answer = network.greedy(network.subject.prompts.story, 5, n=3)
    choices = answer.completion.choices
    assert [(choice.text, choice.finish_reason) for choice in choices] == [(alone.text, "length")] * 3
    assert {chunk.index for chunk in answer.chunks} == {0, 1, 2}
    assert [chunk.seq for chunk in answer.chunks] == list(range(len(answer.chunks)))


@case("`n`: the prompt counts once, every answer's tokens count", shows=["n"])
def test_n_counts_the_prompt_once(network: Network) -> None:
    alone = network.greedy(network.subject.prompts.story, 5)
    answer = network.greedy(network.subject.prompts.story, 5, n=3)
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == 3 * alone.usage.completion_tokens


@case("`n` sampled answers differ from each other", shows=["n"], needs=["choice"])
def test_n_sampled_answers_differ(network: Network) -> None:
    answer = network.ask(network.subject.prompts.story, n=3, temperature=1.0, max_tokens=12)
    assert len({choice.text for choice in answer.completion.choices}) == 3


@case("`n` with a `seed` repeats all its answers", needs=["n", "seed", "choice"], shows=["seed"])
def test_n_answers_with_a_seed_repeat(network: Network) -> None:
    first, second = (network.ask(network.subject.prompts.story, n=2, temperature=1.0, max_tokens=8, seed=5) for _ in range(2))
    assert [choice.text for choice in first.completion.choices] == [choice.text for choice in second.completion.choices]
    assert len({choice.text for choice in first.completion.choices}) == 2
