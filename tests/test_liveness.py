"""Leases, backoff and the agenda: time without a clock."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
from hypothesis import given

from zmqserve.liveness import Agenda, Backoff, Lease, Timer


def test_a_lease_ends_when_its_ttl_has_passed_in_silence() -> None:
    lease = Lease(3.0, now=10.0)
    assert not lease.expired(12.999)
    assert lease.expired(13.0)


def test_traffic_renews_a_lease() -> None:
    lease = Lease(3.0, now=10.0)
    lease.heard_s = 12.0
    assert lease.ends_s == 15.0
    assert not lease.expired(14.9)
    assert repr(lease) == "Lease(ttl_s=3.0, heard_s=12.0)"


def test_backoff_doubles_up_to_its_bound_with_jitter_in_the_upper_half() -> None:
    backoff = Backoff(0.1, 2.0, Random(1))
    for length in (0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0):
        assert length / 2 <= backoff.next_s() <= length


def test_backoff_never_overflows_and_begins_anew_after_a_reset() -> None:
    backoff = Backoff(0.1, 2.0, Random(1))
    for _ in range(5000):
        assert backoff.next_s() <= 2.0
    backoff.reset()
    assert backoff.next_s() <= 0.1


def test_backoffs_with_one_seed_are_equal_and_with_others_spread() -> None:
    def waits(seed: int) -> list[float]:
        backoff = Backoff(0.1, 2.0, Random(seed))
        return [backoff.next_s() for _ in range(6)]

    assert waits(7) == waits(7)
    assert len({waits(seed)[0] for seed in range(100)}) == 100


def test_timers_run_in_order_of_time_and_equal_times_in_order_of_arrival() -> None:
    agenda, ran = Agenda(), list[str]()
    for when_s, name in ((3.0, "c"), (1.0, "a"), (2.0, "b1"), (2.0, "b2")):
        agenda.at(when_s, lambda now, name=name: ran.append(name))  # type: ignore[misc]
    agenda.run(2.0)
    assert ran == ["a", "b1", "b2"]
    assert agenda.next_s() == 3.0
    assert len(agenda) == 1


def test_an_action_is_told_the_time_of_the_run_not_its_own() -> None:
    agenda, told = Agenda(), list[float]()
    agenda.at(1.0, told.append)
    agenda.run(9.0)
    assert told == [9.0]


def test_a_cancelled_timer_does_not_run_and_is_not_due() -> None:
    agenda, ran = Agenda(), list[float]()
    timer = agenda.at(1.0, ran.append)
    timer.cancel()
    timer.cancel()
    assert agenda.next_s() is None
    assert len(agenda) == 0
    agenda.run(5.0)
    assert ran == []
    assert repr(timer) == "Timer(when_s=1.0, over)"


def test_cancelling_what_has_run_does_not_disturb_the_count() -> None:
    agenda = Agenda()
    timer = agenda.at(1.0, lambda now: timer.cancel())
    agenda.run(1.0)
    timer.cancel()
    assert len(agenda) == 0
    agenda.at(2.0, lambda now: None)
    assert len(agenda) == 1
    assert repr(agenda) == "Agenda(1 pending)"


def test_an_action_may_add_timers_and_those_already_due_run_too() -> None:
    agenda, ran = Agenda(), list[str]()

    def first(now: float) -> None:
        ran.append("first")
        agenda.at(now, lambda now: ran.append("now"))
        agenda.at(now + 1, lambda now: ran.append("later"))

    agenda.at(1.0, first)
    agenda.run(1.0)
    assert ran == ["first", "now"]
    agenda.run(2.0)
    assert ran == ["first", "now", "later"]


def test_an_action_may_cancel_others_that_are_due_as_well() -> None:
    agenda, ran = Agenda(), list[str]()
    victims: list[Timer] = []

    def strike(now: float) -> None:
        for victim in victims:
            victim.cancel()

    agenda.at(1.0, strike)
    victims += [agenda.at(1.0, lambda now: ran.append("victim")) for _ in range(200)]
    agenda.at(1.0, lambda now: ran.append("last"))
    agenda.run(1.0)
    assert ran == ["last"]
    assert len(agenda) == 0


def test_a_hundred_thousand_cancelled_timers_take_no_room() -> None:
    agenda = Agenda()
    kept = [agenda.at(float(number), lambda now: None) for number in range(10)]
    for number in range(100_000):
        agenda.at(1000.0 + number, lambda now: None).cancel()
        assert len(agenda._heap) <= 2 * len(kept) + 130
    assert len(agenda) == len(kept)
    assert agenda.next_s() == 0.0


@given(
    st.lists(st.one_of(st.tuples(st.just("at"), st.integers(0, 20)), st.tuples(st.sampled_from(["cancel", "run"]), st.integers(0, 200))))
)
def test_the_agenda_does_what_a_sorted_list_would(steps: list[tuple[str, int]]) -> None:
    agenda, ran, model = Agenda(), list[int](), dict[int, int]()
    timers: list[Timer] = []
    now = 0
    for step, number in steps:
        if step == "at":
            serial = len(timers)
            timers.append(agenda.at(float(number), lambda now, serial=serial: ran.append(serial)))  # type: ignore[misc]
            model[serial] = number
        elif step == "cancel" and timers:
            timers[number % len(timers)].cancel()
            model.pop(number % len(timers), None)
        elif step == "run":
            now = max(now, number % 21)
            due = sorted((when_s, serial) for serial, when_s in model.items() if when_s <= now)
            del ran[:]
            agenda.run(float(now))
            assert ran == [serial for _, serial in due]
            for _, serial in due:
                del model[serial]
        assert len(agenda) == len(model)
        assert agenda.next_s() == (min(model.values()) if model else None)
