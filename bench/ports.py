"""Ports of loopback for processes that are told theirs, and perhaps started again on the same."""

from __future__ import annotations

import socket
from random import Random

PORTS = (10_000, 30_000)
"""Below the range from which systems take the ports of outgoing connections: a process that is started again must get its own again,
and a peer that connects to a port where nobody listens could be given that very one, and meet itself."""


def free_ports(count: int) -> list[int]:
    """Different ports that nobody has."""
    free: list[int] = []
    random = Random()  # no seed: two runs at a time must not want the same ones
    while len(free) < count:
        port = random.randrange(*PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in free:
            free.append(port)
    return free


def free_port() -> int:
    """A port that nobody has."""
    return free_ports(1)[0]
