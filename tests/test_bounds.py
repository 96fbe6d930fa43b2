"""What a controller has room for, beside docs/limits.md: what is over a bound leaves nothing, and nobody loses what he has."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from zmqserve import messages as m
from zmqserve.bounds import MOST_OWNERS, Offers
from zmqserve.config import ControllerConfig

from .fakes.keys import GPU, GPU2, access
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
    assert {refused.code for refused in refusals(noisy)[10:]} == {42901}
    assert not noisy.is_registered()
    assert calm.is_registered()
    calm.ready(calm.epoch)
    assert calm.is_registered()
    network.advance(1.0)
    calm.load()
    noisy.ready()
    assert noisy.is_registered()


def many(count: int) -> list[m.ModelCard]:
    return [card(f"m{number}") for number in range(count)]


def test_changes_that_come_too_often_are_put_off_and_the_last_of_them_comes_into_force() -> None:
    network = Network(readies_per_s=1)
    worker = network.worker()
    for slots in range(1, 100):
        worker.ready(worker.epoch, slots=slots)
    assert worker.seen.slots < 99
    worker.load()
    network.advance(1.5)
    assert worker.seen.slots == 99
    assert worker.kinds().count(m.WELCOME) == 100  # each is answered: it knows when all that it said is taken
    assert not refusals(worker)
    assert network.counters["offers put off"] == 90
    network.check()


def test_a_change_that_was_put_off_is_forgotten_with_its_worker() -> None:
    network = Network(readies_per_s=1)
    worker = network.worker()
    for slots in range(1, 12):
        worker.ready(worker.epoch, slots=slots)
    worker.say(m.BYE)
    network.advance(5.0)
    worker.ready(slots=77)
    assert worker.seen.slots == 77
    network.advance(2.0)
    assert worker.seen.slots == 77
    network.assert_clean()


def test_offers_are_counted_by_key_where_there_are_keys() -> None:
    """However many connections it has; and workers of another key notice nothing of it."""
    network = Network(readies_per_s=2, access=access())
    noisy = [network.worker(f"noisy{number}", user=GPU) for number in range(20)]
    calm = network.worker("calm", user=GPU2)
    for _ in range(10):
        for worker in noisy:
            worker.ready(worker.epoch, slots=5)
    assert all(worker.is_registered() for worker in noisy)
    assert not any(worker.seen.slots == 5 for worker in noisy)
    calm.ready(calm.epoch, slots=5)
    assert calm.seen.slots == 5
    network.beat_for(5.0, *noisy, calm)
    assert 9 <= sum(worker.seen.slots == 5 for worker in noisy) <= 11
    network.beat_for(5.5, *noisy, calm)
    assert all(worker.seen.slots == 5 for worker in noisy)
    network.check()


def test_an_offer_of_many_models_counts_for_several() -> None:
    network = Network(readies_per_s=10, access=access())
    large = [network.worker(f"large{number}", *many(500), user=GPU) for number in range(5)]
    assert [worker.is_registered() for worker in large] == [True, True, True, True, False]
    (refused,) = refusals(large[4])
    assert refused.code == 42901
    assert refused.retry_after_ms is not None
    network.advance(refused.retry_after_ms / 1000 + 0.001)
    large[4].ready()
    assert large[4].is_registered()
    large[0].ready(large[0].epoch, slots=5)
    assert large[0].seen.slots == 1
    network.beat_for(3.0, *large)
    assert large[0].seen.slots == 5
    network.check()


def test_workers_of_one_key_that_all_come_at_once_are_told_different_times() -> None:
    """Told the same one, they would come together again and again, and one of them would be taken in each time."""
    network = Network(readies_per_s=5, access=access())
    fleet = [network.worker(f"w{number}", user=GPU) for number in range(90)]
    waiting = [worker for worker in fleet if not worker.is_registered()]
    assert len(waiting) == 40
    began_s, attempts = network.now, 0
    due = sorted((refusals(worker)[0].retry_after_ms or 0, number) for number, worker in enumerate(waiting))
    assert len({after_ms for after_ms, _ in due}) == 40
    for after_ms, number in due:
        network.advance(began_s + after_ms / 1000 + 0.001 - network.now)
        waiting[number].ready()
        attempts += 1
    assert all(worker.epoch for worker in waiting)
    assert attempts == 40
    crowd = [network.worker(f"c{number}", user=GPU) for number in range(200)]
    assert max(refused.retry_after_ms or 0 for worker in crowd for refused in refusals(worker)) == 10_000


def test_connections_that_were_quiet_are_forgotten_and_those_that_are_not_are_bounded() -> None:
    offers = Offers(ControllerConfig())
    for number in range(1000):
        offers.take(60.0 * number, b"%d" % number)
    assert len(offers) == 1
    for number in range(MOST_OWNERS + 100):
        offers.take(60_000.0, b"%d" % number)
    assert len(offers) == MOST_OWNERS


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
    assert len(network.broker.members._offers) <= MOST_OWNERS
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


@pytest.mark.parametrize(
    "sign", ["\u3000", "\u00a0", "\ue000", "\U0001fae8"], ids=["wide space", "fixed space", "private", "new in Unicode 15"]
)
def test_a_path_may_hold_what_only_looks_unprintable(sign: str) -> None:
    assert Network().worker("w", card(source=f"/srv/a{sign}b")).is_registered()


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
