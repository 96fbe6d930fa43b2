"""The processes of a chaos run: controllers and workers on fixed ports, clients that make load. All are ended with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from .ports import free_ports

ROOT = Path(__file__).parent.parent
"""Where `bench` can be imported from."""
POISONED = 70
"""Exit code of an echo worker that met the word !die."""


class Child:
    """A process that is started again under the same name. `state`: ``up``, ``stopped`` or ``down``; `starts` counts its lives.

    `started_s`: when the last one began.
    """

    def __init__(self, name: str, command: list[str], log: Path, *, piped: bool = False) -> None:
        self.name = name
        self.command = command
        self.state = "down"
        self.starts = 0
        self.started_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        self._log = log
        self._piped = piped

    def __repr__(self) -> str:
        return f"Child({self.name}, {self.state}, {self.starts} starts)"

    def start(self) -> None:
        """Start it; it must be down."""
        self.starts += 1
        self.started_s = time.monotonic()
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C reaches the harness alone, which then ends its children.
            self.process = subprocess.Popen(
                [word.replace("{start}", str(self.starts)) for word in self.command],
                stdin=pipe if self._piped else null,
                stdout=pipe if self._piped else null,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )
        self.state = "up"

    def send(self, number: signal.Signals) -> None:
        """Send a signal; SIGSTOP and SIGCONT change its state. Harmless when it is down."""
        if self.process is None or self.state == "down":
            return
        self.process.send_signal(number)
        if number is signal.SIGSTOP:
            self.state = "stopped"
        elif number is signal.SIGCONT:
            self.state = "up"

    def ended(self) -> int | None:
        """The exit code of one that has ended by now (a signal's is negative); it is then down. None while it lives, and afterwards."""
        if self.process is None:
            return None
        code = self.process.poll()
        if code is not None:
            self._forget()
        return code

    def kill(self) -> None:
        """Kill it and wait until it is gone. Harmless when it is."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._forget()

    def memory_bytes(self) -> int:
        """Its resident memory now; 0 when it is down."""
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss) if self.process is not None else 0
        except psutil.NoSuchProcess:
            return 0

    def _forget(self) -> None:
        if self.process is not None:
            for pipe in (self.process.stdin, self.process.stdout):
                _close(pipe)
        self.process = None
        self.state = "down"


class Network:
    """Controllers, the workers that are registered with each of them, and the processes that ask. Nothing runs before `start`.

    folder: for logs. plant: a bug for controllers and workers, see chaos_plants. worker, controller: more arguments of theirs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        controllers: int = 1,
        worker: list[str] | None = None,
        controller: list[str] | None = None,
        plant: str = "none",
    ) -> None:
        self._folder = folder
        self._plant = plant
        self._worker = worker or []
        ports = free_ports(2 * controllers)
        self.client_endpoints = [f"tcp://127.0.0.1:{port}" for port in ports[:controllers]]
        self.worker_endpoints = [f"tcp://127.0.0.1:{port}" for port in ports[controllers:]]
        self.controllers: list[Child] = []
        for number, (clients, workers) in enumerate(zip(self.client_endpoints, self.worker_endpoints, strict=True)):
            arguments = ["controller", "--clients", clients, "--workers", workers, "--log-level", "warning", *(controller or [])]
            self.controllers.append(self.child(f"controller-{number}", *arguments))
        self.workers: list[Child] = []
        self.clients: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.kill()

    def __iter__(self) -> Iterator[Child]:
        yield from (*self.clients, *self.workers, *self.controllers)

    def child(self, name: str, *arguments: str) -> Child:
        """A `zmqserve` process, not yet started; `kill` does not know of it."""
        command = [sys.executable, "-m", "bench.chaos_child", str(os.getpid()), self._plant, *arguments]
        return Child(name, command, self._folder / f"{name}.log")

    def add_worker(self, name: str, *more: str) -> Child:
        """An echo worker of all controllers, not yet started."""
        ends = [word for endpoint in self.worker_endpoints for word in ("--controller", endpoint)]
        arguments = ["worker", "echo", "--model", "echo", "--worker-name", name, "--log-level", "warning", *ends]
        self.workers.append(self.child(name, *arguments, *self._worker, *more))
        return self.workers[-1]

    def add_client(self, name: str, module: str, *arguments: str) -> Child:
        """A process of a module that asks, not yet started; its standard input and output are pipes. ``{start}`` counts its lives.

        Each next client has the next controller at the head of its list, so that all controllers have clients.
        """
        first = len(self.clients) % len(self.client_endpoints)
        ends = [word for endpoint in self.client_endpoints[first:] + self.client_endpoints[:first] for word in ("--controller", endpoint)]
        command = [sys.executable, "-m", module, "--parent", str(os.getpid()), *ends, *arguments]
        self.clients.append(Child(name, command, self._folder / f"{name}.log", piped=True))
        return self.clients[-1]

    def kill(self) -> None:
        """End everything at once."""
        for child in self:
            child.kill()

    def logs(self) -> dict[str, str]:
        """What processes had to say: warnings and worse, by name. Empty ones are left out."""
        texts = {path.stem: path.read_text(errors="replace") for path in sorted(self._folder.glob("*.log"))}
        return {name: text for name, text in texts.items() if text}


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        try:
            pipe.close()
        except BrokenPipeError:  # what was still to be written to it
            pass
