"""Workers, models and slots: what the controller knows of them, without a broker."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.config import ControllerConfig
from zmqserve.dispatch import ShortestQueue
from zmqserve.need import Need
from zmqserve.registry import MOST_LIGHT, Registry, Worker
from zmqserve.waiting import WaitingRoom

from .fakes.effort import calls
from .fakes.network import card

GENERATE, COUNT = Need("generate"), Need("count_tokens")
RANDOM = Random(1)


def registry() -> Registry:
    return Registry(ShortestQueue, lambda: WaitingRoom(ControllerConfig(), count(1)))


def worker(name: str, *cards: m.ModelCard, slots: int = 2, state: str = "ready", **fields: Any) -> Worker:
    ready = m.Ready(m.PROTOCOL, name, "fake", state, list(cards) or [card()], slots, 1.0, 3000, **fields)
    return Worker(name.encode(), ready, 1, 0.0)


def test_a_need_is_met_by_verb_and_fingerprint() -> None:
    offered = card(fingerprint="f1", verbs=["generate"])
    assert GENERATE.met_by(offered)
    assert Need("generate", "f1").met_by(offered)
    assert not Need("generate", "f2").met_by(offered)
    assert not Need("embed").met_by(offered)


def test_a_slot_is_taken_and_given_back() -> None:
    known, one = registry(), worker("one")
    known.add(one)
    pool = known.pools["m"]
    for free in (1, 0):
        known.take(one, "m")
        assert one.free == free
    assert pool.pick(GENERATE, RANDOM) is None
    known.give_back(one, "m")
    assert pool.pick(GENERATE, RANDOM) is one
    assert repr(one) == "Worker('one', ready, load=1, slots=2)"


def test_loading_draining_and_stalled_workers_get_nothing() -> None:
    known, one = registry(), worker("one")
    known.add(one)
    pool = known.pools["m"]
    states = [one.state]
    one.stalled_s = 1.0
    known.touch(one)
    states.append(one.state)
    assert (one.free, pool.pick(GENERATE, RANDOM), pool.any_usable(COUNT, RANDOM)) == (0, None, None)
    one.stalled_s, one.draining = None, True
    known.touch(one)
    states.append(one.state)
    assert (one.free, pool.pick(GENERATE, RANDOM), pool.any_usable(COUNT, RANDOM)) == (0, None, None)
    assert states == ["ready", "stalled", "draining"]
    loading = worker("two", state="loading")
    known.add(loading)
    assert (loading.state, loading.free) == ("loading", 0)


def test_a_pool_says_what_its_workers_can_do_now_or_later() -> None:
    known = registry()
    known.add(worker("one", card(verbs=["generate"], fingerprint="f1")))
    pool = known.pools["m"]
    assert pool.can(GENERATE)
    assert not pool.can(COUNT)
    assert pool.hopeless(COUNT)
    known.add(worker("two", state="loading"))
    assert not pool.can(COUNT)
    assert not pool.hopeless(COUNT)


def test_a_model_is_found_by_name_before_alias() -> None:
    known = registry()
    known.add(worker("one", card("a", aliases=["b", "c"])))
    known.add(worker("two", card("b")))
    found = [known.find(name) for name in ("a", "b", "c", "d", "")]
    assert [pool.model if pool else None for pool in found] == ["a", "b", "a", None, None]
    assert known.known_models() == ["a", "b"]


def test_a_worker_that_comes_changes_or_goes_costs_the_same_however_many_there_are() -> None:
    """Each may offer a thousand models that all the others offer, too."""

    def effort(workers: int) -> list[int]:
        known, cards = registry(), [card(f"m{number}", aliases=[f"a{number}"]) for number in range(20)]
        for number in range(workers):
            known.add(worker(f"w{number}", *cards))
        last, changed = worker("last", *cards), m.Ready(m.PROTOCOL, "last", "fake", "ready", cards[:10], 3, 1.0, 3000)
        return [calls(lambda: known.add(last)), calls(lambda: known.update(last, changed)), calls(lambda: known.remove(last))]

    assert all(with_many < 2 * with_few for with_few, with_many in zip(effort(10), effort(100), strict=True))


def test_a_models_card_verbs_and_aliases_are_what_its_workers_offer_now() -> None:
    """Whatever comes, changes or goes: the same as if it was all looked at anew."""
    random, known = Random(5), registry()
    there: dict[str, Worker] = {}
    for step in range(400):
        name = f"w{random.randrange(6)}"
        verbs = random.sample(["generate", "chat", "embed"], random.randrange(4))
        offered = card(verbs=verbs, aliases=random.choices("xyz", k=random.randrange(4)), context_length=step)
        ready = worker(name, offered, state=random.choice(["ready", "loading"]))
        if name not in there:
            there[name] = ready
            known.add(ready)
        elif random.random() < 0.5:
            known.remove(there.pop(name))
        else:
            state = "loading" if ready.loading else "ready"
            known.update(there[name], m.Ready(m.PROTOCOL, name, "fake", state, [offered], 2, 1.0, 3000))
        pool = known.pools["m"]
        offers = {each.name: each.cards["m"] for each in there.values()}
        ready_ones = [offers[each.name] for each in there.values() if not each.loading and offers[each.name].verbs]
        if offers:
            assert pool.card == next(iter(ready_ones or offers.values()))
            assert pool.aliases == {alias for each in offers.values() for alias in each.aliases}
            assert pool.partial == {alias for alias in pool.aliases if not all(alias in each.aliases for each in offers.values())}
        for verb in ("generate", "chat", "embed"):
            assert pool.can(Need(verb)) == any(Need(verb).met_by(each) for each in ready_ones)


def test_a_pool_outlives_its_last_worker_with_card_and_aliases_until_it_is_discarded() -> None:
    known, one = registry(), worker("one", card("a", aliases=["c"], context_length=9))
    known.add(one)
    (pool,) = known.remove(one)
    assert (pool.state, pool.card.context_length, known.find("c")) == ("no worker", 9, pool)
    known.discard(pool)
    assert (known.find("a"), known.find("c"), repr(known)) == (None, None, "Registry(0 workers, 0 models)")


def test_a_pools_card_is_that_of_a_ready_worker_first() -> None:
    known = registry()
    known.add(worker("one", card(context_length=1), state="loading"))
    assert (known.pools["m"].state, known.pools["m"].card.context_length) == ("loading", 1)
    known.add(worker("two", card(context_length=2)))
    assert (known.pools["m"].state, known.pools["m"].card.context_length) == ("ready", 2)


def test_avoided_workers_are_chosen_only_when_there_is_no_other() -> None:
    known, one, two = registry(), worker("one"), worker("two")
    known.add(one)
    known.add(two)
    pool = known.pools["m"]
    assert {pool.pick(GENERATE, RANDOM, avoid=frozenset({"one"})) for _ in range(20)} == {two}
    assert pool.pick(GENERATE, RANDOM, avoid=frozenset({"one", "two"})) in (one, two)


def test_affinity_keeps_a_key_on_one_worker_also_of_those_that_came_later() -> None:
    known = registry()
    workers = [worker(f"w{number}", slots=100) for number in range(4)]
    for member in workers[:2]:
        known.add(member)
    pool = known.pools["m"]
    assert len({pool.pick(GENERATE, RANDOM, "key") for _ in range(50)}) == 1
    for member in workers[2:]:
        known.add(member)
    homes = [pool.pick(GENERATE, RANDOM, f"key{number}") for number in range(60)]
    assert set(homes) == set(workers)
    known.remove(workers[0])
    for number, home in enumerate(homes):
        if home is not workers[0]:
            assert pool.pick(GENERATE, RANDOM, f"key{number}") is home


def test_differing_verbs_narrow_the_choice() -> None:
    known, one, two = registry(), worker("one", card(verbs=["embed"])), worker("two", card(verbs=["generate"]))
    known.add(one)
    known.add(two)
    pool = known.pools["m"]
    assert {pool.pick(GENERATE, RANDOM) for _ in range(20)} == {two}
    assert {pool.pick(GENERATE, RANDOM, "key") for _ in range(20)} == {two}
    assert {pool.pick(Need("embed"), RANDOM) for _ in range(20)} == {one}


def test_an_offer_changes_in_place() -> None:
    known, one, two = registry(), worker("one", card("m"), card("k")), worker("two", card("m"))
    known.add(one)
    known.add(two)
    known.take(one, "m")
    changes, pool = known.changes, known.pools["m"]
    changed = worker("one", card("m", aliases=["x"]), card("n"), slots=5, controllers=["below"])
    ready = m.Ready(m.PROTOCOL, "one", "other", "ready", list(changed.cards.values()), 5, 3.0, 9000, ["below"])
    (left,) = known.update(one, ready)
    assert (left.model, left.state, known.find("n"), known.find("x")) == ("k", "no worker", known.pools["n"], pool)
    assert (one.running, one.slots, one.speed, one.backend, one.controllers, one.lease.ttl_s) == (1, 5, 3.0, "other", ["below"], 9.0)
    assert [each.model for each in one.pools] == ["m", "n"]
    assert known.changes > changes
    known.take(two, "m")
    assert pool.pick(GENERATE, RANDOM) is one
    known.update(one, m.Ready(m.PROTOCOL, "one", "other", "loading", [card("m")], 0, 1.0, 3000))
    assert (one.state, pool.pick(GENERATE, RANDOM)) == ("loading", two)


def test_a_worker_that_is_full_for_one_model_gets_others() -> None:
    known, one = registry(), worker("one", card("m"), card("k"), controllers=["below"])
    known.add(one)
    known.refused(one, "m")
    assert (known.pools["m"].pick(GENERATE, RANDOM), known.pools["k"].pick(GENERATE, RANDOM)) == (None, one)
    assert known.pools["m"].any_usable(COUNT, RANDOM) is one


def test_what_nobody_left_can_do_is_given_to_nobody() -> None:
    known, one = registry(), worker("one", card(verbs=["embed"]))
    known.add(one)
    known.add(worker("two", card(verbs=["generate"])))
    known.remove(one)
    assert known.pools["m"].pick(Need("embed"), RANDOM) is None


def test_a_heartbeat_tells_others_load() -> None:
    one = worker("one", slots=8)
    one.running = 2
    assert one.report(m.Load(running=5, waiting=1, yours=2, step_age_ms=3.5))
    assert (one.others, one.load, one.free, one.step_age_ms) == (4, 6, 2, 3.5)
    assert not one.report(m.Load(running=5, waiting=1, yours=2))
    assert one.report(m.Load(running=1, waiting=0, yours=9))
    assert (one.others, one.free) == (0, 6)
    assert not one.report(m.Load(running=1, waiting=2, yours=3)), "what waits may be ours as well"


def test_a_worker_has_room_for_light_requests_when_its_slots_are_full() -> None:
    one = worker("one", slots=1)
    one.running = 1
    one.flights = {(1, rid): None for rid in range(MOST_LIGHT)}  # type: ignore[misc]
    assert (one.has_room(GENERATE), one.has_room(COUNT)) == (False, True)
    one.flights[1, 1000] = None  # type: ignore[assignment]
    assert not one.has_room(COUNT)


def test_a_worker_without_models_is_known_and_serves_nothing() -> None:
    known = registry()
    ready = m.Ready(m.PROTOCOL, "idle", "fake", "ready", [], 1, 1.0, 3000)
    idle = Worker(b"idle", ready, 1, 0.0)
    known.add(idle)
    known.touch(idle)
    assert ([one.name for one in known], known.remove(idle)) == (["idle"], [])
