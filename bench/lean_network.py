"""Networks of lean processes, several at once and measured in turn, block by block, so that the machine's noise meets all alike."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import zmq

from . import lean
from .result import Spread, progress, rounded

_spawn = multiprocessing.get_context("spawn")


class Arm(NamedTuple):
    """One of the networks that are compared. `broker`: a function of lean.py; `registers`: whether it takes workers' registrations;
    `keys`: a folder that `lean.make_keys` filled, for CURVE."""

    broker: Callable[..., None]
    registers: bool
    keys: str = ""


class Network:
    """One broker process, one lean worker process, and a client socket here."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], arm: Arm, transport: str, folder: str) -> None:
        self._arm = arm
        self._pipe, theirs = _spawn.Pipe()
        options = (arm.keys,) if arm.keys else ()
        self._processes = [_spawn.Process(target=arm.broker, args=(theirs, transport, folder, *options), daemon=True)]
        self._processes[0].start()
        clients, self._workers = self._pipe.recv()
        self.client = context.socket(zmq.DEALER)
        self.client.setsockopt(zmq.RCVTIMEO, 60_000)
        lean.prove(self.client, arm.keys, "client")
        self.client.connect(clients)

    def add_worker(self, streams: int, tokens: int, step: bool) -> None:
        """Start the worker and wait until it can be asked."""
        mine, theirs = _spawn.Pipe()
        arguments = (theirs, self._workers, self._arm.registers, streams, tokens, step, self._arm.keys)
        process = _spawn.Process(target=lean.worker, args=arguments, daemon=True)
        process.start()
        mine.recv()
        self._processes.append(process)

    def cpu_seconds(self) -> float:
        """CPU time that the broker has used, that of libzmq's threads included."""
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
def networks(arms: Mapping[str, Arm], transport: str, streams: int, tokens: int, step: bool) -> Iterator[dict[str, Network]]:
    """One of each arm, with their workers."""
    context = zmq.Context()
    made: dict[str, Network] = {}
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        try:
            for name, arm in arms.items():
                made[name] = Network(context, arm, transport, folder)
                made[name].add_worker(streams, tokens, step)
            yield made
        finally:
            for network in made.values():
                network.close()
            context.term()


def round_trips(arms: Mapping[str, Arm], transport: str, blocks: int) -> dict[str, list[float]]:
    """Seconds of each round trip, 200 in a block."""
    with networks(arms, transport, 0, 0, False) as made:
        spent: dict[str, list[float]] = {name: [] for name in arms}
        for name in arms:
            lean.round_trips(made[name].client, 200)
        for _ in progress(blocks, f"round trips, {transport}"):
            for name in arms:
                spent[name] += lean.round_trips(made[name].client, 200)
    return spent


def relay(arms: Mapping[str, Arm], step: bool, repeats: int, streams: int, tokens: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Tokens a second in each repetition, and the broker's CPU seconds for a million of them."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    cpu = dict.fromkeys(arms, 0.0)
    with networks(arms, "tcp", streams, tokens, step) as made:
        for name in arms:
            lean.consume(made[name].client, streams)
        for _ in progress(repeats, f"relay, one {'step' if step else 'token'} a message"):
            for name in arms:
                before = made[name].cpu_seconds()
                rates[name].append(streams * tokens / lean.consume(made[name].client, streams))
                cpu[name] += made[name].cpu_seconds() - before
    return rates, {name: used / (repeats * streams * tokens) * 1e6 for name, used in cpu.items()}


class Comparison:
    """All of `round_trips` and `relay` for two arms: `ratios` of the second over the first, by ``rtt_tcp``, ``rtt_ipc`` (lower is better),
    ``relay_token`` and ``relay_step`` (higher is better), with ``_vs_`` and the first's name; `rows` for a table; `settings`; `cpu_s`: the
    brokers' CPU seconds for a million tokens, by ``token`` and ``step``."""

    def __init__(self, arms: Mapping[str, Arm], *, quick: bool) -> None:
        self._arms = arms
        blocks, repeats = (5, 3) if quick else (25, 7)
        self.settings = {"trips_per_arm": blocks * 200, "repeats": repeats, "streams": 256, "tokens": 512, "token_bytes": 20}
        self.ratios: dict[str, float] = {}
        self.cpu_s: dict[str, dict[str, float]] = {}
        self.rows: list[tuple[str, ...]] = []
        for transport in ("tcp", "ipc"):
            self._compare(f"rtt_{transport}", f"round trip {transport}, us", round_trips(arms, transport, blocks), 1e6)
        for name, step in (("token", False), ("step", True)):
            rates, cpu = relay(arms, step, repeats, self.settings["streams"], self.settings["tokens"])
            self._compare(f"relay_{name}", f"relay, one {name} a message, tokens/s", rates, 1)
            first, second = (f"{cpu[arm]:.2f}" for arm in arms)
            self.rows.append((f"  CPU s per 1M tokens, broker, {name}", first, "", second, ""))
            self.cpu_s[name] = rounded(cpu)

    def __repr__(self) -> str:
        return f"Comparison({self.summary})"

    @property
    def summary(self) -> str:
        """The ratios in a line."""
        return ", ".join(f"{name} {ratio:.2f}" for name, ratio in self.ratios.items())

    def _compare(self, name: str, title: str, figures: dict[str, list[float]], scale: float) -> None:
        first, second = (Spread.of([value * scale for value in figures[arm]]) for arm in self._arms)
        self.rows.append((title, *first.cells(), *second.cells()))
        self.ratios[f"{name}_vs_{next(iter(self._arms))}"] = second.median / first.median
