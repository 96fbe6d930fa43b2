"""What the controller costs beside C `zmq.proxy`: round trips and relayed tokens. No model, no GPU.

    python -m bench transport [--quick] [--check]

Both networks are up at once and measured in turn, block by block, so that the machine's noise meets both alike. `ratios`
in the last line: rtt_* are the controller's median over the proxy's (lower is better), relay_* its tokens/s over the
proxy's (higher is better): `token` with one token a message, `step` with one token of every stream a message.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import zmq

from . import baseline, lean
from .result import Spread, add_out, print_last_line, progress, rounded, table

ARMS = ("proxy", "controller")
_spawn = multiprocessing.get_context("spawn")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("transport", help="controller against C zmq.proxy: round trips and relayed tokens")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer repetitions")
    parser.add_argument("--check", action="store_true", help="compare with bench/baseline.json: exit code 1 where a ratio is worse")
    add_out(parser)
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
    print(table(("", "proxy", "min..max", "controller", "min..max"), rows))
    print(", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    kept = not args.check or baseline.check("transport", ratios)
    print_last_line("transport", settings, args.out, ratios=rounded(ratios))
    return 0 if kept else 1


def _compare(rows: list[tuple[str, str, str, str, str]], title: str, figures: dict[str, list[float]], scale: float) -> float:
    proxy, controller = (Spread.of([value * scale for value in figures[arm]]) for arm in ARMS)
    rows.append((title, *proxy.cells(), *controller.cells()))
    return controller.median / proxy.median


def _round_trips(transport: str, blocks: int) -> dict[str, list[float]]:
    with _networks(transport, 0, 0, False) as networks:
        spent: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for arm in ARMS:
            lean.round_trips(networks[arm].client, 200)
        for _ in progress(blocks, f"round trips, {transport}"):
            for arm in ARMS:
                spent[arm] += lean.round_trips(networks[arm].client, 200)
    return spent


def _relay(step: bool, repeats: int, streams: int, tokens: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu = dict.fromkeys(ARMS, 0.0)
    with _networks("tcp", streams, tokens, step) as networks:
        for arm in ARMS:
            lean.consume(networks[arm].client, streams)
        for _ in progress(repeats, f"relay, one {'step' if step else 'token'} a message"):
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
