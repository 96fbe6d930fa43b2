"""How many of a worker's slots one model may have, as a controller counts them."""

from __future__ import annotations


class Share:
    """`slots`: so many of the model's requests its worker takes at a time; None: as many as it has slots for all of its models.

    `running` is this controller's own exact count. `others` is a guess at those of other controllers, since heartbeats tell only the
    sum over all models: BUSY raises it, heartbeats lower it.
    """

    __slots__ = ("others", "running", "slots")

    def __init__(self) -> None:
        self.slots: int | None = None
        self.running = 0
        self.others = 0

    def __repr__(self) -> str:
        return f"Share({self.running} + {self.others} of {'all' if self.slots is None else self.slots})"

    def offer(self, slots: int | None, worker_slots: int) -> None:
        """The worker offers the model, first or anew, with this bound. Only one below the worker's own slots is one."""
        self.slots = None if slots is None or slots >= worker_slots else slots
        self.others = 0

    def of(self, worker_slots: int) -> int:
        """All that the model may have."""
        return worker_slots if self.slots is None else self.slots

    def free(self, worker_free: int, worker_slots: int) -> int:
        """What is left for the model, where the worker has `worker_free` left for all."""
        return max(0, min(worker_free, self.of(worker_slots) - self.running - self.others))

    def refused(self, worker_slots: int) -> None:
        """BUSY: all that is not ours is others'. The request that was refused does not count as running any more."""
        self.others = max(self.others, self.of(worker_slots) - self.running)

    def relent(self, most: int) -> bool:
        """A heartbeat: try a quarter of what seemed taken, at least one, and believe in no more than `most`, which others have of all
        models. Returns whether that is less than before."""
        if not self.others:
            return False
        self.others = max(0, min(most, self.others - max(1, self.others // 4)))
        return True
