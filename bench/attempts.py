"""What floods of attempts cost those who are served: gaps in their streams, and how long a newcomer waits.

    python -m bench attempts

A controller (with CURVE, unless told otherwise), an echo worker, streams of an AsyncClient that are measured chunk by chunk, and a new
Client each second that asks for the models. First nobody else is there, then each flood in turn: silent connections, bad handshakes,
registrations of one name. The silent connections come in two ways: opened evenly, and all at once, so that they are also ended all at
once. What single attempts come to is for the tests (`tests/security`).

Prints a table and one line of JSON; exit code 1 if a requirement is not met: with silent connections, either way, the 99th percentile of
the gaps is at most 5 ms above that of calm, a newcomer is served within 2 s of whatever, and nothing is lost. All processes share this
machine, the flood's too: what the controller waited for a CPU is told beside what it used.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from zmqserve import AsyncClient, Client
from zmqserve.errors import ZmqserveError

from .attempts_flood import FLOODS, flood
from .chaos_ledger import quantile
from .chaos_network import Network
from .result import add_out, print_last_line, table
from .soak_churn import Keys

CALM = "calm"
TOKENS, TOKEN_S = 1_000_000, 0.02
ADDED_MS, NEWCOMER_S = 5.0, 2.0
NEWCOMER_GAP_S = 1.0
START_S = 5.0
PATIENCE_S = 30.0
"""Of whoever connects: so that a late answer counts as late, not as none."""
SETTLE_S = 2.0
"""After each flood and at the beginning of the next, before anything is measured."""


class Phase:
    """What was seen while it lasted: gaps between chunks of all streams, what newcomers waited, what went wrong; of the controller the CPU
    of its loop, that of its other threads, which are libzmq's, and how long these were ready to run and had none."""

    def __init__(self) -> None:
        self.gaps_s: list[float] = []
        self.waits_s: list[float] = []
        self.wrong: list[str] = []
        self.made: list[int] = []
        self.cpu_s = (0.0, 0.0, 0.0)


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("attempts", help="floods of hostile attempts beside honest streams")
    parser.add_argument("--streams", type=int, default=20, help="honest ones (default 20)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each flood (default 10)")
    parser.add_argument("--no-keys", action="store_true", help="without CURVE")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    phases = {name: Phase() for name in (CALM, *FLOODS)}
    with tempfile.TemporaryDirectory(prefix="zmqserve-attempts-") as folder:
        keys = None if args.no_keys else Keys(Path(folder))
        guarded = [] if keys is None else ["--curve-dir", str(keys.folder)]
        known = [] if keys is None else keys.arguments(keys.worker, "workers")
        worker = ["--slots", str(args.streams), "--delay-per-token", str(TOKEN_S), *known]
        with Network(Path(folder), controller=guarded, worker=worker) as network:
            network.add_worker("honest")
            for child in network:
                child.start()
            time.sleep(START_S)
            asyncio.run(_measure(network, keys, args, phases))
            alive = all(child.ended() is None for child in network)
    calm = 1000 * quantile(phases[CALM].gaps_s, 0.99)
    rows, unmet = [], [] if alive else ["a process has ended"]
    figures: dict[str, Any] = {}
    for name, phase in phases.items():
        gaps = [1000 * quantile(phase.gaps_s, share) for share in (0.5, 0.99, 1.0)]
        wait_s = max(phase.waits_s, default=0.0)
        figures[name] = {
            "gap p50, ms": round(gaps[0], 2),
            "gap p99, ms": round(gaps[1], 2),
            "longest gap, ms": round(gaps[2], 2),
            "newcomer at most, s": round(wait_s, 3),
            "attempts/s": round(sum(phase.made) / (args.seconds + SETTLE_S)),
            "loop's CPU, %": round(100 * phase.cpu_s[0] / args.seconds, 1),
            "libzmq's CPU, %": round(100 * phase.cpu_s[1] / args.seconds, 1),
            "wait for a CPU, %": round(100 * phase.cpu_s[2] / args.seconds, 1),
            "wrong": phase.wrong[:3],
        }
        rows.append((name, *(str(figure) for figure in list(figures[name].values())[:-1])))
        unmet += [f"{name}: {what}" for what in phase.wrong[:3]]
        if wait_s > NEWCOMER_S or not phase.waits_s:
            unmet.append(f"{name}: a newcomer waited {wait_s:.2f} s")
        if "silent connections" in name and gaps[1] > calm + ADDED_MS:
            why = f"the controller's threads waited {phase.cpu_s[2]:.1f} s of {args.seconds:g} for a CPU"
            unmet.append(f"{name}: the 99th percentile of the gaps is {gaps[1] - calm:.1f} ms above calm; {why}")
    print(table(("", *list(figures[CALM])[:-1]), rows))
    for each in unmet:
        print(f"not met: {each}")
    settings = {"streams": args.streams, "seconds": args.seconds, "keys": keys is not None}
    print_last_line("attempts", settings, args.out, ok=not unmet, unmet=unmet, phases=figures)
    return 1 if unmet else 0


