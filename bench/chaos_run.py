"""A chaos run: start the network, let the faults strike, mend everything, and see that nothing is left over."""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from zmqserve import Client
from zmqserve.errors import ZmqserveError
from zmqserve.liveness import Agenda
from zmqserve.messages import ControllerStatus

from .chaos_faults import BOTH, DOWN_S, Fault
from .chaos_ledger import HUNG_S, Ledger
from .chaos_network import POISONED, Child, Network
from .chaos_records import parse

READY_S = 60.0
"""What the network may take to come up."""
IDLE_S = 10.0
"""What it may take to be idle and complete after the last stream: the last of the killed come back, and register."""
YOUNG_S = 10.0
"""A process that is told to go so soon after its start may not have a handler for the signal yet: it ends by it."""
LOOK_S = 0.05
"""How often processes that end by themselves are looked for."""
SAMPLE_S = 1.0
"""How often the controllers' memory is read."""
LEAVE_S = 10.0
"""What a client may take to leave when its streams have ended."""


class Run:
    """`go` once. Then: the ledger, what struck, the controllers' memory, and what was left over at the end.

    strikes: faults that struck, by kind; skipped: those that found nothing to strike. poisoned: workers that met the poison.
    crashes: processes that ended by themselves. memory: of each controller, [idle at the start, most, idle at the end], bytes.
    leaked: slots in use when all was idle. leftover: what the controllers still had then.
    """

    def __init__(self, network: Network, ledger: Ledger, faults: Sequence[Fault], random: Random) -> None:
        self.network = network
        self.ledger = ledger
        self.faults = faults
        self.strikes: Counter[str] = Counter()
        self.skipped = self.poisoned = 0
        self.crashes: list[str] = []
        self.memory: dict[str, list[int]] = {}
        self.leaked = 0
        self.leftover: list[str] = []
        self.counters: Counter[str] = Counter()
        self._random = random
        self._agenda = Agenda()
        self._selector = selectors.DefaultSelector()
        self._unread: dict[Child, bytes] = {}
        self._expected_down: set[Child] = set()
        self._mending = True

    def __repr__(self) -> str:
        return f"Run({self.network!r}, {self.ledger!r})"

    def go(self, seconds: float, deadline_s: float) -> None:
        """The whole run: `seconds` of faults, then healing."""
        try:
            self._start()
            began_s = time.monotonic()
            for fault in self.faults:
                self._agenda.at(began_s + fault.at_s, lambda now, fault=fault: self._strike(fault, now))  # type: ignore[misc]
            self._agenda.at(began_s, self._sample)
            self._until(lambda: False, began_s + seconds)
            self._heal()
            self._finish(deadline_s)
            self._see_that_all_is_idle()
        finally:
            self._selector.close()

    # --- phases --------------------------------------------------------------------------------

    def _start(self) -> None:
        for child in (*self.network.controllers, *self.network.workers):
            child.start()
        self._wait_for_workers()
        for controller in self.network.controllers:
            self.memory[controller.name] = [controller.memory_bytes()] * 2
        for client in self.network.clients:
            self._start_client(client)
        self._until(lambda: len(self.ledger.open) == len(self.network.clients), time.monotonic() + READY_S)

    def _heal(self) -> None:
        """Nothing fails any more, and what is down comes back."""
        self._agenda = Agenda()
        for child in self.network:
            if child.state == "stopped":
                child.send(signal.SIGCONT)
            elif child.state == "down":
                self._revive(child)
        self._agenda.at(time.monotonic(), self._sample)

    def _finish(self, deadline_s: float) -> None:
        """Every stream that is open may end, and the clients leave; what has not ended by its deadline and HUNG_S is lost."""
        clients = self.network.clients
        self._expected_down.update(clients)
        for client in clients:
            self._write(client, b"stop\n")
        self._until(lambda: all(client.state == "down" for client in clients), time.monotonic() + deadline_s + HUNG_S + LEAVE_S)
        for client in clients:
            if client.state != "down":
                self.crashes.append(f"{client.name} did not leave")
            self._drop_client(client, killed=False)

    def _see_that_all_is_idle(self) -> None:
        """Look until it is so: a worker may have just come back. What stays is leaked."""
        until_s = time.monotonic() + IDLE_S
        while True:
            states = [self._status(number) for number in range(len(self.network.controllers))]
            self.leftover = [line for state in states for line in self._left_in(state)]
            if not self.leftover or time.monotonic() > until_s:
                break
            self._until(lambda: False, time.monotonic() + 0.2)
        self.leaked = sum(max(0, worker.slots - worker.free) for state in states if state for worker in state.workers)
        for state in states:
            self.counters.update(state.counters if state else {})
        for controller in self.network.controllers:
            self.memory[controller.name].append(controller.memory_bytes())

    def _left_in(self, state: ControllerStatus | None) -> list[str]:
        if state is None:
            return ["a controller does not answer"]
        figures = {"running": state.running, "waiting": state.waiting, "clients": state.clients, "outbox bytes": state.outbox_bytes}
        # Who asks for the status is no client with open requests.
        left = [f"{value} {name}" for name, value in figures.items() if value]
        left += [f"{worker.name}: {worker.free} of {worker.slots} slots free" for worker in state.workers if worker.free != worker.slots]
        missing = len(self.network.workers) - len(state.workers)
        return left + ([f"{missing} workers are not registered"] if missing else [])

    # --- faults --------------------------------------------------------------------------------

    def _strike(self, fault: Fault, now: float) -> None:
        kind = fault.kind
        if kind == BOTH:
            struck = [child for child in self.network.controllers if child.state != "down"]
            for child in struck:
                self._kill(child, fault.lasts_s, now)
        else:
            group = {"worker": self.network.workers, "controller": self.network.controllers}.get(kind.split()[0], self.network.clients)
            able = [child for child in group if child.state == "up"]
            struck = [able[int(fault.target * len(able))]] if able else []
            for child in struck:
                self._strike_one(child, kind, fault.lasts_s, now)
        self.strikes[kind] += bool(struck)
        self.skipped += not struck

    def _strike_one(self, child: Child, kind: str, lasts_s: float, now: float) -> None:
        if kind.endswith("killed"):
            self._kill(child, lasts_s, now)
        elif kind.endswith("stopped"):
            child.send(signal.SIGSTOP)
            self._agenda.at(now + lasts_s, lambda _now: child.send(signal.SIGCONT))
        elif kind.endswith("drained"):
            self._expected_down.add(child)
            child.send(signal.SIGTERM)
        else:
            self._write(child, b"poison\n")

    def _kill(self, child: Child, down_s: float, now: float) -> None:
        child_is_client = child in self.network.clients
        if child_is_client:
            self._drop_client(child, killed=True)
        child.kill()
        self._expected_down.discard(child)
        self._agenda.at(now + down_s, lambda _now: self._revive(child))

    def _revive(self, child: Child) -> None:
        if child.state == "down":
            if child in self.network.clients:
                self._start_client(child)
            else:
                child.start()

    def _look(self) -> None:
        """Find processes that ended by themselves: drained, poisoned, or crashed."""
        now = time.monotonic()
        for child in self.network:
            is_client = child in self.network.clients
            if is_client and child.process is not None and child.process.poll() is not None:
                self._drop_client(child, killed=False)
            code = child.ended()
            if code is None:
                continue
            young = now - child.started_s < YOUNG_S
            if code == POISONED and child in self.network.workers:
                self.poisoned += 1
            elif child not in self._expected_down or not (code == 0 or (young and code == -signal.SIGTERM)):
                self.crashes.append(f"{child.name} ended with exit code {code}")
            self._expected_down.discard(child)
            if not (is_client and code == 0):
                self._agenda.at(now + self._random.uniform(*DOWN_S), lambda _now, child=child: self._revive(child))  # type: ignore[misc]

    # --- clients -------------------------------------------------------------------------------

    def _start_client(self, client: Child) -> None:
        client.start()
        if client.process is not None and client.process.stdout is not None:
            os.set_blocking(client.process.stdout.fileno(), False)
            self._unread[client] = b""
            self._selector.register(client.process.stdout, selectors.EVENT_READ, client)

    def _drop_client(self, client: Child, *, killed: bool) -> None:
        """It has ended, or is about to be killed: read what it still said, then close its books."""
        if client not in self._unread or client.process is None or client.process.stdout is None:
            return
        if killed:
            client.process.kill()
            client.process.wait()
        while self._read(client):
            pass
        self._selector.unregister(client.process.stdout)
        del self._unread[client]
        life = (client.name, client.starts)
        if killed:
            self.ledger.killed(life)
        else:
            self.ledger.left(life, time.monotonic())

    def _read(self, client: Child) -> bool:
        """Take what it has written; returns whether there was anything."""
        if client.process is None or client.process.stdout is None:
            return False
        try:
            data = os.read(client.process.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return False
        *lines, self._unread[client] = (self._unread[client] + data).split(b"\n")
        for text in lines:
            self.ledger.take((client.name, client.starts), parse(text))
        return bool(data)

    def _write(self, client: Child, text: bytes) -> None:
        if client.process is not None and client.process.stdin is not None:
            try:
                client.process.stdin.write(text)
                client.process.stdin.flush()
            except BrokenPipeError:  # it has just ended: `_look` finds it
                pass

    # --- time and controllers ------------------------------------------------------------------

    def _until(self, done: Callable[[], bool], until_s: float) -> None:
        """Read records and do what is due, until it is done or too late."""
        while not done() and (now := time.monotonic()) < until_s:
            self._agenda.run(now)
            self._look()
            next_s = min(self._agenda.next_s() or until_s, until_s, now + LOOK_S)
            for key, _ in self._selector.select(max(0.0, next_s - time.monotonic())):
                if not self._read(key.data):  # its end: `_look` finds that it has left
                    time.sleep(0.001)

    def _sample(self, now: float) -> None:
        for controller in self.network.controllers:
            figures = self.memory[controller.name]
            figures[1] = max(figures[1], controller.memory_bytes())
        self._agenda.at(now + SAMPLE_S, self._sample)

    def _wait_for_workers(self) -> None:
        until_s = time.monotonic() + READY_S
        for number in range(len(self.network.controllers)):
            while (state := self._status(number)) is None or sum(each.state == "ready" for each in state.workers) < len(
                self.network.workers
            ):
                self._look()
                if self.crashes or time.monotonic() > until_s:
                    raise RuntimeError(f"the network did not come up: {state} {self.crashes} {self.network.logs()}")

    def _status(self, number: int) -> ControllerStatus | None:
        try:
            with Client(self.network.client_endpoints[number], connect_timeout_s=1.0, timeout_s=2.0) as client:
                return client.status()
        except ZmqserveError:
            return None
