"""A controller's door: the keys that open it, and what they may do. Looked at again each second, so that both change without a restart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import zmq

from . import curve
from .access import Access
from .broker import Broker
from .errors import InvalidParameter
from .keyring import Keyring
from .rules import Rules, parse_rules
from .sockets import Monitor
from .zap import ZapHandler

LOOK_S, HURRY_S = 1.0, 0.05
"""Between two looks at the folder of keys, and where the last has left something."""
MOST_HANDSHAKES = 64
"""Handshakes answered in one turn of the controller's loop."""


class Gate:
    """The keyring of a folder, the rules beside it, and the ZAP handler of a context. Made before the sockets that it guards are bound.

    Raises InvalidParameter for what is wrong in the folder, and BindFailed where the context has a ZAP handler.
    """

    def __init__(
        self, folder: Path, context: zmq.Context[zmq.Socket[bytes]], report: Callable[..., None], *, handshakes_per_s: float
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._keyring = Keyring(folder)
        self.access = Access(self._keyring, self._rules())
        self._zap = ZapHandler(context, self._keyring, self.counters, report, handshakes_per_s=handshakes_per_s)
        self.socket = self._zap.socket
        self._report = report
        self._broker: Broker | None = None
        self._look_s = 0.0

    def __repr__(self) -> str:
        return f"Gate({self._keyring!r})"

    def attach(self, broker: Broker) -> None:
        """Whom to tell of changes, and where to count."""
        self._broker = broker
        broker.counters.update(self.counters)
        self.counters = self._zap.counters = broker.counters

    def guard(self, clients: zmq.Socket[bytes], workers: zmq.Socket[bytes]) -> None:
        """Let nobody through these sockets but those whose keys are in the ring."""
        curve.guard(clients, self._keyring.ports[0], curve.CLIENTS_DOMAIN)
        curve.guard(workers, self._keyring.ports[1], curve.WORKERS_DOMAIN)

    def watch(self, socket: zmq.Socket[bytes], *, breaks: bool) -> Monitor:
        """Counts the handshakes that fail at a socket before anybody's key is known; with `breaks` it tells of broken connections, too."""
        return Monitor(socket, curve.FailedHandshakes(self.counters).tell, breaks=breaks)

    def serve(self, now: float) -> None:
        """Answer handshakes."""
        self._zap.serve(now, MOST_HANDSHAKES)

    def look_soon(self) -> None:
        """At the next `look`, whenever the last was, and take rules as they are: who asks says that they are whole. From any thread or a
        signal handler."""
        self._look_s = 0.0

    def look(self, now: float) -> None:
        """Take over what has changed in the folder, once a second; rules at the second look that reads them."""
        if now < self._look_s or self._broker is None:
            return
        soon, self._look_s = self._look_s == 0.0, now + LOOK_S
        changes = self._keyring.look(now, thorough=soon)
        if self._keyring.hurried:
            self._look_s = min(self._look_s, now + HURRY_S)  # it is 0 where `look_soon` was called meanwhile
        if changes is None:
            return
        for problem in changes.problems:
            self._report("key not usable", level="error", why=problem)
        rules: Rules | None = None
        if changes.rules:
            try:
                rules = self._rules()
            except InvalidParameter as error:
                self._report("rules not usable, the old ones stay in force", level="error", why=error.message)
        counts = {"clients": len(self._keyring.clients), "workers": len(self._keyring.workers)}
        self._report("keys changed", **counts, revoked=sorted(peer.name for peer in changes.revoked), rules=rules is not None)
        self._broker.keys_changed(now, self._keyring, rules)

    def close(self) -> None:
        """After the sockets that it guards."""
        self._zap.close()

    def _rules(self) -> Rules:
        text = self._keyring.rules
        return Rules() if text is None else parse_rules(text, str(self._keyring.rules_path))
