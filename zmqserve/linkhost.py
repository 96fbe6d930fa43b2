"""What a ControllerLink asks of whoever has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .messages import ControllerHead, Load, Ready

if TYPE_CHECKING:
    from .link import ControllerLink


class LinkHost(Protocol):
    """Whose link it is: a worker, or a controller that is its parent's worker. `link.epoch` tells the registration."""

    def ready(self) -> Ready:
        """What to register."""

    def load(self, link: ControllerLink) -> Load:
        """What to say in the heartbeat."""

    def offer(self, link: ControllerLink, head: ControllerHead, payload: bytes) -> bool:
        """Take a request; False when there is no slot for it."""

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None:
        """Stop a request if it is there."""

    def abort(self, link: ControllerLink) -> None:
        """Drop all that runs for this link: its controller no longer waits for it. May be called when nothing runs."""

    def drain(self, grace_s: float | None) -> None:
        """A controller wants the worker to finish and leave."""

    def fresh_socket(self, link: ControllerLink) -> None:
        """Replace the connection. Called by `link.tick` only. Raises OSError where no socket is to be had, and has kept the old one."""

    def changed(self, link: ControllerLink) -> None:
        """`link.state` or `link.silent` has changed, what was announced is taken (`link.known`), or a registration was refused for
        now (`link.refusal`)."""
