"""When to try again what an upstream refused: exponential backoff with full jitter, or what its Retry-After says."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

BASE_S = 0.5
CAP_S = 8.0
LONGEST_S = 60.0
"""A longer Retry-After is passed on to the client: a slot is not kept waiting for it."""


def retry_after_s(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds from a Retry-After header (RFC 9110: a number of seconds or a date); None where it is absent or says neither."""
    text = (value or "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        pass
    else:
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


def pause_s(
    attempt: int, told_s: float | None, remaining_s: float | None, draw: Callable[[float, float], float] = random.uniform
) -> float | None:
    """How long to wait after failed attempt `attempt` (1, 2, ...); None: not at all, it would be too late or too long.

    `told_s`: what Retry-After said. `remaining_s`: until the request's deadline, None without one. Full jitter: M. Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog (2015).
    """
    wait_s = draw(0.0, min(CAP_S, BASE_S * 2.0 ** min(attempt - 1, 10)))
    if told_s is not None:
        # Those who were told the same moment must not all come at once.
        wait_s += told_s
    if wait_s > LONGEST_S or (remaining_s is not None and wait_s >= remaining_s):
        return None
    return wait_s
