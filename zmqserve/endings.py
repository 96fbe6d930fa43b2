"""The ends of requests that a controller makes itself, because no worker does."""

from __future__ import annotations

from collections import Counter

from . import messages as m
from .errors import DeadlineExceeded, Overloaded, SlowConsumer, WorkerLost, ZmqserveError
from .flight import Flight

RETRY_MS = 1000
"""Where nobody knows when there will be room again."""
REFUSED = "the controller refused it"
BROKE_PROTOCOL = "it broke the protocol"
"""What clients are told of why a worker was given up, where the reason names rules, models or requests that are none of theirs."""


def error_message(rid: int, error: ZmqserveError) -> bytes:
    """An exception as the Error message that ends a request."""
    return m.encode(m.Error(rid, error.code, error.message, error.retryable, error.retry_after_ms, dict(error.data)))


def cancelled_message(rid: int) -> bytes:
    """The Done of a request that was cancelled."""
    return m.encode(m.Done(rid, 0, ["cancelled"], m.Usage(0, 0), m.Timings("")))


def too_late() -> DeadlineExceeded:
    """For a request that no worker has ended in time."""
    return DeadlineExceeded("the deadline passed before a worker had answered")


def slow_consumer(outbox_bytes: int, outbox_total_bytes: int) -> SlowConsumer:
    """For the requests of a client that does not read."""
    text = "the client did not read: what waits for it, or for all clients together, reached its limit"
    return SlowConsumer(text, data={"outbox_bytes": outbox_bytes, "outbox_total_bytes": outbox_total_bytes})


def count_error(counters: Counter[str], error: ZmqserveError) -> None:
    """An error by its class and, where it is about one of the controller's limits, by the limit's name."""
    counters[f"errors: {type(error).__name__}"] += 1
    bound = error.data.get("bound")
    if bound:
        counters[f"over limit: {bound}"] += 1


def overloaded(bound: str, limit: int, what: str) -> Overloaded:
    """For what would go over one of a controller's bounds, which is named as its setting."""
    return Overloaded(f"{what}: the limit is {limit} ({bound})", retry_after_ms=RETRY_MS, data={"bound": bound, "limit": limit})


def none_left(flight: Flight) -> WorkerLost:
    """For a parent's request that has not begun, whose worker was lost where no other could take it."""
    lost = ", ".join(sorted(flight.avoid))
    text = f"worker {lost} was lost, and no other of {flight.pool.model} is left here: try again"
    return WorkerLost(text, data={"worker": lost, "attempts": flight.attempts, "beside": 0})


def worker_lost(flight: Flight, worker: str, why: str, max_attempts: int, beside: int) -> WorkerLost:
    """For a request whose worker was given up, with so many others `beside` it; not retryable when it is the last that it may lose."""
    again = flight.attempts < max_attempts
    text = f"worker {worker} was lost ({why})" + ("" if again else f", the {flight.attempts}. one that this request lost: giving it up")
    error = WorkerLost(text, data={"worker": worker, "attempts": flight.attempts, "beside": beside})
    error.retryable = again
    return error
