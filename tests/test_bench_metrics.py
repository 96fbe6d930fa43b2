"""What `bench serve` computes from what its clients saw: by hand, and how late the clients themselves were."""

from __future__ import annotations

import pytest

from bench import metrics
from bench.metrics import Record
from bench.serve_lag import Lag, summary


def record(index: int, start_s: float, ttft_s: float, itls_s: list[float], *, error: str = "", queued_s: float = 0.0) -> Record:
    """A request of 10 tokens in, and one token in each chunk of its answer."""
    return Record(
        index,
        10,
        due_s=start_s - queued_s,
        arrival_s=start_s - queued_s,
        start_s=start_s,
        ttft_s=ttft_s,
        itls_s=itls_s,
        latency_s=ttft_s + sum(itls_s),
        output_tokens=1 + len(itls_s),
        error_type=error,
        error=f"{error} happened" if error else "",
    )


RECORDS = [
    record(0, 100.0, 0.1, [0.1, 0.3]),  # tpot 0.2 s, e2el 0.5 s
    record(1, 100.5, 0.3, []),  # one token: no tpot
    record(2, 101.0, 0.2, [0.05, 0.05, 0.05, 0.05]),  # tpot 0.05 s, e2el 0.4 s
    record(3, 101.0, 0.1, [0.1], error="Overloaded"),
]


def test_sums_and_rates_are_over_answered_requests() -> None:
    found = metrics.summary(RECORDS, 4.0, {})
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 3 + 1 + 5)
    assert found["request_throughput"] == 3 / 4
    assert found["output_throughput"] == 9 / 4
    assert found["total_token_throughput"] == 39 / 4
    assert found["request_goodput"] is None
    assert found["errors_by_type"] == {"Overloaded": 1}


def test_latencies_by_hand() -> None:
    found = metrics.latencies(RECORDS, queued=False, planned=False)
    assert found["ttft"] == pytest.approx([100, 300, 200])
    assert found["tpot"] == pytest.approx([200, 50]), "an answer of one token has none"
    assert found["itl"] == pytest.approx([100, 300, 50, 50, 50, 50])
    assert found["e2el"] == pytest.approx([500, 300, 400])
    assert set(found) == {"ttft", "tpot", "itl", "e2el"}


def test_waiting_in_the_client_counts_apart_and_with_planned_arrivals_on_top() -> None:
    records = [record(0, 10.0, 0.1, [], queued_s=0.5)]
    closed = metrics.latencies(records, queued=True, planned=False)
    assert closed["client_queue_time"] == pytest.approx([500])
    assert closed["e2el"] == pytest.approx([100])
    assert "e2el_including_client_queue" not in closed
    assert metrics.latencies(records, queued=True, planned=True)["e2el_including_client_queue"] == pytest.approx([600])


def test_statistics_have_the_keys_of_vllm() -> None:
    found = metrics.statistics_of("ttft", [100.0, 200.0, 300.0, 400.0], [25, 99.9])
    assert found == pytest.approx(
        {"mean_ttft_ms": 250, "median_ttft_ms": 250, "std_ttft_ms": 12500**0.5, "p25_ttft_ms": 175, "p99.9_ttft_ms": 399.7}
    )
    assert set(metrics.statistics_of("itl", [], [99]).values()) == {0.0}


def test_goodput_counts_requests_that_keep_every_bound() -> None:
    def good(**goodput: float) -> int:
        return int(metrics.summary(RECORDS, 1.0, goodput)["good_requests"])

    assert good(ttft=200) == 2
    assert good(tpot=100) == 2, "one token: its tpot is 0; the failed one is never good"
    assert good(ttft=200, tpot=100) == 1
    assert good(ttft=200, tpot=100, e2el=399) == 0
    assert metrics.summary(RECORDS, 2.0, {"e2el": 1e9})["request_goodput"] == 1.5


def test_peaks_are_of_the_busiest_second_from_the_first_start() -> None:
    # Chunks at 0.1 0.2 0.5 | 0.8 | 1.2 1.25 1.3 1.35 1.4; open in second 0: 0 and 1, in second 1: 2.
    found = metrics.summary(RECORDS, 4.0, {})
    assert found["max_output_tokens_per_s"] == 5
    assert found["max_concurrent_requests"] == 2
    nothing = metrics.summary(RECORDS[3:], 4.0, {})
    assert (nothing["max_output_tokens_per_s"], nothing["max_concurrent_requests"]) == (0, 0)


def test_a_request_counts_as_open_in_every_second_that_it_touches() -> None:
    long = [record(0, 0.0, 2.5, []), record(1, 2.1, 0.1, []), record(2, 2.2, 0.1, [])]
    assert metrics.summary(long, 4.0, {})["max_concurrent_requests"] == 3


def test_details_are_per_request_with_failed_ones_in_their_places() -> None:
    found = metrics.details(RECORDS)
    assert found["output_lens"] == [3, 1, 5, 0]
    assert found["errors"] == ["", "", "", "Overloaded happened"]
    assert all(len(values) == len(RECORDS) for values in found.values())


# --- the client's own lag ----------------------------------------------------------------------


def test_a_punctual_client_limits_nothing() -> None:
    found = summary([Lag([0.001] * 99, [0.001] * 99, [0.001] * 99, 0.2)], planned=True, median_ttft_ms=50)
    assert found["limits"] == []
    assert found["reads_ms"] == {"p50": 1.0, "p99": 1.0, "max": 1.0}


@pytest.mark.parametrize(
    ("lag", "word"),
    [
        (Lag(reads=[0.02] * 9), "read"),
        (Lag(arrivals=[0.02] * 9), "left"),
        (Lag(cpu_share=0.97), "97% of a core"),
    ],
)
def test_a_late_or_busy_client_is_told(lag: Lag, word: str) -> None:
    (why,) = summary([Lag(), lag], planned=True, median_ttft_ms=50)["limits"]
    assert word in why


def test_lag_is_judged_beside_the_time_to_first_token() -> None:
    late = [Lag(reads=[0.02] * 9)]
    assert summary(late, planned=False, median_ttft_ms=1000)["limits"] == []
    assert summary(late, planned=False, median_ttft_ms=None)["limits"] == [], "nothing was answered, so nothing was measured late"
    assert summary([Lag(arrivals=[0.02] * 9)], planned=False, median_ttft_ms=1)["limits"] == [], "a closed loop plans no arrivals"
