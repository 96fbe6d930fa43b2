"""What comes and goes during a soak: clients and their keys, workers, and one of the processes that ask."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from zmqserve import Client
from zmqserve.certificate import read_public, write_pair, write_public
from zmqserve.credentials import CONTROLLER_KEY_VARIABLE, KEY_VARIABLE
from zmqserve.errors import Unauthenticated

from .chaos_network import Child, Network

CLIENT_GAP_S = 1.0
"""From one short-lived client to the next."""
KEY_SHARE = 0.2
"""Of these: those with a key that was made for them, and is revoked while they read."""
WORKER_GAP_S = 10.0
PROCESS_GAP_S = 30.0
KILLED_SHARE = 0.3
"""Of the workers that go: those that are killed; the others are drained."""
DOWN_S = 1.0
PATIENCE_S = 10.0
SEEN_S = 5.0
"""In which a controller takes over a change of its keys: it looks each second."""


class Keys:
    """A controller's folder of keys, with one for all workers, one for clients that stay, and one for an admin."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "curve"
        self.pairs = folder / "pairs"
        self._number = 0
        for each in (self.folder, self.pairs, *(self.folder / role for role in ("clients", "admins", "workers"))):
            each.mkdir(mode=0o700)
        for port in ("clients-port", "workers-port"):
            write_pair(self.folder, port)
        self.worker = self.add("workers")
        self.client = self.add("clients")
        self.admin = self.add("admins")

    def add(self, role: str) -> str:
        """A new pair that is allowed; returns its name."""
        self._number += 1
        name = f"{role}-{self._number}"
        write_pair(self.pairs, name)
        write_public(self.folder / role / f"{name}.key", name, read_public(self.pairs / f"{name}.key"))
        return name

    def revoke(self, role: str, name: str) -> None:
        """Take a key away."""
        (self.folder / role / f"{name}.key").unlink()

    def options(self, name: str, port: str = "clients") -> dict[str, str]:
        """`key` and `controller_key` for a connection to that port."""
        return {"key": str(self.pairs / f"{name}.key_secret"), "controller_key": str(self.folder / f"{port}-port.key")}

    def environment(self, name: str) -> dict[str, str]:
        """The same for a client process, as it finds them."""
        options = self.options(name)
        return {KEY_VARIABLE: options["key"], CONTROLLER_KEY_VARIABLE: options["controller_key"]}

    def arguments(self, name: str, port: str) -> list[str]:
        """The same for a command."""
        options = self.options(name, port)
        return ["--key", options["key"], "--controller-key", options["controller_key"]]


class Gone(NamedTuple):
    """A worker that was made to go: when, on the monotonic clock, and whether it was killed; otherwise it was told to drain."""

    at_s: float
    worker: str
    killed: bool


class Churn:
    """Runs in threads of its own until `stop`. They end with `close`: Linux kills a process with the thread that started it, if that is
    what it asked for to end with its parent.

    `counts` says what came and went, `gone` which workers went when; `wrong` what did not end as it should.
    """

    def __init__(self, network: Network, keys: Keys | None, workers: list[Child], asking: list[Child], random: Random) -> None:
        self.counts: Counter[str] = Counter()
        self.gone: list[Gone] = []
        self.wrong: list[str] = []
        self._network, self._keys, self._random = network, keys, random
        self._workers, self._asking = workers, asking
        self._over = threading.Event()
        self._closed = threading.Event()
        self._still = threading.Semaphore(0)
        loops: tuple[tuple[Callable[[], None], float], ...] = (
            (self._client, CLIENT_GAP_S),
            (self._worker, WORKER_GAP_S),
            (self._process, PROCESS_GAP_S),
        )
        self._threads = [threading.Thread(target=self._repeat, args=loop, name="churn") for loop in loops]

    def start(self) -> None:
        """Begin."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No more of it; returns when what is under way has ended. What was started lives on."""
        self._over.set()
        for _ in self._threads:
            self._still.acquire()

    def close(self) -> None:
        """End the threads, and with them what they have started."""
        self._over.set()
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, act: Callable[[], None], gap_s: float) -> None:
        while not self._over.wait(gap_s):
            try:
                act()
            except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on and tells it
                self.wrong.append(f"{type(error).__name__}: {error}")
        self._still.release()
        self._closed.wait()

    def _client(self) -> None:
        keys, random = self._keys, self._random
        mortal = keys is not None and random.random() < KEY_SHARE
        name = "" if keys is None else keys.add("clients") if mortal else keys.client
        options: Any = {} if keys is None else keys.options(name)
        until_s = time.monotonic() + SEEN_S
        while True:  # the controller has a second to see the new key
            try:
                with Client(self._network.client_endpoints, name="churn", connect_timeout_s=PATIENCE_S, **options) as client:
                    self._use(client, keys if mortal else None, name)
                return
            except Unauthenticated:
                if not mortal or time.monotonic() > until_s:
                    raise

    def _use(self, client: Client, keys: Keys | None, name: str) -> None:
        random = self._random
        client.models()
        words = f"some words of {random.randrange(10**6)}"
        if client.generate("echo", words, stream=False, retries=10).text != words:
            self.wrong.append(f"not the answer to {words!r}")
        client.embed("echo", ["a", "b"])
        with client.generate("echo", words, max_tokens=500) as stream:
            for _ in range(random.randrange(5)):
                next(stream)
            if keys is not None:
                keys.revoke("clients", name)
                try:
                    for _ in stream:
                        pass
                    self.wrong.append("a revoked key's stream went on to its end")
                except Unauthenticated:
                    self.counts["keys revoked under a stream"] += 1
        self.counts["clients"] += 1

    def _worker(self) -> None:
        child = self._random.choice(self._workers)
        killed = self._random.random() < KILLED_SHARE
        self.gone.append(Gone(time.monotonic(), child.name, killed))
        if killed:
            child.kill()
            self.counts["workers killed"] += 1
        else:
            child.send(signal.SIGTERM)
            process = child.process
            if process is not None:
                process.wait()
            child.ended()
            self.counts["workers drained"] += 1
        self._over.wait(DOWN_S)
        child.start()

    def _process(self) -> None:
        child = self._random.choice(self._asking)
        child.kill()
        self.counts["client processes killed"] += 1
        child.start()
