"""How fast a model's requests are served, learned from how long each one holds a slot. Pure."""

from __future__ import annotations

REMEMBERED = 50
"""Requests that the mean reaches back over: enough to smooth, few enough to follow a change of the load."""


class ServiceRate:
    """Slots in use divided by the mean time that a request holds one (Little's law) are the requests served in a second.

    Times between departures would mislead: requests that began together end together, in bursts.
    """

    def __init__(self) -> None:
        self._mean_s = 0.0
        self._seen = 0

    def __repr__(self) -> str:
        return f"ServiceRate(mean_s={self._mean_s:.3g}, seen={self._seen})"

    def served(self, seconds: float) -> None:
        """A request has held its slot for so long."""
        self._seen += 1
        self._mean_s += (seconds - self._mean_s) / min(self._seen, REMEMBERED)

    def per_second(self, running: int) -> float | None:
        """Requests served in a second while `running` hold a slot; None before the first has been served, or while none runs."""
        return running / max(self._mean_s, 1e-6) if self._seen and running else None
