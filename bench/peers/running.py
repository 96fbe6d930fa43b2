"""A peer that is up: its processes by role, its client in a process of its own, and the CPU time of each."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

PATIENCE_S = 60.0
_spawn = multiprocessing.get_context("spawn")


class Running:
    """Starts processes and ends them. Roles are ``broker`` (the server, where there is no broker), ``worker`` and ``client``."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="zmqserve-bench-")
        self.folder = Path(self._folder.name)
        self._ends: list[Callable[[], None]] = []
        self._pids: dict[str, list[int]] = {}
        # Kept, since a process that finds its pipe closed ends.
        self._pipes: list[Connection] = []
        self._client: Connection | None = None

    def spawn(self, role: str, target: Callable[..., None], *arguments: Any) -> Any:
        """Run ``target(pipe, *arguments)`` in a process. Returns what it sends first."""
        mine, theirs = _spawn.Pipe()
        process = _spawn.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        # With this end closed, a process that dies before it says anything is noticed at once.
        theirs.close()

        def end() -> None:
            process.kill()
            process.join()

        self._ends.append(end)
        self._pids.setdefault(role, []).append(process.pid or 0)
        self._pipes.append(mine)
        return received(mine, PATIENCE_S)

    def popen(self, role: str, command: list[str], environment: Mapping[str, str] | None = None) -> Callable[[], None]:
        """Run a command. Returns what raises, with its output, once it has ended."""
        log = self.folder / f"{role}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, cwd=self.folder, env={**os.environ, **(environment or {})}, start_new_session=True
            )

        def end() -> None:
            for each in reversed(_family(process.pid)):
                each.kill()
            process.wait()

        self._ends.append(end)
        self._pids.setdefault(role, []).append(process.pid)

        def check() -> None:
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {log.read_text(errors='replace')[-1000:]}")

        return check

    def open_client(self, kind: Callable[..., Any], *arguments: Any) -> None:
        """Make ``kind(*arguments)`` in a process; `ask` calls its methods."""
        self.spawn("client", _serve, kind, arguments)
        self._client = self._pipes[-1]

    def ask(self, method: str, *arguments: Any, patience_s: float = PATIENCE_S) -> Any:
        """What the client's method returns."""
        if self._client is None:
            raise RuntimeError("no client was opened")
        self._client.send((method, arguments))
        return received(self._client, patience_s)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds that each role has used, children included."""
        return {role: sum(_cpu_s(each) for pid in pids for each in _family(pid)) for role, pids in self._pids.items()}

    def close(self) -> None:
        """End all that was started."""
        for end in reversed(self._ends):
            end()
        self._folder.cleanup()


def received(pipe: Connection, patience_s: float) -> Any:
    """The next thing from a process. Raises what went wrong there."""
    if not pipe.poll(patience_s):
        raise TimeoutError(f"no answer within {patience_s} s")
    try:
        result = pipe.recv()
    except EOFError:
        raise RuntimeError("the process died") from None
    if isinstance(result, Exception):
        raise result
    return result


def until(ready: Callable[[], bool], check: Callable[[], None], patience_s: float = PATIENCE_S) -> None:
    """Look until it is ready; `check` raises when it will never be."""
    end_s = time.monotonic() + patience_s
    while not ready():
        check()
        if time.monotonic() > end_s:
            raise TimeoutError(f"not ready within {patience_s} s")
        time.sleep(0.1)


def said_by(python: str, program: str) -> str | None:
    """What a program prints under another Python; None when it fails, or there is no such Python."""
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:  # FastChat leaves a log where it is imported
        try:
            ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False, cwd=folder)
        except OSError:
            return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def listens(port: int) -> bool:
    """Whether somebody accepts connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _serve(pipe: Connection, kind: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        client = kind(*arguments)
        pipe.send("ready")
    except Exception as error:  # noqa: BLE001 - the bench says it, and leaves this peer out
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            result = getattr(client, method)(*given)
        except Exception as error:  # noqa: BLE001 - the same
            result = RuntimeError(f"{type(error).__name__}: {error}")
        pipe.send(result)


def _family(pid: int) -> list[psutil.Process]:
    """A process and its descendants; empty when it is gone."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)
