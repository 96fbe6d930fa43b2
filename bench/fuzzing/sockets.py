"""Both sockets of a real controller under hostile peers, while honest streams run beside them.

A session of a client and of a worker is recorded; processes then replay it changed, on both sockets, with frames too many and too few,
routing ids that others have, connections that come and go, and bare TCP that breaks off anywhere. The honest streams are checked token
by token, must be served without a retry or a resume, and end whole. Reports the controller's memory before, at its most and after.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import msgspec

from bench.chaos_ledger import quantile
from bench.chaos_network import Child, Network
from bench.chaos_records import Ended, parse
from bench.result import print_last_line
from zmqserve import Client
from zmqserve.errors import ZmqserveError
from zmqserve.messages import ControllerStatus

from .attackers import attack
from .recording import record

TOKENS = 200
TOKEN_S = 0.02
"""Between two tokens of an honest stream."""
DEADLINE_S = 120.0
WORKERS = 2
WARM_S = 12.0
"""Of honest streams alone, before the first hostile message: the gaps to compare with."""
READY_S = 60.0
SETTLE_S = 30.0
"""From the last hostile message to the last look at memory: libzmq lets go of what ended connections have left about 10 s after them."""
SIDES = ("clients", "workers")


class Honest:
    """The process of honest streams: what it says of each that has ended, with when."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.ended: list[Ended] = []
        self._thread = threading.Thread(target=self._read, name="honest")

    def start(self) -> None:
        """Begin to ask."""
        self.child.start()
        self._thread.start()

    def stop(self) -> int | None:
        """Let open streams end; returns the exit code."""
        process = self.child.process
        if process is None or process.stdin is None:
            return None
        process.stdin.write(b"stop\n")
        process.stdin.flush()
        self._thread.join(DEADLINE_S)
        return process.wait(DEADLINE_S)

    def _read(self) -> None:
        process = self.child.process
        if process is None or process.stdout is None:
            return
        for text in process.stdout:
            record = parse(text)
            if isinstance(record, Ended):
                self.ended.append(record)


@contextmanager
def honest_network(streams: int, *, settings: list[str] | None = None, token_s: float = TOKEN_S) -> Iterator[tuple[Network, Honest]]:
    """A controller with its workers and the process of `streams` honest streams, which is not started yet."""
    with tempfile.TemporaryDirectory(prefix="zmqserve-hostile-") as folder:
        worker = ["--slots", str(2 * streams), "--delay-per-token", str(token_s)]
        with Network(Path(folder), worker=worker, controller=settings) as network:
            for number in range(WORKERS):
                network.add_worker(f"honest-{number}")
            for child in (*network.controllers, *network.workers):
                child.start()
            wait_for_workers(network)
            shape = ["--streams", str(streams), "--tokens", str(TOKENS), "--deadline", str(DEADLINE_S), "--retries", "0", "--seed", "1"]
            yield network, Honest(network.add_client("honest", "bench.chaos_client", *shape))


def wait_for_workers(network: Network) -> None:
    """Until all are registered."""
    until_s = time.monotonic() + READY_S
    while (state := status(network)) is None or len(state.workers) < len(network.workers):
        if time.monotonic() > until_s:
            raise RuntimeError(f"the network did not come up: {state} {network.logs()}")
        time.sleep(0.1)


def status(network: Network) -> ControllerStatus | None:
    """The controller's; None when it does not answer."""
    try:
        with Client(network.client_endpoints[0], connect_timeout_s=5.0, timeout_s=10.0) as client:
            return client.status()
    except ZmqserveError:
        return None


def disturbed(ended: list[Ended]) -> list[Ended]:
    """Those that were not served as if they were alone."""
    return [each for each in ended if each.code or each.wrong or each.resumed or each.tokens != TOKENS]


def fuzz_sockets(args: argparse.Namespace) -> int:
    """The benchmark."""
    recording = msgspec.msgpack.encode(record())
    with honest_network(args.streams) as (network, honest):
        controller = network.controllers[0]
        honest.start()
        time.sleep(WARM_S)
        before, calm = controller.memory_bytes(), len(honest.ended)
        began_s = time.monotonic()
        sent, most = _attack(network, recording, args)
        took_s = time.monotonic() - began_s
        time.sleep(SETTLE_S)
        after = controller.memory_bytes()
        state = status(network)
        code = honest.stop()
        ends = {child.name: child.ended() for child in (*network.controllers, *network.workers)}
        crashes = {name: code for name, code in ends.items() if code is not None}
        logs = {name: text for name, text in network.logs().items() if name in crashes or "Traceback" in text}
    hurt = disturbed(honest.ended)
    gaps = [[each.gap_s for each in part] for part in (honest.ended[:calm], honest.ended[calm:])]
    figures: dict[str, Any] = {
        "messages sent": sent,
        "messages/s": round(sum(sent.values()) / took_s),
        "exit codes of what crashed": crashes,
        "what reported a traceback": sorted(logs.keys() - crashes.keys()),
        "honest streams that ended": len(honest.ended),
        "of these disturbed": len(hurt),
        "longest gap in a stream, ms: p50 before, then under attack": [round(1000 * quantile(part, 0.5), 1) for part in gaps],
        "controller, MiB: before, most, after": [round(size / 2**20, 1) for size in (before, most, after)],
        "controller's counters": {} if state is None else {name: count for name, count in state.counters.items() if count},
        "workers left": [] if state is None else sorted(worker.name for worker in state.workers),
    }
    for name, value in figures.items():
        print(f"{name:60} {value}")
    for each in hurt[:5]:
        print(f"disturbed: {each}")
    for name, text in logs.items():
        print(f"--- {name} said (last lines)\n{text[-4000:]}")
    ok = not crashes and not logs and not hurt and code == 0 and state is not None and bool(honest.ended)
    settings = {"messages": args.messages, "streams": args.streams, "seed": args.seed, "chosen": args.chosen}
    print_last_line("fuzz-sockets", settings, args.out, ok=ok, **figures)
    return 0 if ok else 1


def _attack(network: Network, recording: bytes, args: argparse.Namespace) -> tuple[dict[str, int], int]:
    """Hostile peers on both sides until all is sent; returns how much that was, and the controller's memory at its most."""
    context = get_context("spawn")
    sent = dict.fromkeys(SIDES, 0)
    ends: dict[Connection, str] = {}
    processes = []
    endpoints = {"clients": network.client_endpoints[0], "workers": network.worker_endpoints[0]}
    for side in SIDES:
        here, there = context.Pipe()
        arguments = (there, endpoints[side], recording, side, args.messages // len(SIDES), f"{args.seed}/{side}", args.chosen)
        processes.append(context.Process(target=attack, args=arguments, daemon=True))
        processes[-1].start()
        there.close()
        ends[here] = side
    most = 0
    while ends:
        for end in wait(list(ends), timeout=0.5):
            assert isinstance(end, Connection)
            try:
                sent[ends[end]] += end.recv()
            except EOFError:
                del ends[end]
        most = max(most, network.controllers[0].memory_bytes())
    for process in processes:
        process.join()
    return sent, most
