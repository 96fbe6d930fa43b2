"""The search for the highest request rate, on made-up networks."""

from __future__ import annotations

import math

import pytest

from bench.serve_sweep import Sweep, Trial, sweep


def searched(capacity: float, start: float, *, tolerance: float = 0.05, most: float = math.inf, wanted: float = 0.99) -> Sweep:
    """On a network that keeps the goodput up to `capacity` requests/s and for half of the requests above it; answers take 0.1 s."""
    return sweep(lambda rate: Trial(rate, 1.0 if rate <= capacity else 0.5, rate * 0.1, {}), start, wanted, tolerance, most)


@pytest.mark.parametrize("start", [1.0, 37.0, 100.0, 101.0, 3000.0])
@pytest.mark.parametrize("tolerance", [0.01, 0.05, 0.5])
def test_the_capacity_lies_between_what_passed_and_what_failed(start: float, tolerance: float) -> None:
    found = searched(100.0, start, tolerance=tolerance)
    assert found.above is not None
    assert found.request_rate <= 100.0 < found.above <= found.request_rate * (1 + tolerance)


def test_it_doubles_and_then_bisects() -> None:
    found = searched(100.0, 10.0, tolerance=0.2)
    assert [trial.request_rate for trial in found.trials] == [10, 20, 40, 80, 160, 113.1, 95.12]


def test_it_does_not_go_above_the_highest_rate_to_try() -> None:
    found = searched(100.0, 10.0, most=60.0)
    assert (found.request_rate, found.above) == (60.0, None)
    assert [trial.request_rate for trial in found.trials] == [10, 20, 40, 60]


def test_where_a_request_alone_does_not_keep_it_no_rate_does() -> None:
    found = searched(0.0, 100.0)
    assert found.request_rate == 0.0
    assert [trial.request_rate for trial in found.trials] == [100, 50, 25, 12.5, 6.25, 3.125]


@pytest.mark.parametrize(("wanted", "request_rate"), [(0.99, 8.0), (0.9, 64.0)])
def test_the_share_of_good_requests_that_is_wanted_decides(wanted: float, request_rate: float) -> None:
    def share(rate: float) -> float:
        return 1.0 if rate <= 8 else 0.95 if rate <= 64 else 0.0

    found = sweep(lambda rate: Trial(rate, share(rate), 1.0, {}), 1.0, wanted, 0.05)
    assert found.request_rate == pytest.approx(request_rate, rel=0.05)
