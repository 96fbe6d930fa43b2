"""What waits for a client's last open request to end."""

from __future__ import annotations

from collections.abc import Callable, Sized


class Draining:
    """The wait until nothing is open any more. `whole`: whether all ended by themselves."""

    def __init__(self, calls: Sized) -> None:
        self.whole = True
        self.waiter: Callable[[], object] | None = None
        self._calls = calls

    def __repr__(self) -> str:
        return f"Draining({len(self._calls)} open)"

    @property
    def ready(self) -> bool:
        """Whether it is over."""
        return not self._calls

    def wake(self) -> None:
        """Call the waiter, once."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None:
            waiter()
