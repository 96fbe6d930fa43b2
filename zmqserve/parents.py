"""A controller's links to its parents, with their sockets, for the controller's loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import zmq

from .broker import Broker
from .credentials import Credentials
from .linkport import LinkPort
from .sockets import SocketLimits
from .uplink import Uplink


class Parents:
    """One Uplink and one LinkPort for each parent of `broker.config`. The broker ticks the uplinks; `polled` and `serve` are for the
    loop. Raises InvalidEndpoint and InvalidParameter."""

    def __init__(
        self, broker: Broker, context: zmq.Context[zmq.Socket[bytes]], name: str, report: Callable[..., None], random: Random, now: float
    ) -> None:
        config = broker.config
        limits = SocketLimits(config.message_bytes, config.pipe_messages)
        self._pairs: list[tuple[Uplink, LinkPort]] = []
        try:
            keys = Credentials(config.parent_key, config.parent_controller_key, config.parents, prefix="parent_")
            for endpoint in config.parents:
                uplink = Uplink(broker, name, report=report, now=now)
                port = LinkPort(
                    context, endpoint, limits, uplink, credentials=keys, ttl_s=config.ttl_s, random=random, now=now, report=report
                )
                uplink.attach(port.link, renew=port.fresh_socket)
                self._pairs.append((uplink, port))
        except BaseException:
            self.close(0)
            raise
        broker.uplinks = [uplink for uplink, _ in self._pairs]

    def __repr__(self) -> str:
        return f"Parents({[uplink for uplink, _ in self._pairs]!r})"

    def polled(self) -> list[tuple[Any, int]]:
        """What to poll for now."""
        return [item for _, port in self._pairs for item in port.polled()]

    def serve(self, now: float, events: Mapping[Any, int], most: int) -> None:
        """Take what a poll has found, at most so many messages of each parent."""
        for uplink, port in self._pairs:
            uplink.now = now
            port.serve(now, events, most)

    def close(self, linger_ms: int) -> None:
        """Say BYE where that was not done, and close the sockets."""
        for _, port in self._pairs:
            port.close(linger_ms)
        self._pairs.clear()