async def _measure(network: Network, keys: Keys | None, args: argparse.Namespace, phases: dict[str, Phase]) -> None:
    options: Any = {} if keys is None else keys.options(keys.client)
    known = {} if keys is None else keys.options(keys.worker, "workers")
    controller = network.controllers[0].process
    assert controller is not None
    present = [phases[CALM]]
    over = threading.Event()
    newcomers = threading.Thread(target=_newcomers, args=(network, options, present, over))
    async with AsyncClient(network.client_endpoints, connect_timeout_s=PATIENCE_S, **options) as client:
        streams = [await client.generate("echo", f"stream {number}", max_tokens=TOKENS) for number in range(args.streams)]
        readers = [asyncio.create_task(_read(stream, present)) for stream in streams]
        newcomers.start()
        try:
            for name, phase in phases.items():
                await asyncio.sleep(SETTLE_S)
                with ExitStack() as stack:
                    if name != CALM:
                        endpoint = (network.worker_endpoints if name.endswith("name") else network.client_endpoints)[0]
                        # Not on the loop, which would read late meanwhile.
                        await asyncio.to_thread(stack.enter_context, flood(name, endpoint, known, phase.made))
                        await asyncio.sleep(SETTLE_S)
                    present[0] = phase
                    before = _cpu_s(controller.pid)
                    await asyncio.sleep(args.seconds)
                    after = _cpu_s(controller.pid)
                    phase.cpu_s = after[0] - before[0], after[1] - before[1], after[2] - before[2]
                    present[0] = Phase()
                    await asyncio.to_thread(stack.close)
        finally:
            over.set()
        for reader in readers:
            reader.cancel()
        for stream in streams:
            stream.close()
    newcomers.join()


def _cpu_s(pid: int) -> tuple[float, float, float]:
    """CPU that a process has used, its main thread and all others, and how long they waited for one (0 where the system does not tell)."""
    import psutil

    used = {thread.id: thread.user_time + thread.system_time for thread in psutil.Process(pid).threads()}
    waited_ns = 0
    with suppress(OSError):
        waited_ns = sum(int(path.read_text().split()[1]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat"))
    return used.pop(pid), sum(used.values()), waited_ns / 1e9


async def _read(stream: Any, present: list[Phase]) -> None:
    """Note the gaps of one stream, and that it goes on as it should."""
    last_s, seq = time.monotonic(), -1
    try:
        async for chunk in stream:
            now = time.monotonic()
            present[0].gaps_s.append(now - last_s)
            last_s = now
            if chunk.seq != seq + 1:
                present[0].wrong.append(f"chunk {chunk.seq} after {seq}")
            seq = chunk.seq
    except ZmqserveError as error:
        present[0].wrong.append(repr(error))


def _newcomers(network: Network, options: dict[str, Any], present: list[Phase], over: threading.Event) -> None:
    """A new client after the other, each with a connection of its own."""
    while not over.wait(NEWCOMER_GAP_S):
        phase, began_s = present[0], time.monotonic()
        try:
            with Client(network.client_endpoints, connect_timeout_s=PATIENCE_S, **options) as client:
                client.models()
            phase.waits_s.append(time.monotonic() - began_s)
        except ZmqserveError as error:
            phase.wrong.append(f"a newcomer: {error!r}")
