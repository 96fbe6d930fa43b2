"""What a crowd costs: streams beyond the queue's bound, and clients that stop reading.

    python -m bench backpressure

1. One Client opens 10,000 streams at once against a queue of 1,000: how many are refused and how soon they are told; then all are
   closed, and the controller must have nothing in flight.
2. Clients open streams that never end and are stopped (SIGSTOP): what the controller's memory does. Once with the SDK's Client, which is
   given up when its Pings stay away, and once with bare sockets that never promised to Ping.

Prints a table and one line of JSON; exit code 1 if a requirement is not met.
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
from zmqserve.errors import Overloaded, ZmqserveError
from zmqserve.messages import ControllerStatus
from zmqserve.stream import Stream

from .chaos_ledger import quantile
from .chaos_network import Child, Network

PATIENCE_S = 60.0
SLOTS = 64
MEMORY_MIB = 64.0
"""What the controller may take above idle."""
SAMPLE_S = 0.05


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("backpressure", help="a full queue, and clients that stop reading")
    parser.add_argument("--streams", type=int, default=10_000, help="that one client opens (default 10000)")
    parser.add_argument("--queue", type=int, default=1000, help="what may wait for the model (default 1000)")
    parser.add_argument("--stopped", type=int, default=50, help="clients that stop reading (default 50)")
    parser.add_argument("--stopped-streams", type=int, default=100, help="of each of them (default 100)")
    parser.add_argument("--token-characters", type=int, default=4, help="of each of their tokens' text (default 4)")
    parser.add_argument("--seconds", type=float, default=30.0, help="that the memory is watched (default 30)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    crowd = crowded(args.streams, args.queue)
    print(f"{args.streams} streams of one client, a queue of {args.queue}, a worker of {SLOTS} slots")
    for name, value in crowd.items():
        print(f"  {name:40} {value}")
    refused = max(0, args.streams - args.queue - SLOTS)
    met = crowd["refused"] == refused and not crowd["in flight at the end"]
    memory: dict[str, dict[str, Any]] = {}
    for kind in ("sdk", "raw"):
        memory[kind] = figures = stopped(args.stopped, args.stopped_streams, args.token_characters, args.seconds, raw=kind == "raw")
        print(f"{args.stopped} stopped clients ({kind}) of {args.stopped_streams} streams each")
        for name, value in figures.items():
            print(f"  {name:40} {value}")
        met = met and figures["above idle, MiB"] < MEMORY_MIB and not figures["in flight at the end"]
    settings = {name: value for name, value in vars(args).items() if name != "run"}
    print(json.dumps({"benchmark": "backpressure", "settings": settings, "ok": met, "crowd": crowd, "stopped": memory}))
    return 0 if met else 1


def crowded(streams: int, queue: int) -> dict[str, Any]:
    """One client opens so many streams, of which a worker's slots and the queue hold some; the others must be refused."""
    with _network("--slots", str(SLOTS), "--delay-first", "1000", settings=f"queue_requests = {queue}\n") as network:
        began_s = [0.0] * streams
        told_s: list[float] = []
        other: list[str] = []
        with Client(network.client_endpoints) as client:
            opened: list[Stream] = []
            some = threading.Semaphore(0)

            def read() -> None:
                """The first ones are taken and say nothing; each of the others is told."""
                for number in range(streams):
                    some.acquire()
                    if number < SLOTS + queue:
                        continue
                    try:
                        next(opened[number])
                    except Overloaded:
                        told_s.append(time.monotonic() - began_s[number])
                    except (ZmqserveError, StopIteration) as error:
                        other.append(repr(error))

            reader = threading.Thread(target=read)
            reader.start()
            first_s = time.monotonic()
            for number in range(streams):
                began_s[number] = time.monotonic()
                opened.append(client.generate("echo", "a b c", timeout_s=PATIENCE_S))
                some.release()
            opened_s = time.monotonic() - first_s
            reader.join()
            before = _status(network)
            closed_s = time.monotonic()
            for stream in opened:
                stream.close()
            after = _until_idle(network)
            idle_s = time.monotonic() - closed_s
    return {
        "refused": len(told_s),
        "other ends": other[:3],
        "in flight when all was opened": before.running + before.waiting,
        "opened within, s": round(opened_s, 2),
        "told within, s: p50": round(quantile(told_s, 0.5), 4),
        "told within, s: p99": round(quantile(told_s, 0.99), 4),
        "told within, s: most": round(max(told_s, default=0.0), 4),
        "idle after closing all, s": round(idle_s, 2),
        "in flight at the end": after.running + after.waiting,
    }


def stopped(clients: int, streams: int, token_characters: int, seconds: float, *, raw: bool) -> dict[str, Any]:
    """So many clients open streams and are stopped at once; the controller's memory over that time."""
    with _network("--slots", str(clients * streams)) as network:
        idle = network.controllers[0].memory_bytes()
        arguments = ["--streams", str(streams), "--token-characters", str(token_characters), *(["--raw"] if raw else [])]
        children = [network.add_client(f"client-{number}", "bench.backpressure_client", *arguments) for number in range(clients)]
        for child in children:
            child.start()
        for child in children:
            _hear(child, b"ready\n")
        for child in children:
            _tell(child, b"go\n")
        for child in children:
            _hear(child, b"open\n")
        for child in children:
            child.send(signal.SIGSTOP)
        most = 0
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            most = max(most, network.controllers[0].memory_bytes())
            time.sleep(SAMPLE_S)
        left = _status(network)
        last = network.controllers[0].memory_bytes()
        for child in children:
            child.kill()
        after = _until_idle(network)
    return {
        "idle, MiB": _mib(idle),
        "above idle, MiB": _mib(most - idle),
        "above idle at the end, MiB": _mib(last - idle),
        "running with all of them stopped": left.running,
        "clients let go": {name: count for name, count in left.counters.items() if name.startswith("clients: ")},
        "in flight at the end": after.running + after.waiting,
    }


@contextmanager
def _network(*worker: str, settings: str = "") -> Iterator[Network]:
    """A controller with these settings and one worker, ready."""
    with tempfile.TemporaryDirectory(prefix="zmqserve-backpressure-") as folder:
        config = Path(folder) / "controller.toml"
        config.write_text(settings)
        with Network(Path(folder), controller=["--config", str(config)], worker=list(worker)) as network:
            network.add_worker("worker-0")
            for child in network:
                child.start()
            if not _eventually(lambda: any(each.state == "ready" for each in _status(network).workers)):
                raise RuntimeError(f"the network did not come up: {network.logs()}")
            yield network


def _status(network: Network) -> ControllerStatus:
    with Client(network.client_endpoints, connect_timeout_s=PATIENCE_S, timeout_s=PATIENCE_S) as client:
        return client.status()


def _until_idle(network: Network) -> ControllerStatus:
    _eventually(lambda: not (state := _status(network)).running and not state.waiting)
    return _status(network)


def _eventually(check: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > until_s:
            return False
        time.sleep(SAMPLE_S)
    return True


def _hear(child: Child, word: bytes) -> None:
    if child.process is None or child.process.stdout is None or child.process.stdout.readline() != word:
        raise RuntimeError(f"{child!r} did not say {word!r}")


def _tell(child: Child, word: bytes) -> None:
    if child.process is not None and child.process.stdin is not None:
        child.process.stdin.write(word)
        child.process.stdin.flush()


def _mib(size: int) -> float:
    return round(size / 2**20, 1)
