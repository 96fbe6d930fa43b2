"""`zmqserve up`: a controller in this process and its workers beside it, kept running until Ctrl-C drains them."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from types import FrameType

from . import logs
from .certificate import PUBLIC_SUFFIX
from .config import load_config
from .controller import Controller
from .credentials import CONTROLLER_KEY_VARIABLE, KEY_VARIABLE
from .errors import InvalidParameter
from .heap import freeze_heap
from .keyring import WORKERS_PORT
from .liveness import Backoff
from .logs import Logger

LOOK_S = 0.2
STEADY_S = 30.0
"""A worker that was ready for so long is restarted at once when it dies; one that dies young waits longer each time."""
CAME = ("worker came", "worker changed")
"""What a controller logs when a worker says what it offers."""
MOST_YOUNG_DEATHS = 3
"""Deaths in a row that end it all, of a worker that never ran steadily: something is wrong that a restart does not mend. One that did
is started again whatever comes, or a few prompts that kill workers would end it all, too."""


class Replica:
    """One worker process of a backend, and its restarts. `name`: the present one's; each has another."""

    def __init__(self, number: int, backend: str, command: list[str], environment: dict[str, str]) -> None:
        self.number = number
        self.name = ""
        self._backend = backend
        self._command = command
        self._environment = environment
        self._backoff = Backoff(1.0, 30.0, Random())
        self._young_deaths = 0
        self._ran_steadily = False
        self._ready_s: float | None = None
        self._start_at_s = 0.0
        self.process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"Replica({self.number}, {self.process!r})"

    def is_ready(self, now: float) -> None:
        """Its model is loaded: from now on it counts as running, since a load may take long, and fail each time. From any thread."""
        if self._ready_s is None:
            self._ready_s = now

    def keep_running(self, now: float) -> int | None:
        """Start it when it is due; returns an exit code when it should not be started again."""
        if self.process is None:
            if now >= self._start_at_s:
                self.name = f"{self._backend}-{socket.gethostname()}-{secrets.token_hex(3)}"
                self._ready_s = None
                # A group of its own: Ctrl-C reaches this process alone, which drains the worker.
                self.process = subprocess.Popen([*self._command, "--worker-name", self.name], env=self._environment, process_group=0)
            return None
        code = self.process.poll()
        if code is None:
            return None
        self.process = None
        if code == 0:
            return 0
        if self._ready_s is not None and now - self._ready_s >= STEADY_S:
            self._backoff.reset()
            self._ran_steadily = True
        self._young_deaths += not self._ran_steadily
        if self._young_deaths >= MOST_YOUNG_DEATHS or code == 2:
            return code
        wait_s = self._backoff.next_s()
        self._start_at_s = now + wait_s
        Logger("zmqserve.up").warning("worker died", replica=self.number, exit_code=code, restart_in_s=round(wait_s, 1))
        return None


def run(args: argparse.Namespace) -> int:
    """The command."""
    logs.configure(args.log_level, args.log_json)
    gpus = _gpus(args.gpus)
    count = args.replicas or max(1, len(gpus))
    if (args.curve_dir is None) != (args.key is None):
        text = "--curve-dir and --key go together: the workers need a key that the controller allows"
        raise InvalidParameter(text, data={"parameter": "key"})
    replicas: list[Replica] = []
    log = Logger("zmqserve.controller")

    def report(event: str, level: str = "info", **fields: object) -> None:
        if fields.get("state") == "ready" and event in CAME:
            for replica in replicas:
                if replica.name == fields["worker"]:
                    replica.is_ready(time.monotonic())
        getattr(log, level)(event, **fields)

    settings = {"dispatch": args.dispatch, "curve_dir": args.curve_dir, "insecure": args.insecure}
    controller = Controller(load_config(None, clients=args.clients, workers=args.workers, **settings), report=report)
    stopping, hurry = threading.Event(), threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopping.is_set():
            hurry.set()
        stopping.set()

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    freeze_heap()
    with controller:
        command = _command(args, controller.worker_endpoints[0])
        replicas += [Replica(n, args.backend.backend, command, worker_environment(count, gpus, n)) for n in range(count)]
        failed = _keep_running(controller, replicas, stopping)
        _stop_all(replicas, args.grace, hurry)
    return 1 if failed else 0


def _keep_running(controller: Controller, replicas: list[Replica], stopping: threading.Event) -> bool:
    """Until it is told to stop, no replica is left, the controller has ended, or a replica failed for good, which is returned. A drained
    one is done: the others go on."""
    log = Logger("zmqserve.up")
    working = list(replicas)
    while working and controller.running and not stopping.is_set():
        now = time.monotonic()
        for replica in list(working):
            code = replica.keep_running(now)
            if code == 0:
                working.remove(replica)
                log.info("a worker was drained", replica=replica.number, left=len(working))
            elif code is not None:
                log.error("a worker failed: stopping the others", replica=replica.number, exit_code=code)
                return True
        if working:
            stopping.wait(LOOK_S)
    return False


def _stop_all(replicas: list[Replica], grace_s: float, hurry: threading.Event) -> None:
    """Drain the workers; kill what is still there after the grace time, or at the second Ctrl-C."""
    running = [replica.process for replica in replicas if replica.process is not None]
    for process in running:
        process.send_signal(signal.SIGTERM)
    until_s = time.monotonic() + grace_s + 5.0
    for process in running:
        while process.poll() is None and not hurry.is_set() and time.monotonic() < until_s:
            hurry.wait(0.05)
        if process.poll() is None:
            process.kill()
            process.wait()


def _command(args: argparse.Namespace, endpoint: str) -> list[str]:
    """The same arguments for `zmqserve worker`, less those that only `up` has, and with the key of its controller's port."""
    kept: list[str] = []
    skip = False
    own = ("--replicas", "--gpus", "--clients", "--workers", "--dispatch", "--curve-dir")
    for argument in args.arguments[1:]:
        if skip:
            skip = False
        elif argument == "--insecure":
            continue
        elif argument in own:
            skip = True
        elif not argument.startswith(tuple(f"{name}=" for name in own)):
            kept.append(argument)
    if args.curve_dir is not None:
        kept += ["--controller-key", str(Path(args.curve_dir, WORKERS_PORT + PUBLIC_SUFFIX))]
    return [sys.executable, "-m", "zmqserve", "worker", *kept, "--controller", endpoint, "--exit-with-parent", str(os.getpid())]


def worker_environment(replicas: int, gpus: Sequence[str] = (), number: int = 0) -> dict[str, str]:
    """This process's environment, with one of the GPUs and a share of the cores: torch's threads spin while they wait.

    Without the keys in it: those are for another network than the one of this process's own controller.
    """
    environment = {name: value for name, value in os.environ.items() if name not in (KEY_VARIABLE, CONTROLLER_KEY_VARIABLE)}
    if replicas > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // replicas)))
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return environment


def _gpus(text: str | None) -> list[str]:
    gpus = [part.strip() for part in text.split(",")] if text else []
    if not all(gpus):
        raise InvalidParameter(f"--gpus must be numbers separated by commas, like 0,1: got {text!r}", data={"parameter": "gpus"})
    return gpus


def exit_with_parent(parent: int) -> None:
    """Leave when `parent`, the process that started this one, dies, however it dies: a killed `up` must not leave workers behind.

    It may have died before this is called: the id is compared, since who is the parent by now is somebody else.
    """
    if os.getppid() != parent:
        raise SystemExit(f"zmqserve: process {parent}, which started this worker, is gone")

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="zmqserve-parent-watch", daemon=True).start()
