"""`bench serve` with models that cannot all that an echo can: it asks them as they can be asked, and says so."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from bench.serve_client import Ask
from bench.serve_network import Network, NetworkFacts, first_kind
from bench.serve_samples import Sample
from zmqserve import Controller, WorkerConfig
from zmqserve.backends.echo import EchoWorker
from zmqserve.errors import InvalidParameter, UnknownModel, Unsupported
from zmqserve.messages import ModelCard

from .processes import PATIENCE_S

BOTH = frozenset({"token_ids", "ignore_eos"})


class Wordy(EchoWorker):
    """It takes no token ids."""

    honours = EchoWorker.honours - {"token_ids"}


class Chatty(EchoWorker):
    """It takes conversations alone, and counts nothing."""

    def load(self) -> list[ModelCard]:
        return [msgspec.structs.replace(card, verbs=["chat"]) for card in super().load()]


@contextmanager
def served(kind: type[EchoWorker]) -> Iterator[Network]:
    controller = Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"], report=lambda *_args, **_fields: None)
    controller.start()
    worker = kind(WorkerConfig(model="m", controllers=tuple(controller.worker_endpoints)))
    network = Network(controller.client_endpoints)
    try:
        with worker:
            worker.wait_ready(PATIENCE_S)
            yield network
    finally:
        network.close()
        controller.stop()


def asked(network: Network, optional: frozenset[str] = BOTH, **sampling: object) -> tuple[Ask, list[str]]:
    card = network.model(None, PATIENCE_S)
    return network.settled(Ask(network.endpoints, card.name, first_kind(card), sampling, None), Sample([7, 8, 9], 3, 1), optional)


def test_an_echo_is_asked_with_ids() -> None:
    with served(EchoWorker) as network:
        ask, left_out = asked(network, temperature=0.5)
        assert (ask.kind, left_out, ask.sampling) == ("ids", [], {"temperature": 0.5})


def test_what_is_refused_is_left_out_and_told_if_it_may_be() -> None:
    with served(Wordy) as network:
        ask, left_out = asked(network, ignore_eos=True)
        assert (ask.kind, sorted(left_out), dict(ask.sampling)) == ("text", sorted(BOTH), {})
        for optional in BOTH:
            with pytest.raises(Unsupported):
                asked(network, frozenset({optional}), ignore_eos=True)
        with pytest.raises(Unsupported, match="logprobs"):
            asked(network, logprobs=1)


def test_a_model_for_chats_is_asked_with_conversations_and_its_lengths_are_guessed() -> None:
    with served(Chatty) as network:
        ask, left_out = asked(network)
        assert (ask.kind, left_out) == ("chat", [])
        assert network.count_tokens(network.model("m", 0), ["abcd" * 10, ""]) == [10, 1]


def test_tokens_are_counted_by_the_model() -> None:
    with served(EchoWorker) as network:
        assert network.count_tokens(network.model("m", 0), ["a b c", "", "a b c"]) == [3, 0, 3]


def test_ids_that_the_model_does_not_know_are_told_with_the_option() -> None:
    class Small(EchoWorker):
        def begin(self, job: object) -> None:
            raise InvalidParameter("token_ids holds 9, but the model's ids end at 3", data={"parameter": "token_ids"})

    with served(Small) as network, pytest.raises(InvalidParameter, match="--random-ids LOW HIGH"):
        asked(network)


def test_a_model_that_is_not_there_is_told_with_those_that_are() -> None:
    with served(EchoWorker) as network:
        with pytest.raises(UnknownModel, match="no model 'x' is served; there is: m"):
            network.model("x", 0)
        assert network.model("m", 0).name == "m"


def test_facts_are_of_the_network_and_of_what_it_counted_meanwhile() -> None:
    with served(EchoWorker) as network:
        card, before = network.model("m", 0), network.status()
        asked(network)
        facts = NetworkFacts(before, network.status(), card).plain()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["counters"]["requests"] == 1
    assert (facts["slots"], facts["model"]["name"], facts["workers"][0]["backend"]) == (256, "m", "echo")
