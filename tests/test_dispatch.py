"""Dispatch methods: each against the plain scan that it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from scipy.stats import chisquare

from zmqserve.dispatch import POLICIES, Affinity, Lottery, Policy, ShortestQueue


class Worker:
    """A Candidate that counts how often it is looked at."""

    looks = 0

    def __init__(self, name: str, slots: int = 4, speed: float = 1.0, running: int = 0) -> None:
        self.name, self.slots, self.speed, self.running = name, slots, speed, running

    def __repr__(self) -> str:
        return f"Worker({self.name!r}, load={self.running}/{self.slots}, speed={self.speed})"

    @property
    def load(self) -> int:
        Worker.looks += 1
        return self.running

    @property
    def free(self) -> int:
        Worker.looks += 1
        return max(0, self.slots - self.running)


def shortest_scan(workers: list[Worker]) -> set[Worker]:
    free = [worker for worker in workers if worker.free]
    least = min((worker.load / worker.speed for worker in free), default=0.0)
    return {worker for worker in free if worker.load / worker.speed == least}


def picked_well(worker: Worker | None, of: set[Worker]) -> bool:
    return worker in of if worker is not None else not of


def lottery_scan(workers: list[Worker]) -> set[Worker]:
    return {worker for worker in workers if worker.free}


STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "add", "remove", "change", "change", "pick", "pick_allowed"]), st.integers(0, 39), st.integers(0, 5))
)


@pytest.mark.parametrize(("new", "scan"), [(ShortestQueue, shortest_scan), (Lottery, lottery_scan)])
@hypothesis_settings(max_examples=300)
@given(steps=STEPS, seed=st.integers(0, 100))
def test_a_policy_picks_what_a_scan_would(
    new: Callable[[], Policy[Worker]], scan: Callable[[list[Worker]], set[Worker]], steps: list[tuple[str, int, int]], seed: int
) -> None:
    policy, random, held = new(), Random(seed), dict[int, Worker]()
    for step, number, load in steps:
        if step == "add" and number not in held:
            held[number] = Worker(f"w{number}", slots=number % 5, speed=(0.5, 1.0, 3.0)[number % 3], running=load)
            policy.add(held[number])
        elif step == "remove" and number in held:
            worker = held.pop(number)
            policy.remove(worker)
            policy.remove(worker)
        elif step == "change" and number in held:
            held[number].running = load
            policy.changed(held[number])
        elif step == "pick":
            assert picked_well(policy.pick(random), scan(list(held.values())))
        elif step == "pick_allowed":
            fitting = [worker for worker in held.values() if worker.slots != load]
            assert picked_well(policy.pick(random, lambda worker, unwanted=load: worker.slots != unwanted), scan(fitting))  # type: ignore[misc]


@hypothesis_settings(max_examples=200)
@given(steps=STEPS)
def test_lottery_tickets_are_exact_whatever_happened(steps: list[tuple[str, int, int]]) -> None:
    policy, held = Lottery[Worker](), dict[int, Worker]()
    for step, number, load in steps:
        if step == "add" and number not in held:
            held[number] = Worker(f"w{number}", speed=0.1 + number / 7, running=load)
            policy.add(held[number])
        elif step == "remove" and number in held:
            policy.remove(held.pop(number))
        elif number in held:
            held[number].running = load
            policy.changed(held[number])
        tickets = {worker: round(worker.speed * worker.free * Lottery.TICKETS_PER_SPEED) for worker in held.values()}
        assert policy._total == sum(tickets.values())
        first = 0
        for worker in sorted(held.values(), key=lambda worker: policy._place[worker]):
            if tickets[worker]:
                assert policy._holders[policy._find(first)] is worker
                assert policy._holders[policy._find(first + tickets[worker] - 1)] is worker
            first += tickets[worker]


def test_shortest_queue_breaks_ties_uniformly() -> None:
    policy, random = ShortestQueue[Worker](), Random(4)
    workers = [Worker(f"w{number}") for number in range(8)]
    for worker in workers:
        policy.add(worker)
    drawn = Counter(policy.pick(random) for _ in range(20_000))
    assert chisquare([drawn[worker] for worker in workers]).pvalue > 0.01


def test_shortest_queue_stays_uniform_among_those_allowed() -> None:
    policy, random = ShortestQueue[Worker](), Random(5)
    workers = [Worker(f"w{number}") for number in range(6)]
    for worker in workers:
        policy.add(worker)
    drawn = Counter(policy.pick(random, lambda worker: worker.name in ("w1", "w4", "w5")) for _ in range(20_000))
    assert chisquare([drawn[workers[number]] for number in (1, 4, 5)]).pvalue > 0.01
    assert sum(drawn.values()) == 20_000


def test_shortest_queue_counts_speed() -> None:
    policy, random = ShortestQueue[Worker](), Random(1)
    slow, fast = Worker("slow", running=1, slots=9), Worker("fast", speed=4.0, running=3, slots=9)
    policy.add(slow)
    policy.add(fast)
    assert policy.pick(random) is fast
    fast.running = 5
    policy.changed(fast)
    assert policy.pick(random) is slow


def test_two_workers_share_a_hundred_requests_evenly_under_shortest_queue() -> None:
    policy, random = ShortestQueue[Worker](), Random(1)
    workers = [Worker("a", slots=100), Worker("b", slots=100)]
    for worker in workers:
        policy.add(worker)
    for _ in range(100):
        picked = policy.pick(random)
        assert picked is not None
        picked.running += 1
        policy.changed(picked)
    assert [worker.running for worker in workers] == [50, 50]


def test_lottery_with_speeds_1_and_3_draws_in_that_proportion() -> None:
    policy, random = Lottery[Worker](), Random(20)
    slow, fast = Worker("slow"), Worker("fast", speed=3.0)
    policy.add(slow)
    policy.add(fast)
    drawn = Counter(policy.pick(random) for _ in range(100_000))
    assert chisquare([drawn[slow], drawn[fast]], [25_000, 75_000]).pvalue > 0.01


def test_lottery_counts_free_slots_and_growth_keeps_every_ticket() -> None:
    policy, random = Lottery[Worker](), Random(21)
    workers = [Worker(f"w{number}", slots=1 + number % 4) for number in range(100)]
    for worker in workers:
        policy.add(worker)
    assert repr(policy) == f"Lottery(100 workers, {1000 * sum(worker.slots for worker in workers)} tickets)"
    drawn = Counter(policy.pick(random) for _ in range(100_000))
    tickets = sum(worker.slots for worker in workers)
    assert chisquare([drawn[worker] for worker in workers], [100_000 * worker.slots / tickets for worker in workers]).pvalue > 0.01


def test_lottery_keeps_its_proportions_among_those_allowed() -> None:
    policy, random = Lottery[Worker](), Random(22)
    workers = [Worker(f"w{number}", speed=float(1 + number)) for number in range(4)]
    for worker in workers:
        policy.add(worker)
    drawn = Counter(policy.pick(random, lambda worker: worker.speed != 2.0) for _ in range(40_000))
    assert chisquare([drawn[workers[number]] for number in (0, 2, 3)], [5_000, 15_000, 20_000]).pvalue > 0.01


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_asks_what_is_left_for_its_model(name: str) -> None:
    left = {"none": 0, "some": 1, "all": 4}
    policy: Policy[Worker] = POLICIES[name](lambda worker: left[worker.name])  # type: ignore[assignment]
    workers = {name: Worker(name) for name in left}
    for worker in workers.values():
        policy.add(worker)
    random = Random(2)
    assert {policy.pick(random) for _ in range(100)} == {workers["some"], workers["all"]}
    assert policy.pick(random, lambda worker: worker.name == "none") is None
    left.update(none=1, some=0)
    for worker in workers.values():
        policy.changed(worker)
    assert {policy.pick(random) for _ in range(100)} == {workers["none"], workers["all"]}


def test_a_very_slow_worker_with_a_free_slot_still_holds_a_ticket() -> None:
    policy = Lottery[Worker]()
    policy.add(Worker("slug", speed=1e-9))
    assert policy.pick(Random(1)) is not None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_an_empty_or_full_policy_picks_nobody(name: str) -> None:
    policy: Policy[Worker] = POLICIES[name]()  # type: ignore[assignment]
    assert policy.pick(Random(1)) is None
    policy.add(Worker("full", slots=1, running=1))
    assert policy.pick(Random(1)) is None
    assert policy.pick(Random(1), lambda worker: True) is None


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_pick_looks_at_no_more_workers_when_there_are_more(name: str) -> None:
    looks = []
    for count in (10, 1000):
        policy: Policy[Worker] = POLICIES[name]()  # type: ignore[assignment]
        random = Random(3)
        workers = [Worker(f"w{number}", slots=100, running=number % 3) for number in range(count)]
        for worker in workers:
            policy.add(worker)
        before = Worker.looks
        for _ in range(100):
            picked = policy.pick(random)
            assert picked is not None
            picked.running += 1
            policy.changed(picked)
        looks.append(Worker.looks - before)
    assert looks[1] <= looks[0]


def test_shortest_queue_keeps_no_buckets_of_loads_that_are_gone() -> None:
    policy, worker = ShortestQueue[Worker](), Worker("w", slots=10**6)
    for load in range(10_000):
        worker.running = load
        policy.changed(worker)
    assert len(policy._buckets) == 1
    assert len(policy._heap) <= 70


# --- affinity

KEYS = [f"key{number}" for number in range(100)]


def ring(count: int) -> tuple[Affinity[Worker], list[Worker]]:
    affinity = Affinity[Worker]()
    workers = [Worker(f"w{number}") for number in range(count)]
    for worker in workers:
        affinity.add(worker)
    return affinity, workers


def homes(affinity: Affinity[Worker], least: Worker) -> dict[str, Worker]:
    return {key: affinity.pick(key, least) for key in KEYS}


def test_keys_keep_their_worker_and_spread_over_all() -> None:
    affinity, workers = ring(5)
    before = homes(affinity, workers[0])
    assert homes(affinity, workers[3]) == before
    assert set(before.values()) == set(workers)


def test_a_worker_that_goes_moves_only_its_own_keys_and_gets_them_back() -> None:
    affinity, workers = ring(5)
    before = homes(affinity, workers[0])
    affinity.remove(workers[2])
    affinity.remove(workers[2])
    after = homes(affinity, workers[0])
    assert {key for key in KEYS if before[key] is not after[key]} == {key for key in KEYS if before[key] is workers[2]}
    returned = Worker("w2")
    affinity.add(returned)
    assert {key: worker.name for key, worker in homes(affinity, workers[0]).items()} == {key: w.name for key, w in before.items()}


def test_a_worker_that_comes_takes_its_share_and_moves_nothing_else() -> None:
    affinity, workers = ring(5)
    before = homes(affinity, workers[0])
    new = Worker("new")
    affinity.add(new)
    after = homes(affinity, workers[0])
    moved = [key for key in KEYS if before[key] is not after[key]]
    assert 0 < len(moved) < 50
    assert all(after[key] is new for key in moved)


def test_an_overloaded_or_full_worker_passes_its_keys_on() -> None:
    affinity, workers = ring(3)
    home = affinity.pick("session", workers[0])
    home.slots, home.running = 8, 8
    others = [worker for worker in workers if worker is not home]
    for worker in others:
        worker.slots, worker.running = 8, 2
    assert affinity.pick("session", others[0]) in others
    home.running = 5  # 1.5 x 2 + 0.25 x 8
    assert affinity.pick("session", others[0]) is home
    home.running = 6
    assert affinity.pick("session", others[0]) in others


def test_affinity_passes_by_a_worker_with_nothing_left_for_the_model() -> None:
    workers = [Worker(f"w{number}") for number in range(3)]
    affinity = Affinity[Worker](lambda worker: int(worker is not workers[1]))
    for worker in workers:
        affinity.add(worker)
    assert set(homes(affinity, workers[0]).values()) == {workers[0], workers[2]}


def test_affinity_falls_back_to_the_policys_choice() -> None:
    affinity, _ = ring(3)
    least = Worker("elsewhere")
    assert affinity.pick("session", least, lambda worker: False) is least
    assert Affinity[Worker]().pick("session", least) is least


def test_an_old_registration_that_goes_does_not_take_the_new_one_with_it() -> None:
    affinity, workers = ring(2)
    again = Worker("w1")
    affinity.add(again)
    affinity.remove(workers[1])
    assert again in homes(affinity, workers[0]).values()
