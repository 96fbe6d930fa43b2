"""What only libzmq could mend: docs/security.md says so. Each of these fails, and passes with a libzmq that has mended it."""

from __future__ import annotations

import subprocess
from contextlib import suppress

import pytest

from bench.zmtp import RawPeer, message, ping
from tests.processes import ANY, ServedController

ATTEMPTS = 20
FLOOD = (message(b"") * 50 + ping()) * 3000
"""More than a queue holds, and read more slowly than sent."""
ASSERTION = "Assertion failed: !_io_error"


@pytest.mark.xfail(strict=True, reason="libzmq aborts when a reset connection's queue holds a PING", raises=AssertionError)
def test_a_full_queue_with_a_ping_behind_it_ends_nobody() -> None:
    with ServedController(ANY, ANY) as controller:
        for _ in range(ATTEMPTS):
            with suppress(OSError), RawPeer(controller.clients) as peer:
                peer.socket.settimeout(0.3)
                with suppress(TimeoutError):
                    peer.write(FLOOD)
                peer.ends(0.05)  # it does not: its queue is full by then
                peer.reset()
            with suppress(subprocess.TimeoutExpired):
                controller.process.wait(0.2)
                break
        controller.end()
        assert ASSERTION not in "".join(controller.output)
