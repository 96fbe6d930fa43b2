"""Which faults happened when, and whether they can have caused an error. An error that nothing can have caused is a bug."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from zmqserve.errors import (
    ControllerLost,
    ControllerUnreachable,
    DeadlineExceeded,
    GoingAway,
    ModelLoading,
    NoWorker,
    Overloaded,
    SlowConsumer,
    UnknownModel,
    WorkerLost,
)

if TYPE_CHECKING:
    from .oracle import Ask

AFTERMATH_S = 20.0
"""How long after its end a fault may still show: leases run out, a queue outlives its last worker for `orphan_grace_s`."""
FAILOVER_S = 10.0
"""How long a session looks for a controller, at least, before it gives up requests that it could move."""
ORPHAN_GRACE_S = 5.0
"""How long requests wait for workers to come back, at least (`orphan_grace_s`)."""
MANY = 8
"""So many losses in a row end a request although there would be another controller."""

WORKERS = frozenset({"worker", "link", "clock", "controller"})
"""Groups of faults by which workers are lost. To a parent a controller is a worker."""
CONTROLLERS = frozenset({"controller", "link", "clock", "client"})
"""Groups by which a client loses its controller."""


class Entry(NamedTuple):
    """One fault: its kind, the group of what it does, whom it befell (the names of both ends for a link), from when to when."""

    kind: str
    group: str
    names: tuple[str, ...]
    start_s: float
    end_s: float


class Chronicle:
    """All faults of a run, as they begin and end. `counts` is by kind. `bounded`: queues of this run are short enough to be full;
    `tight`: so are pipes and outboxes."""

    def __init__(self, *, bounded: bool = False, tight: bool = False) -> None:
        self.bounded = bounded
        self.tight = tight
        self.counts: Counter[str] = Counter()
        self._entries: list[Entry] = []

    def __repr__(self) -> str:
        return f"Chronicle({dict(self.counts)})"

    def add(self, kind: str, group: str, now: float, *names: str, until_s: float = inf, counted: bool = True) -> int:
        """A fault has begun. Returns its number, for `over`."""
        self.counts[kind] += counted
        self._entries.append(Entry(kind, group, names, now, until_s))
        return len(self._entries) - 1

    def over(self, number: int, now: float) -> None:
        """It has ended, if it had not."""
        entry = self._entries[number]
        self._entries[number] = entry._replace(end_s=min(entry.end_s, now))

    def during(self, groups: Collection[str], start_s: float, end_s: float, name: str | None = None) -> list[Entry]:
        """Faults that may show between two times, at `name` where that is given."""
        return [
            entry
            for entry in self._entries
            if entry.group in groups
            and entry.start_s <= end_s
            and entry.end_s + AFTERMATH_S >= start_s
            and (name is None or name in entry.names)
        ]


def unexplained(ask: Ask, error: Exception, chronicle: Chronicle) -> str:
    """Why this error should not have been; empty when it may be."""
    start_s, end_s = ask.opened_s, ask.ended_s if ask.ended_s is not None else inf
    match error:
        case DeadlineExceeded():
            return _deadline(ask, end_s, chronicle)
        case WorkerLost():
            return _worker_lost(ask, error, chronicle.during(WORKERS, start_s, end_s), tight=chronicle.tight)
        case ControllerLost():
            causes = chronicle.during(CONTROLLERS, start_s, end_s)
            if not causes:
                # An end that was dropped with an outbox too full to tell of it is learned from the next Pong.
                return "" if chronicle.tight and not ask.plan.resume else "no controller was lost"
            patient = ask.plan.resume and not any(cause.group == "clock" for cause in causes)
            if patient and end_s - min(cause.start_s for cause in causes) < FAILOVER_S:
                return f"it was given up before {FAILOVER_S:g} s had passed"
            return _there(ask, causes, chronicle) if patient and len(causes) < MANY else ""
        case ControllerUnreachable():
            return _there(ask, chronicle.during(CONTROLLERS, start_s, end_s), chronicle)
        case NoWorker() if "model" in error.data and not chronicle.during({"clock"}, start_s, end_s):
            # Those that waited for workers that had been there; the others found a controller that had just started.
            causes = chronicle.during(WORKERS, start_s, end_s)
            early = not causes or end_s - min(cause.start_s for cause in causes) < ORPHAN_GRACE_S
            return f"it waited less than {ORPHAN_GRACE_S:g} s for workers to come back" if early else ""
        case NoWorker() | UnknownModel() | ModelLoading():
            return "" if chronicle.during(WORKERS, start_s, end_s) else "workers were there all the time"
        case Overloaded():
            return "" if chronicle.bounded else "the queue's bounds are out of reach"
        case SlowConsumer():
            slow = chronicle.during({"client", "link"}, start_s, end_s, ask.client.name)
            return "" if slow or chronicle.tight else "the client read all the time"
        case GoingAway():
            return "" if chronicle.during({"controller"}, start_s, end_s) else "no controller went away"
        case _:
            return "no fault leads to this"


def _there(ask: Ask, causes: list[Entry], chronicle: Chronicle) -> str:
    """Which of its controllers the client could have turned to: nothing kept it from that one."""
    me = ask.client.name

    def kept_from(name: str, cause: Entry) -> bool:
        if cause.group == "link":
            return {me, name} <= set(cause.names)
        return me in cause.names or name in cause.names

    known = [endpoint.removeprefix("tcp://").partition(":")[0] for endpoint in ask.client.endpoints]
    free = [name for name in known if not any(kept_from(name, cause) for cause in causes)]
    return f"{' and '.join(free)} could be reached all the time" if free and not chronicle.tight else ""


def _deadline(ask: Ask, end_s: float, chronicle: Chronicle) -> str:
    timeout_s = ask.plan.timeout_s
    if timeout_s is None:
        return "it had no deadline"
    early_s = ask.opened_s + timeout_s - end_s
    if early_s > 0.01 and not chronicle.during({"clock"}, ask.opened_s, end_s):
        return f"{early_s:.3f} s before its deadline"
    return ""


def _worker_lost(ask: Ask, error: WorkerLost, causes: list[Entry], *, tight: bool) -> str:
    if ask.plan.poison:
        return ""
    if not causes and not tight:
        return "no worker was lost"
    if not ask.plan.resume:
        return ""
    if error.retryable:
        return "it could have gone on elsewhere"
    # One whose pipe or outbox is full counts as lost, too.
    return "" if tight or len(causes) > 1 else f"only {causes[0].kind} happened, and one lost worker does not end a request"
