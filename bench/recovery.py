"""How long an answer stands still when what serves it dies: from the signal to the next token that the caller gets.

    python -m bench recovery --repeats 50

Real processes on loopback, one request at a time. "Before the first chunk": the worker that has the request is killed or stopped and
the controller gives it to another. "Mid-stream": the answer is joined elsewhere, by another worker or through another controller.
Killed is SIGKILL, stopped is SIGSTOP: the process stays and says nothing more. All settings are the defaults.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zmqserve import Client
from zmqserve.errors import ZmqserveError
from zmqserve.stream import Stream

from .chaos_ledger import quantile
from .chaos_network import Child, Network

PATIENCE_S = 30.0
"""What anything may take before the benchmark gives up."""
LOOK_S = 0.002
TOKEN_DELAY_S = 0.01
ANSWER_TOKENS = 100_000
"""Of a mid-stream answer: it never ends by itself."""
BEGUN_TOKENS = 20
"""Of it, so many come before the signal."""

PEERS = {
    "NVIDIA Dynamo (published)": "17-45 s",
    "SGLang (published)": "~90 s",
    "FastChat (published)": "90-180 s",
    "Ray (published)": "14 s killed, 64 s hung",
}

Case = tuple[str, str, signal.Signals]
CASES: tuple[Case, ...] = (
    ("before the first chunk", "worker", signal.SIGKILL),
    ("before the first chunk", "worker", signal.SIGSTOP),
    ("mid-stream", "worker", signal.SIGKILL),
    ("mid-stream", "worker", signal.SIGSTOP),
    ("mid-stream", "controller", signal.SIGKILL),
    ("mid-stream", "controller", signal.SIGSTOP),
)


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("recovery", help="from the death of a worker or controller to the next token")
    parser.add_argument("--repeats", type=int, default=50, help="of each case (default 50)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    figures: dict[str, dict[str, float]] = {}
    print(f"{'signal to next token, s':44}{'p50':>9}{'p99':>9}{'most':>9}")
    for case in CASES:
        when, what, number = case
        times_s = measured(case, args.repeats)
        name = f"{when}, {what} {'killed' if number is signal.SIGKILL else 'stopped'}"
        p50, p99 = quantile(times_s, 0.5), quantile(times_s, 0.99)
        figures[name] = {"p50_s": round(p50, 4), "p99_s": round(p99, 4), "max_s": round(max(times_s), 4)}
        print(f"{name:44}{p50:9.3f}{p99:9.3f}{max(times_s):9.3f}", flush=True)
    for name, text in PEERS.items():
        print(f"{name:44}   {text}")
    print(json.dumps({"benchmark": "recovery", "settings": {"repeats": args.repeats}, "figures": figures}))
    return 0


def measured(case: Case, repeats: int) -> list[float]:
    """Seconds from the signal to the next token, so many times, in a network of their own."""
    when, what, number = case
    with (
        tempfile.TemporaryDirectory(prefix="zmqserve-recovery-") as folder,
        Network(Path(folder), controllers=2 if what == "controller" else 1) as network,
    ):
        if when == "before the first chunk":
            network.add_worker("mute", "--delay-first", "1000")
            network.add_worker("other")
            once = _before_first
        else:
            for name in ("one", "other"):
                network.add_worker(name, "--delay-per-token", str(TOKEN_DELAY_S))
            once = _mid_worker if what == "worker" else _mid_controller
        for child in (*network.controllers, *network.workers):
            child.start()
        return [once(network, number) for _ in range(repeats)]


def _before_first(network: Network, number: signal.Signals) -> float:
    """The mute worker never begins. A request that the other one got is asked again."""
    _wait_ready(network)
    while (took_s := _mute_struck(network, number)) is None:
        pass
    return took_s


def _mute_struck(network: Network, number: signal.Signals) -> float | None:
    with _asked(network, "a b c", None) as (client, reader):
        if not _eventually(lambda: reader.tokens > 0 or "mute" in _running(client)):
            raise RuntimeError("no worker took the request")
        return None if reader.tokens else _struck(network.workers[0], number, reader, lambda: reader.tokens > 0)


def _mid_worker(network: Network, number: signal.Signals) -> float:
    _wait_ready(network)
    with _asked(network, "a b c", ANSWER_TOKENS) as (client, reader):
        _begun(reader)
        (name,) = _running(client)
        worker = next(child for child in network.workers if child.name == name)
        return _struck(worker, number, reader, lambda: reader.resumed > 0)


def _mid_controller(network: Network, number: signal.Signals) -> float:
    _wait_ready(network)
    with _asked(network, "a b c", ANSWER_TOKENS) as (_, reader):
        _begun(reader)
        return _struck(network.controllers[0], number, reader, lambda: reader.resumed > 0)


@contextmanager
def _asked(network: Network, prompt: str, max_tokens: int | None) -> Iterator[tuple[Client, _Reader]]:
    """A client that asked for an answer, and who reads it."""
    client = Client(network.client_endpoints)
    try:
        reader = _Reader(client.generate("echo", prompt, max_tokens=max_tokens))
    except BaseException:
        client.close()
        raise
    try:
        yield client, reader
    finally:
        client.close()  # ends the stream for its reader
        reader.join()


def _struck(child: Child, number: signal.Signals, reader: _Reader, goes_on: Callable[[], bool]) -> float:
    """Send the signal, wait for the token that shows that the answer goes on, and put the process back."""
    began_s = time.monotonic()
    child.send(number)
    try:
        if not _eventually(lambda: goes_on() or reader.error is not None) or reader.error is not None:
            raise RuntimeError(f"{child!r}: the answer did not go on: {reader.error!r}")
        return reader.went_on_s - began_s
    finally:
        child.kill()
        child.start()


class _Reader:
    """Reads a stream in a thread. `went_on_s`: when its first token came, or the first after a join."""

    def __init__(self, stream: Stream) -> None:
        self.tokens = self.resumed = 0
        self.went_on_s = 0.0
        self.error: ZmqserveError | None = None
        self._stream = stream
        self._thread = threading.Thread(target=self._read, name="recovery-reader")
        self._thread.start()

    def _read(self) -> None:
        try:
            for _ in self._stream:
                if not self.tokens or self._stream.resumed > self.resumed:
                    self.went_on_s = time.monotonic()
                    self.resumed = self._stream.resumed
                self.tokens += 1
        except ZmqserveError as error:
            self.error = error

    def join(self) -> None:
        """Wait for its end: its client must have been closed."""
        self._thread.join()


def _begun(reader: _Reader) -> None:
    if not _eventually(lambda: reader.tokens >= BEGUN_TOKENS or reader.error is not None) or reader.error is not None:
        raise RuntimeError(f"the answer did not begin: {reader.error!r}")


def _running(client: Client) -> list[str]:
    return [worker.name for worker in client.status().workers if worker.running]


def _wait_ready(network: Network) -> None:
    """Until every controller has every worker, idle: also those that were put back."""
    for endpoint in network.client_endpoints:
        with Client(endpoint, connect_timeout_s=PATIENCE_S) as client:

            def ready(client: Client = client) -> bool:
                workers = client.status().workers
                return sum(each.free == each.slots > 0 for each in workers) == len(network.workers) == len(workers)

            if not _eventually(ready):
                raise RuntimeError(f"the network is not ready: {client.status()} {network.logs()}")


def _eventually(check: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > until_s:
            return False
        time.sleep(LOOK_S)
    return True
