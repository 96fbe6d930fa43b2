"""What the controller costs beside C `zmq.proxy`: round trips and relayed tokens. No model, no GPU.

    python -m bench transport [--quick]

Both networks are up at once and measured in turn, block by block, so that the machine's noise meets both alike. `ratios`
in the last line: rtt_* are the controller's median over the proxy's (lower is better), relay_* its tokens/s over the
proxy's (higher is better): `token` with one token a message, `step` with one token of every stream a message.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import zmq

from . import lean

ARMS = ("proxy", "controller")
_spawn = multiprocessing.get_context("spawn")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("transport", help="controller against C zmq.proxy: round trips and relayed tokens")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    blocks, repeats = (5, 3) if args.quick else (25, 7)
    settings = {"trips_per_arm": blocks * 200, "repeats": repeats, "streams": 256, "tokens": 512, "token_bytes": 20}
    ratios: dict[str, float] = {}
    rows: list[tuple[str, str, str, str, str]] = []
    for transport in ("tcp", "ipc"):
        figures = _round_trips(transport, blocks)
        ratios[f"rtt_{transport}_vs_proxy"] = _compare(rows, f"round trip {transport}, us", figures, 1e6)
    for name, step in (("token", False), ("step", True)):
        figures, cpu = _relay(step, repeats, settings["streams"], settings["tokens"])
        ratios[f"relay_{name}_vs_proxy"] = _compare(rows, f"relay, one {name} a message, tokens/s", figures, 1)
        rows.append((f"  CPU s per 1M tokens, broker, {name}", f"{cpu['proxy']:.2f}", "", f"{cpu['controller']:.2f}", ""))
    print(f"{'':44}{'proxy':>12} {'min..max':>22}{'controller':>14} {'min..max':>22}")
    for title, *cells in rows:
        print(f"{title:44}{cells[0]:>12} {cells[1]:>22}{cells[2]:>14} {cells[3]:>22}")
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    machine = {"python": platform.python_version(), "libzmq": zmq.zmq_version(), "pyzmq": zmq.__version__, "machine": platform.machine()}
    print(
        json.dumps(
            {"benchmark": "transport", "settings": settings, "machine": machine, "ratios": {k: round(v, 4) for k, v in ratios.items()}}
        )
    )
    return 0


def _compare(rows: list[tuple[str, str, str, str, str]], title: str, figures: dict[str, list[float]], scale: float) -> float:
    cells: list[str] = []
    for arm in ARMS:
        values = sorted(value * scale for value in figures[arm])
        cells += [f"{statistics.median(values):,.0f}", f"{values[0]:,.0f}..{values[-1]:,.0f}"]
    rows.append((title, cells[0], cells[1], cells[2], cells[3]))
    return statistics.median(figures["controller"]) / statistics.median(figures["proxy"])


def _round_trips(transport: str, blocks: int) -> dict[str, list[float]]:
    with _networks(transport, 0, 0, False) as networks:
        spent: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for arm in ARMS:
            lean.round_trips(networks[arm].client, 200)
        for _ in range(blocks):
            for arm in ARMS:
                spent[arm] += lean.round_trips(networks[arm].client, 200)
    return spent


def _relay(step: bool, repeats: int, streams: int, tokens: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu = dict.fromkeys(ARMS, 0.0)
    with _networks("tcp", streams, tokens, step) as networks:
        for arm in ARMS:
            lean.consume(networks[arm].client, streams)
        for _ in range(repeats):
            for arm in ARMS:
                before = networks[arm].cpu_seconds()
                rates[arm].append(streams * tokens / lean.consume(networks[arm].client, streams))
                cpu[arm] += networks[arm].cpu_seconds() - before
    return rates, {arm: used / (repeats * streams * tokens) * 1e6 for arm, used in cpu.items()}


class _Network:
    """One broker process, one lean worker process, and a client socket here."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], broker: Callable[..., None], registers: bool, transport: str, folder: str
    ) -> None:
        self._pipe, theirs = _spawn.Pipe()
        self._processes = [_spawn.Process(target=broker, args=(theirs, transport, folder), daemon=True)]
        self._processes[0].start()
        clients, self._workers = self._pipe.recv()
        self._registers = registers
        self.client = context.socket(zmq.DEALER)
        self.client.setsockopt(zmq.RCVTIMEO, 60_000)
        self.client.connect(clients)

    def add_worker(self, streams: int, tokens: int, step: bool) -> None:
        """Start the worker and wait until it can be asked."""
        mine, theirs = _spawn.Pipe()
        process = _spawn.Process(target=lean.worker, args=(theirs, self._workers, self._registers, streams, tokens, step), daemon=True)
        process.start()
        mine.recv()
        self._processes.append(process)

    def cpu_seconds(self) -> float:
        """CPU time that the broker has used."""
        self._pipe.send("cpu")
        seconds: float = _received(self._pipe)
        return seconds

    def close(self) -> None:
        """End both processes."""
        self.client.close(0)
        self._pipe.send("stop")
        for process in reversed(self._processes[1:]):
            process.kill()
        for process in self._processes:
            process.join()


def _received(pipe: Connection) -> Any:
    return pipe.recv()


@contextmanager
def _networks(transport: str, streams: int, tokens: int, step: bool) -> Iterator[dict[str, _Network]]:
    context = zmq.Context()
    networks: dict[str, _Network] = {}
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        try:
            for arm, broker in (("proxy", lean.proxy), ("controller", lean.controller)):
                networks[arm] = _Network(context, broker, arm == "controller", transport, folder)
                networks[arm].add_worker(streams, tokens, step)
            yield networks
        finally:
            for network in networks.values():
                network.close()
            context.term()
