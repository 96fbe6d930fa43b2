"""Every request of a run: begun, ended, or owed an end. Pure: records and times are passed in."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Hashable, Sequence

from zmqserve.errors import StreamGap, WorkerLost

from .chaos_records import Begun, Ended, Record

HUNG_S = 10.0
"""So long after its deadline a request that has not ended counts as hung."""


class Ledger:
    """Books by client (one life of a client process): `take` its records, tell when it was `killed` or has `left`.

    open: asked and not ended. whole: ended with every token as the oracle has it. failed: other ends, by error and cause.
    lost: never ended although the client lived on. hung: ended, or given up as lost, later than HUNG_S after the deadline.
    wrong: complaints of the oracle. forgotten: requests of clients that were killed. poison: ends of requests that kill workers.
    """

    def __init__(self) -> None:
        self.started = 0
        self.whole = 0
        self.failed: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lost = self.hung = self.forgotten = self.gaps = 0
        self.poisons = 0
        self.poison: Counter[str] = Counter()
        self.tokens = self.joins = self.joined = 0
        self.longest_gaps_s: list[float] = []
        self.join_gaps_s: list[float] = []
        self.open: dict[Hashable, dict[int, Begun]] = {}

    def __repr__(self) -> str:
        return f"Ledger({self.started} started, {self.whole} whole, {self.owed} open)"

    @property
    def owed(self) -> int:
        """Requests that have not ended."""
        return sum(map(len, self.open.values()))

    @property
    def settled(self) -> int:
        """Requests, other than poison, whose client lived: each of them should be whole."""
        return self.whole + sum(self.failed.values()) + self.lost

    @property
    def share_whole(self) -> float:
        """Of those whose client lived: how many came whole and exact."""
        return self.whole / self.settled if self.settled else 0.0

    def take(self, client: Hashable, record: Record) -> None:
        """A record that this client wrote."""
        if isinstance(record, Begun):
            self.started += not record.poison
            self.poisons += record.poison
            self.open.setdefault(client, {})[record.request] = record
            return
        begun = self.open[client].pop(record.request)
        self.hung += record.at_s > begun.deadline_s + HUNG_S
        if record.wrong:
            self.wrong.append(record.wrong)
        self.gaps += record.code == StreamGap.code
        self.tokens += record.tokens
        if begun.poison:
            self.poison[_poisoned(record)] += 1
            return
        self.joins += record.resumed
        self.joined += record.resumed > 0
        self.join_gaps_s += record.join_gaps_s
        if record.code == 0:
            self.whole += not record.wrong
            self.failed["whole, but wrong"] += bool(record.wrong)
            self.longest_gaps_s.append(record.gap_s)
        else:
            self.failed[f"{record.code} {record.error}: {cause(record.message)}"] += 1

    def killed(self, client: Hashable) -> None:
        """The client was killed: nobody is there to be given an end."""
        for begun in self.open.pop(client, {}).values():
            self.forgotten += not begun.poison
            self.poisons -= begun.poison

    def left(self, client: Hashable, now: float) -> None:
        """The client has ended, or will not be waited for: what it has open was lost."""
        for begun in self.open.pop(client, {}).values():
            self.hung += now > begun.deadline_s + HUNG_S
            self.lost += 1


def cause(message: str) -> str:
    """An error's message without the names and numbers of the single case, so that equal causes can be counted."""
    plain = re.sub(r"tcp://\S+|'[^']*'|\bworker-\S+|\b[0-9a-f]{16}\b|\d+(\.\d+)?", "#", message)
    return plain if len(plain) <= 90 else plain[:87] + "..."


def quantile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are not above; 0 where there is none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def median(values: Sequence[float]) -> float:
    """The middle one; 0 where there is none."""
    return statistics.median(values) if values else 0.0


def _poisoned(record: Ended) -> str:
    if record.code == WorkerLost.code and not record.retryable:
        return "stopped"
    return f"{record.code} {record.error}: {cause(record.message)}" if record.code else "answered"
