"""Real processes for tests: the command `zmqserve`, its log lines, and ways to wait for what it says."""

from __future__ import annotations

import json
import os
import pty
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.ports import free_ports

ANY = "tcp://127.0.0.1:*"
PATIENCE_S = 20.0
"""What anything may take on a busy machine before a test gives up on it."""
CAME = ("worker came", "worker changed")
"""What a controller logs when a worker is ready: that it was loading before, or not."""


class Served:
    """One `zmqserve` process. Its JSON log lines are kept, and can be waited for."""

    def __init__(self, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.arguments = arguments
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zmqserve", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
        )
        self.output: list[str] = []
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, name=f"log of {arguments[0]}")
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.end(signal.SIGKILL)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            text = line.decode(errors="replace")
            self.output.append(text)
            if text.startswith("{"):
                self._lines.put(json.loads(text))
        self._lines.put(None)

    def wait_for(self, event: str | tuple[str, ...], within_s: float = PATIENCE_S, **fields: Any) -> dict[str, Any]:
        """The next log line with this event (or one of these) and these fields; lines before it are passed over."""
        events = (event,) if isinstance(event, str) else event
        until = time.monotonic() + within_s
        while True:
            try:
                line = self._lines.get(timeout=max(0.001, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{self.arguments}: no {event!r} {fields} within {within_s} s; log:\n{''.join(self.output)}") from None
            if line is None:
                raise AssertionError(f"{self.arguments} ended before {event!r} {fields}; log:\n{''.join(self.output)}")
            if line.get("event") in events and all(line.get(name) == value for name, value in fields.items()):
                return line

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM, within_s: float = PATIENCE_S) -> int:
        """Send a signal and wait for the end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
            self.process.send_signal(signal.SIGCONT)
        code = self.process.wait(within_s)
        self._reader.join(within_s)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


class ServedController(Served):
    """A controller process on free ports, or on given endpoints."""

    def __init__(self, clients: str = ANY, workers: str = ANY, *arguments: str) -> None:
        # Not chosen by the system: a test that starts it again on the same ports would at times find a retrying peer there.
        free = zip((clients, workers), free_ports(2), strict=True)
        clients, workers = (f"tcp://127.0.0.1:{port}" if end == ANY else end for end, port in free)
        super().__init__("controller", "--clients", clients, "--workers", workers, *arguments)
        try:
            up = self.wait_for("controller up")
        except AssertionError:
            self.end(signal.SIGKILL)
            raise
        self.clients: str = up["clients"][0]
        self.workers: str = up["workers"][0]

    def echo(self, name: str, *arguments: str, model: str = "m", also: Iterable[ServedController] = ()) -> Served:
        """An echo worker of this controller, and of those in `also`."""
        controllers = [argument for each in (self, *also) for argument in ("--controller", each.workers)]
        return Served("worker", "echo", "--model", model, "--worker-name", name, *controllers, *arguments)

    def wait_ready(self, name: str, within_s: float = PATIENCE_S) -> None:
        """Wait until a worker is registered and ready."""
        self.wait_for(CAME, within_s, worker=name, state="ready")


@contextmanager
def network(
    *names: str, worker_arguments: tuple[str, ...] = (), controller_arguments: tuple[str, ...] = ()
) -> Iterator[tuple[ServedController, dict[str, Served]]]:
    """A controller and echo workers, all ready."""
    with ServedController("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", *controller_arguments) as controller:
        workers: dict[str, Served] = {}
        try:
            for name in names:
                workers[name] = controller.echo(name, *worker_arguments)
            for _ in names:
                controller.wait_for(CAME, state="ready")
            yield controller, workers
        finally:
            for worker in workers.values():
                worker.end(signal.SIGKILL)


@contextmanager
def honest_network(config: Path, settings: str, *arguments: str) -> Iterator[ServedController]:
    """A controller with these settings, written to `config`, and an echo worker of model ``m`` that must live to the end."""
    config.write_text(settings)
    with (
        ServedController("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "--config", str(config)) as controller,
        controller.echo("honest", *arguments) as honest,
    ):
        controller.wait_ready("honest")
        yield controller
        assert honest.process.poll() is None


def installed(directory: Path, name: str, source: str) -> dict[str, str]:
    """The environment of processes in which a backend of that name is installed: the class `Worker` of this source."""
    (directory / f"{name}.py").write_text(source)
    about = directory / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[zmqserve.backends]\n{name} = {name}:Worker\n")
    return {"PYTHONPATH": os.pathsep.join([str(directory), *filter(None, [os.environ.get("PYTHONPATH")])])}


def eventually(check: Callable[[], bool], within_s: float, what: str) -> float:
    """Ask until it is so; returns the seconds that it took. For states that nobody announces."""
    began = time.monotonic()
    while not check():
        if time.monotonic() - began > within_s:
            raise AssertionError(f"not within {within_s} s: {what}")
        time.sleep(0.005)
    return time.monotonic() - began


def deaths(processes: Iterable[Served]) -> int:
    """How many have ended; a moment after their connections broke, so wait for it with `eventually`."""
    return sum(served.process.poll() is not None for served in processes)


def on_a_terminal(*arguments: str) -> str:
    """What Python, run with these arguments, writes where standard output and error are a terminal. It must fit a terminal's buffer."""
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as screen:
        try:
            subprocess.run([sys.executable, *arguments], stdout=theirs, stderr=theirs, timeout=PATIENCE_S, check=False)
        finally:
            os.close(theirs)
        shown = b""
        with suppress(OSError):  # all has been read, and nobody holds the other end
            while part := screen.read(4096):
                shown += part
    return shown.decode().replace("\r\n", "\n")


def zmqserve(*arguments: str, env: dict[str, str] | None = None, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    command = [sys.executable, "-m", "zmqserve", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, input=stdin, env={**os.environ, **(env or {})}, check=False
    )
