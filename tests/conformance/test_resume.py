"""Answers that go on from what was received of them, as after the loss of their worker."""

from __future__ import annotations

from typing import Any

from zmqserve.errors import WorkerLost
from zmqserve.messages import Error, pack_ids
from zmqserve.params import Guided
from zmqserve.requests import Prompt

from .cases import case
from .network import Network
from .test_finishing import straddling
from .wire import Received


def check_joins(network: Network, prompt: Prompt, cuts: tuple[int, ...] | None = None, **params: Any) -> None:
    """Cut the answer after so many chunks (None: after each): what comes then must be the rest of it."""
    params = {"temperature": 0, "max_tokens": 8, **params}
    with network.wire() as wire:
        (whole,) = wire.ask(wire.request(prompt, **params))
        assert isinstance(whole, Received), whole
        last = len(whole.pieces) - 1
        assert last > 0, "nothing to cut"
        places = sorted({min(cut, last) for cut in cuts} if cuts else range(1, last + 1))
        resumed = [wire.request(prompt, resume=whole.resume(cut), fingerprint=whole.fingerprint, **params) for cut in places]
        for cut, rest in zip(places, wire.ask(*resumed), strict=True):
            assert isinstance(rest, Received), f"cut after {cut} chunks: {rest}"
            before = "".join(piece.text for piece in whole.pieces[:cut])
            assert before + rest.text == whole.text, f"cut after {cut} chunks"
            assert whole.resume(cut).token_ids + pack_ids(rest.ids) == pack_ids(whole.ids)
            assert [piece.seq for piece in rest.pieces] == list(range(cut, cut + len(rest.pieces)))
            assert rest.reasons == whole.reasons
            assert (rest.usage.prompt_tokens, rest.usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
            # The last chunk may come within Done, which has no room for a fingerprint.
            assert rest.fingerprint in (whole.fingerprint, None)


@case("goes on wherever it was cut: the same text, ids and usage", needs=["resume"])
def test_it_goes_on_wherever_it_was_cut(network: Network) -> None:
    check_joins(network, network.subject.prompts.story)


@case("goes on to the model's own end", needs=["resume"])
def test_it_goes_on_to_the_end(network: Network) -> None:
    check_joins(network, network.subject.prompts.ends, (1, 4), max_tokens=None)


@case("goes on inside a character", needs=["resume", "vocabulary"])
def test_it_goes_on_inside_a_character(network: Network) -> None:
    check_joins(network, network.subject.prompts.tongues)


@case("matches a `stop` across the join", needs=["resume", "stop"])
def test_a_stop_string_across_the_join(network: Network) -> None:
    story = network.subject.prompts.story
    check_joins(network, story, stop=[straddling(network.greedy(story, 8), 3)])


@case("does not repeat the `echo` of the prompt", needs=["resume", "echo"])
def test_the_echo_is_not_repeated(network: Network) -> None:
    check_joins(network, network.subject.prompts.story, (1, 3), echo=True)


@case("other parameters: exact, approximate or refused, as the card says", needs=["resume"])
def test_it_goes_on_as_the_card_says(network: Network) -> None:
    subject = network.subject
    card = network.client.model_details(subject.model)
    asked: dict[str, dict[str, Any]] = {
        "seed": {"temperature": 1.0, "seed": 3},
        "sampling": {"temperature": 1.0},
        "presence_penalty": {"presence_penalty": 1.0},
        "frequency_penalty": {"frequency_penalty": 1.0},
        "repetition_penalty": {"repetition_penalty": 1.3},
        "min_tokens": {"min_tokens": 4},
        "n": {"n": 2},
        "guided": {"guided": Guided(regex="[a-z ]{30}")},
    }
    for name, params in asked.items():
        if name in subject.refuses:
            continue
        grade = card.resume.get(name, "exact")
        if grade == "exact":
            check_joins(network, subject.prompts.loop, (3,), **{"max_tokens": 6, **params})
            continue
        given = {"temperature": 0, "max_tokens": 6, **params}
        with network.wire() as wire:
            (whole,) = wire.ask(wire.request(subject.prompts.loop, **given))
            assert isinstance(whole, Received), whole
            again = wire.request(subject.prompts.loop, resume=whole.resume(2), fingerprint=whole.fingerprint, **given)
            (resumed,) = wire.ask(again)
        if grade == "refused":
            assert isinstance(resumed, Error), f"{name}: {resumed}"
            assert (resumed.code, resumed.retryable) == (WorkerLost.code, False)
        else:
            assert isinstance(resumed, Received), f"{name}: {resumed}"
            assert resumed.usage.completion_tokens == whole.usage.completion_tokens == 6
