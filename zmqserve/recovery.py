"""What becomes of a request whose worker or controller was lost, or that was turned down for now: it is sent again, or it ends.

::

    what happened                           a chunk has come        none has
    its worker was lost                     resumed                 sent again
    its controller was lost, or leaves      resumed                 sent again
    turned down for now, after one of these resumed, for a while    sent again, for a while
    any other error that may pass           ends                    sent again `retries` times

Pure: `now` is passed in, and so is the randomness.
"""

from __future__ import annotations

import math
from random import Random

from msgspec.structs import replace

from .call import Call, ClientRequest
from .errors import GoingAway, Overloaded, QuotaExceeded, RateLimited, RetryLater, UnknownModel, WorkerLost, ZmqserveError
from .liveness import Backoff
from .messages import Drain, Generate, ListModels, Resume, Status

RECOVERED_TOKENS, RECOVERED_S = 16, 0.25
"""Progress that forgives: a worker that gave so many tokens, or went on living for so long after the first, was not killed by the
request right away. Only losses in a row count as attempts, or a long answer on a network where workers come and go would take itself
for a poison prompt. Less would not do: a worker may die before it has sent all that it made."""
CROWD = 8
"""Where at least so many others were lost with a worker, a request that had progress there is not suspected at all: it is one of many, and
not one that had just begun. Alone or among few it is, and the loss counts as the first."""
MOST_LOST_WORKERS = 8
"""After so many lost workers a request ends, whatever its progress."""
MOST_LOST_CONTROLLERS = 8
"""After so many lost controllers with no progress between them a request ends: it may be what kills them."""

FIRST_PAUSE_S, MOST_PAUSE_S = 0.05, 1.0
"""Pauses before a request that was moved is sent once more. Short at first: a restarted controller has its workers back in tenths of
a second."""
FIRST_RETRY_S, MOST_RETRY_S = 0.1, 5.0
"""Pauses before a retry that the caller asked for."""
RETRY_JITTER = 0.5
"""A retry comes up to so much later than `retry_after_ms`, in parts of it: those who were turned down together do not return together."""


