"""From requests as a client saw them to a result: definitions and names as in `vllm bench serve` (vllm/benchmarks/serve.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Client-side Queueing"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "Queue-inclusive End-to-end Latency"),
}
"""What percentiles may be asked of, and how it is printed."""
OBJECTIVES = ("ttft", "tpot", "e2el")
"""What a goodput may bound, in ms."""


class Record(Struct):
    """One request. Points in time are of time.perf_counter, the others seconds from `start_s`, when it was sent.

    `due_s`: when its arrival was planned; `arrival_s`: when the client took it up; from then it may have waited for its turn. `itls_s`:
    between two chunks each. `latency_s`: to the last chunk. `error_type`: the error's class, empty where the request was answered;
    such a one counts as failed. `input_tokens` are what was meant until the usage is known. The `*_ms` are those of the worker that
    answered (see zmqserve.messages.Timings).
    """

    index: int
    input_tokens: int
    due_s: float = 0.0
    arrival_s: float = 0.0
    start_s: float = 0.0
    ttft_s: float = 0.0
    itls_s: list[float] = []
    latency_s: float = 0.0
    output_tokens: int = 0
    text: str = ""
    finish_reason: str = ""
    error_type: str = ""
    error: str = ""
    worker: str = ""
    resumed: int = 0
    queue_ms: float = 0.0
    first_ms: float = 0.0
    total_ms: float = 0.0

    @property
    def tpot_s(self) -> float:
        """Seconds per token after the first; 0 where there is none, as a goodput takes it."""
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def queued_s(self) -> float:
        """How long it waited in the client for its turn."""
        return self.start_s - self.arrival_s

    def keeps(self, goodput: Mapping[str, float]) -> bool:
        """Whether it was answered within these objectives (ms)."""
        times_s = {"ttft": self.ttft_s, "tpot": self.tpot_s, "e2el": self.latency_s}
        return not self.error_type and all(times_s[name] * 1000 <= bound_ms for name, bound_ms in goodput.items())


def summary(records: Sequence[Record], duration_s: float, goodput: Mapping[str, float]) -> dict[str, Any]:
    """The result but for its latencies. `goodput`: bounds in ms by name; without any, `request_goodput` is None."""
    answered = [record for record in records if not record.error_type]
    output = sum(record.output_tokens for record in answered)
    tokens = sum(record.input_tokens for record in answered) + output
    good = sum(record.keeps(goodput) for record in records)
    peak_tokens, peak_requests = _peaks(answered)
    return {
        "duration": duration_s,
        "completed": len(answered),
        "failed": len(records) - len(answered),
        "total_input_tokens": tokens - output,
        "total_output_tokens": output,
        "request_throughput": len(answered) / duration_s,
        "request_goodput": good / duration_s if goodput else None,
        "output_throughput": output / duration_s,
        "total_token_throughput": tokens / duration_s,
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
        "good_requests": good if goodput else None,
        "errors_by_type": dict(Counter(record.error_type for record in records if record.error_type).most_common()),
        "resumed": sum(record.resumed for record in records),
    }


def latencies(records: Sequence[Record], *, queued: bool, planned: bool) -> dict[str, list[float]]:
    """Milliseconds of each request that was answered, by the names of TITLES.

    `queued`: the concurrency is bounded, so requests may wait in the client; `planned`: their arrivals were planned (a request rate).
    """
    answered = [record for record in records if not record.error_type]
    values = {
        "ttft": [record.ttft_s for record in answered],
        "tpot": [record.tpot_s for record in answered if record.output_tokens > 1],
        "itl": [itl_s for record in answered for itl_s in record.itls_s],
        "e2el": [record.latency_s for record in answered],
    }
    if queued:
        values["client_queue_time"] = [record.queued_s for record in answered]
        if planned:
            values["e2el_including_client_queue"] = [record.latency_s + record.queued_s for record in answered]
    return {name: [value * 1000 for value in each] for name, each in values.items()}


def statistics_of(name: str, values_ms: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """Keys like ``mean_ttft_ms`` and ``p99.9_ttft_ms``; all 0 where there are no values."""
    values = np.array(values_ms or [0.0])
    found = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
    found |= {f"p{int(each) if int(each) == each else each}": np.percentile(values, each) for each in percentiles}
    return {f"{kind}_{name}_ms": float(value) for kind, value in found.items()}


def details(records: Sequence[Record]) -> dict[str, list[Any]]:
    """One value per request, in the order in which they were planned."""
    return {key: [of(record) for record in records] for key, of in _DETAILS.items()}


def _peaks(answered: Sequence[Record]) -> tuple[float, int]:
    """The most chunks of any one second from the first start on, and the most requests that any one of these seconds saw open."""
    if not answered:
        return 0.0, 0
    began_s = min(record.start_s for record in answered)
    seconds = math.ceil(max(record.start_s + record.latency_s for record in answered) - began_s) + 1
    chunks = np.zeros(seconds)
    # Openings and what lies behind the closings, to be added up: a request counts in every second that it touches.
    changes = np.zeros(seconds + 1, dtype=int)
    for record in answered:
        start_s = record.start_s - began_s
        np.add.at(chunks, (start_s + record.ttft_s + np.cumsum([0.0, *record.itls_s])).astype(int).clip(max=seconds - 1), 1)
        changes[int(start_s)] += 1
        changes[int(start_s + record.latency_s) + 1] -= 1
    return float(chunks.max()), int(changes.cumsum().max())


_DETAILS: Mapping[str, Callable[[Record], Any]] = {
    "input_lens": lambda record: record.input_tokens,
    "output_lens": lambda record: 0 if record.error_type else record.output_tokens,
    "ttfts": lambda record: record.ttft_s,
    "itls": lambda record: record.itls_s,
    "latencies": lambda record: record.latency_s,
    "start_times": lambda record: record.start_s,
    "queue_times": lambda record: record.queued_s,
    "generated_texts": lambda record: record.text,
    "errors": lambda record: record.error,
}
DETAIL_KEYS = frozenset(_DETAILS)
"""What a result has of each request, if it is detailed."""
