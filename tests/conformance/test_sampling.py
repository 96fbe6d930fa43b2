"""How the next token is chosen. All of it needs a model with a choice."""

from __future__ import annotations

from .cases import case
from .network import Answer, Network

HOT = 2.0
"""A temperature at which no two answers are alike, unless something holds it; vLLM takes no higher one."""


def units(answer: Answer) -> list[object]:
    """What repeats in an answer: its ids, or its words where a backend has no ids."""
    return list(answer.ids or answer.text.split())


def repeats(answer: Answer) -> int:
    """How often something stands in the answer that stood there before."""
    return len(units(answer)) - len(set(units(answer)))


@case("`temperature` 0 repeats itself", shows=["temperature"], needs=["choice"])
def test_greedy_repeats_itself(network: Network) -> None:
    story = network.subject.prompts.story
    first, second = (network.ask(story, fresh=True, temperature=0, max_tokens=12) for _ in range(2))
    assert (first.text, first.ids) == (second.text, second.ids)


@case("`temperature` above 0 draws anew each time", needs=["choice", "temperature"])
def test_sampled_answers_differ(network: Network) -> None:
    story = network.subject.prompts.story
    texts = {network.ask(story, temperature=1.0, max_tokens=12).text for _ in range(2)}
    assert len(texts) == 2


@case("`temperature`: hotter is further from the likeliest", shows=["temperature"], needs=["choice", "seed"])
def test_a_low_temperature_is_near_greedy(network: Network) -> None:
    story = network.subject.prompts.story
    greedy = network.greedy(story, 8)
    assert network.ask(story, temperature=0.01, seed=1, max_tokens=8).text == greedy.text
    assert network.ask(story, temperature=HOT, seed=1, max_tokens=8).text != greedy.text


@case("`seed` repeats a sampled answer", shows=["seed"], needs=["choice"])
def test_a_seed_repeats_a_sampled_answer(network: Network) -> None:
    """Alone in its batch: that is all that every engine can promise."""
    story = network.subject.prompts.story
    first, second, other = (network.ask(story, temperature=1.5, max_tokens=12, seed=seed) for seed in (7, 7, 8))
    assert (first.text, first.ids) == (second.text, second.ids)
    assert other.text != first.text


@case("`top_k` 1 is greedy at any temperature", shows=["top_k"], needs=["choice"])
def test_top_k(network: Network) -> None:
    story = network.subject.prompts.story
    assert network.ask(story, temperature=HOT, top_k=1, max_tokens=8).text == network.greedy(story, 8).text


@case("`top_p` near 0 is greedy at any temperature", shows=["top_p"], needs=["choice"])
def test_top_p(network: Network) -> None:
    story = network.subject.prompts.story
    assert network.ask(story, temperature=HOT, top_p=1e-6, max_tokens=8).text == network.greedy(story, 8).text


@case("`min_p` 1 is greedy at any temperature", shows=["min_p"], needs=["choice"])
def test_min_p(network: Network) -> None:
    story = network.subject.prompts.story
    assert network.ask(story, temperature=HOT, min_p=1.0, max_tokens=8).text == network.greedy(story, 8).text


@case("`presence_penalty` makes an answer repeat less", shows=["presence_penalty"])
def test_presence_penalty(network: Network) -> None:
    check_repeats_less(network, presence_penalty=2.0)


@case("`frequency_penalty` makes an answer repeat less", shows=["frequency_penalty"])
def test_frequency_penalty(network: Network) -> None:
    check_repeats_less(network, frequency_penalty=2.0)


@case("`repetition_penalty` makes an answer repeat less", shows=["repetition_penalty"])
def test_repetition_penalty(network: Network) -> None:
    check_repeats_less(network, repetition_penalty=1.5)


@case("`frequency_penalty` grows with each repetition, `presence_penalty` does not", needs=["frequency_penalty", "presence_penalty"])
def test_a_frequency_penalty_grows(network: Network) -> None:
    loop = network.subject.prompts.loop
    presence, frequency = (network.greedy(loop, 16, **{name: 0.2}) for name in ("presence_penalty", "frequency_penalty"))
    assert repeats(frequency) < repeats(presence)


@case("`presence_penalty` and `frequency_penalty` count the answer alone", needs=["frequency_penalty", "presence_penalty"])
def test_presence_and_frequency_do_not_count_the_prompt(network: Network) -> None:
    loop = network.subject.prompts.loop
    penalized = network.greedy(loop, 1, presence_penalty=2.0, frequency_penalty=2.0)
    assert penalized.text == network.greedy(loop, 1).text


@case("`repetition_penalty` counts the prompt too", shows=["repetition_penalty"])
def test_repetition_penalty_counts_the_prompt(network: Network) -> None:
    tongues = network.subject.prompts.tongues
    plain, penalized = network.greedy(tongues, 4), network.greedy(tongues, 4, repetition_penalty=2.0)
    assert penalized.text != plain.text
    assert penalized.ids[:1] != plain.ids[:1] or "ids" in network.subject.lacks


def check_repeats_less(network: Network, **penalty: float) -> None:
    loop = network.subject.prompts.loop
    plain = network.greedy(loop, 16)
    assert repeats(plain) > 6, "the answer must repeat itself"
    assert repeats(network.greedy(loop, 16, **penalty)) < repeats(plain) - 2