class Recovery:
    """What one request has lost so far. Made at its first trouble, so that one without any pays nothing.

    `attempts`: what it says of itself to the next controller: workers lost in a row. `joined_s`: since when its present worker has
    answered. `until_s`: to then it is tried again when it is turned down for now, or finds no controller.
    """

    __slots__ = (
        "_failover_s",
        "_lost_controllers",
        "_lost_workers",
        "_pauses",
        "_random",
        "_retries",
        "_seq",
        "_tokens",
        "attempts",
        "joined_s",
        "until_s",
    )

    def __init__(self, failover_s: float, random: Random) -> None:
        self.attempts = 0
        self.joined_s = math.inf
        self.until_s = -math.inf
        self._failover_s = failover_s
        self._random = random
        self._lost_workers = self._lost_controllers = 0
        self._pauses: Backoff | None = None
        self._retries: Backoff | None = None
        self._seq = self._tokens = 0

    def __repr__(self) -> str:
        lost = f"{self._lost_workers} workers, {self._lost_controllers} controllers"
        return f"Recovery(lost {lost}, attempts={self.attempts}, until_s={self.until_s})"

    def sending(self, call: Call) -> None:
        """It is about to be sent again."""
        self._seq = call.next_seq
        self.joined_s = math.inf

    def going_on(self, now: float) -> None:
        """A worker gives more of the answer."""
        self.joined_s = min(self.joined_s, now)

    def lost_controller(self, now: float, call: Call, until_s: float, error: ZmqserveError) -> bool:
        """Its controller was lost. Whether it goes on at another, for which it may look until `until_s`."""
        self._forgive(now, call)
        self.until_s = until_s
        if call.next_seq != self._seq:
            self._lost_controllers, self._pauses = 0, None
        self._lost_controllers += not isinstance(error, GoingAway)
        return (call.next_seq == 0 or resumable(call)) and self._lost_controllers < MOST_LOST_CONTROLLERS

    def after(self, now: float, call: Call, error: ZmqserveError) -> float | None:
        """Seconds after which it is sent again, or None: it ends with this error."""
        if isinstance(error, WorkerLost):
            if not self._moves(now, call, error):
                return None
        elif isinstance(error, GoingAway):
            self._forgive(now, call)
            if call.next_seq > 0 and not resumable(call):
                return None
        else:
            return self.turned_down(now, call, error)
        self.until_s = now + self._failover_s
        if call.next_seq != self._seq or self._pauses is None:
            self._pauses = Backoff(FIRST_PAUSE_S, MOST_PAUSE_S, self._random)
            return 0.0
        return self._pauses.next_s()

    def _moves(self, now: float, call: Call, error: WorkerLost) -> bool:
        """Count what was lost; whether there may be another worker."""
        told = error.data.get("attempts")
        attempts = told if isinstance(told, int) else self.attempts + 1
        recovered = self._recovered(now, call)
        # A worker that leaves costs no attempt; but one that says so with nothing new to show for it could say it for ever.
        lost = max(0 if received_tokens(call) > self._tokens else 1, attempts - self.attempts)
        self._lost_workers += lost
        self._tokens = received_tokens(call)
        beside = error.data.get("beside", 0)
        crowd = isinstance(beside, int) and beside >= CROWD
        self.attempts = attempts if not recovered else 0 if crowd else min(lost, 1)
        if call.next_seq > 0 and not resumable(call):
            return False
        if self._lost_workers >= MOST_LOST_WORKERS:
            error.retryable = False
            return False
        # A controller knows nothing of progress. What it refuses for another reason than the count stays refused.
        return error.retryable or (recovered and told is not None)

    def _recovered(self, now: float, call: Call) -> bool:
        """Whether there was progress since the last worker was lost."""
        return received_tokens(call) - self._tokens >= RECOVERED_TOKENS or now - self.joined_s >= RECOVERED_S

    def _forgive(self, now: float, call: Call) -> None:
        """It moves, and no worker died of it: those lost before its progress count no more."""
        if self._recovered(now, call):
            self.attempts = 0

    def turned_down(self, now: float, call: Call, error: ZmqserveError) -> float | None:
        """`after`, for what nobody has taken: never at once."""
        # A controller that has just started does not know all its workers yet.
        passing = (isinstance(error, RetryLater) and error.retryable) or isinstance(error, UnknownModel)
        if passing and now < self.until_s and (call.next_seq == 0 or resumable(call)):
            if self._pauses is None:
                self._pauses = Backoff(FIRST_PAUSE_S, MOST_PAUSE_S, self._random)
            pause_s = self._pauses.next_s()
            if isinstance(error, Overloaded | RateLimited | QuotaExceeded):
                pause_s = max(pause_s, (error.retry_after_ms or 0) / 1000)
            if now + pause_s < self.until_s:
                return pause_s
        if not error.retryable or call.next_seq > 0 or call.retries <= 0:
            return None
        if self._retries is None:
            self._retries = Backoff(FIRST_RETRY_S, MOST_RETRY_S, self._random)
        asked_s = (error.retry_after_ms or 0) / 1000 * self._random.uniform(1.0, 1.0 + RETRY_JITTER)
        pause_s = max(asked_s, self._retries.next_s())
        if call.deadline_s is not None and now + pause_s >= call.deadline_s:
            return None
        call.retries -= 1
        return pause_s


def resumable(call: Call) -> bool:
    """Whether an answer that has begun can go on elsewhere. Only a worker with the same model can tell it, so that must be known."""
    request = call.request
    return (
        call.resume and bool(call.fingerprint) and isinstance(request, Generate) and request.params.n == 1 and request.params.guided is None
    )


def received_tokens(call: Call) -> int:
    """Tokens of the answer so far."""
    return sum(len(received.token_ids) for received in call.received) // 4


def next_request(now: float, call: Call) -> ClientRequest:
    """What is to be sent now, after it had to wait or was moved: with what is left of its time, what it has lost and what has come."""
    request = call.request
    if isinstance(request, ListModels | Status | Drain):
        return request
    if call.deadline_s is not None:
        request = replace(request, deadline_ms=max(1, math.ceil((call.deadline_s - now) * 1000)))
    if call.recovery is not None and call.recovery.attempts:
        request = replace(request, attempts=call.recovery.attempts)
    if call.next_seq == 0 or not isinstance(request, Generate):
        return request
    (received,) = call.received
    came = Resume(bytes(received.token_ids), sum(map(len, received.texts)), call.next_seq)
    return replace(request, fingerprint=call.fingerprint, resume=came)
