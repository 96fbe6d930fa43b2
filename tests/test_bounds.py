"""What a controller has room for, beside docs/limits.md: what is over a bound leaves nothing, and nobody loses what he has."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from zmqserve import messages as m
from zmqserve.bounds import MOST_CONNECTIONS, Offers
from zmqserve.config import ControllerConfig

from .fakes.network import Network, card
from .test_limits import fill, refusals


def test_what_is_over_a_limit_leaves_nothing_behind() -> None:
    network = Network(total_requests=2, max_clients=1)
    worker = network.worker(slots=1)
    one, two = network.client(), network.client()
    fill(network, one, 5)
    two.generate(50)
    assert len(network.broker.flights.clients) == 1
    assert network.broker.flights.open == 2
    for rid in (1, 2):
        worker.task(rid).done()
    two.generate(51)
    worker.task(51).done()
    network.assert_clean()


def test_payloads_are_held_until_an_answer_begins() -> None:
    network = Network(total_bytes=400)
    worker = network.worker(slots=9)
    client = network.client()
    client.generate(1, prompt="x" * 300)
    client.generate(2, prompt="x" * 300)
    assert client.error(2).data["bound"] == "total_bytes"
    worker.task(1).first()
    client.generate(3, prompt="x" * 300)
    worker.task(3).done()
    worker.task(1).done()
    network.assert_clean()


def test_a_worker_that_has_a_place_keeps_it_when_all_are_taken() -> None:
    network = Network(max_workers=1, max_models=1)
    worker = network.worker()
    worker.ready(0)
    assert worker.is_registered()
    worker.ready(worker.epoch, slots=5)
    assert worker.is_registered()
    other = network.worker("other")
    assert [refused.retry_after_ms is not None for refused in refusals(other)] == [True]
    worker.say(m.BYE)
    other.ready()
    assert other.is_registered()


def test_offers_are_counted_before_they_are_read_and_by_connection() -> None:
    network = Network(readies_per_s=1)
    noisy, calm = network.worker("noisy"), network.worker("calm")
    for _ in range(1000):
        noisy.say(m.READY, b"\xc1 not read at all", epoch=0)
    assert {refused.code for refused in refusals(noisy)[1:]} == {42901}
    assert not noisy.is_registered()
    assert calm.is_registered()
    calm.ready(calm.epoch)
    assert calm.is_registered()
    network.advance(1.0)
    calm.load()
    noisy.ready()
    assert noisy.is_registered()


def test_connections_that_were_quiet_are_forgotten_and_those_that_are_not_are_bounded() -> None:
    offers = Offers(ControllerConfig())
    for number in range(1000):
        offers.take(60.0 * number, b"%d" % number, 10)
    assert len(offers) == 1
    for number in range(MOST_CONNECTIONS + 100):
        offers.take(60_000.0, b"%d" % number, 10)
    assert len(offers) == MOST_CONNECTIONS


def test_ten_thousand_registrations_of_one_name_cost_little() -> None:
    """On one connection, and on as many as there are registrations: a few lines of the log, a bounded memory, and its owner stays."""
    network = Network()
    owner = network.worker("w")
    for number in range(10_000):
        thief = network.worker("w", identity=b"\0%d" % number)
        del network.workers[thief.identity]
    again = network.worker("v")
    for _ in range(10_000):
        again.ready(0)
    assert owner.is_registered()
    assert len(network.broker.registry.workers) <= 2
    assert len(network.reports) < 500
    assert len(network.broker.members._offers) <= MOST_CONNECTIONS
    network.check()


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "two\nlines", "\u202eright to left", "nul\0"])
def test_an_offer_that_would_play_with_a_terminal_is_refused(text: str) -> None:
    offer = m.Ready(m.PROTOCOL, "w", "echo", "ready", [card()], 1, 1.0, 3000)
    fields: list[dict[str, Any]] = [{"resume": {text: "exact"}}, {"resume": {"n": text}}]
    for field, value in msgspec.structs.asdict(card()).items():
        if isinstance(value, str | list):
            fields.append({field: text if isinstance(value, str) else [text]})
    offers = [msgspec.structs.replace(offer, models=[card("fine"), card(**each)]) for each in fields]
    offers += [msgspec.structs.replace(offer, **{field: text}) for field in ("name", "backend", "version")]
    offers.append(msgspec.structs.replace(offer, controllers=["fine", text]))
    for each in offers:
        network = Network()
        worker = network.worker(register=False)
        worker.say(m.READY, m.encode(each), epoch=0)
        assert [(refused.code, repr(text) in refused.why) for refused in refusals(worker)] == [(40001, True)]
        assert not worker.is_registered()


def test_a_long_text_that_is_refused_is_not_repeated_whole() -> None:
    network = Network()
    worker = network.worker("w", card(source="x" * 100_000 + "\a"))
    (refused,) = refusals(worker)
    assert "holds '\\x07', a character that cannot be printed" in refused.why
    assert len(refused.why) < 300


def test_an_offer_in_any_language_is_taken() -> None:
    network = Network()
    assert network.worker("w\u00e9", card("\u6a21\u578b", source="/srv/my models/\u6a21\u578b", features=["\u05d0"])).is_registered()


def test_what_waits_for_a_worker_that_is_given_up_is_let_go() -> None:
    """Its connection may live on and never be read: each would keep an outbox full of requests that have long gone elsewhere."""
    network = Network()
    dropped: list[bytes] = []
    network.broker.members.drop_outbox = dropped.append
    worker = network.worker()
    network.full.add(worker.identity)
    network.client().generate(1)
    assert not worker.is_registered()
    assert dropped == [worker.identity]
