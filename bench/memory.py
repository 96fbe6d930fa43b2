"""What a controller's memory is spent on: idle clients and workers, running streams, and requests of 1 kB that wait.

    python -m bench memory [--quick]

A controller in a process of its own; how much its resident memory grows as they come, divided by how many came. A connection is libzmq's
(its pipes and buffers) and the kernel's is not counted. Beside it, the same without sockets: what the state machine alone allocates,
counted by `tracemalloc`, and which lines hold the most. `bytes` in the last line: of each kind, in the process and in the state machine.
"""

from __future__ import annotations

import argparse
import gc
import linecache
import multiprocessing
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import zmq

from zmqserve import Controller, ControllerConfig
from zmqserve import messages as m
from zmqserve.sockets import raise_descriptor_limit

from .pure_broker import MANY, NOW, TTL_MS, PureBroker
from .result import add_out, print_last_line, progress, table

PROMPT_BYTES = 1000
KINDS = ("idle client", "idle worker", "waiting request of 1 kB", "running stream")
PATIENCE_MS = 60_000
LINES = 5
"""So many lines of code are named for each kind."""

_spawn = multiprocessing.get_context("spawn")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("memory", help="a controller's memory per client, worker, stream and waiting request")
    parser.add_argument("--quick", action="store_true", help="a tenth of the peers and requests")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    peers, requests = (100, 2000) if args.quick else (1000, 20_000)
    process = resident(peers, requests)
    pure = allocated(peers, requests)
    rows = []
    for kind in KINDS:
        own, lines = pure[kind]
        rows.append((kind, f"{process[kind]:,.0f}", f"{own:,.0f}"))
        rows += [(f"    {text}", "", f"{size:,.0f}") for text, size in lines]
    print(table(("bytes each", "process", "state machine"), rows))
    figures = {kind: {"process": round(process[kind]), "state_machine": round(pure[kind][0])} for kind in KINDS}
    print_last_line("memory", {"peers": peers, "requests": requests, "prompt_bytes": PROMPT_BYTES}, args.out, bytes=figures)
    return 0


# --- a whole controller, by its resident memory


def resident(peers: int, requests: int) -> dict[str, float]:
    """Bytes for each, of a controller's process."""
    with _controller() as (ask, clients, workers), _sockets(2 * peers + 2) as connect:
        grown: dict[str, float] = {}
        worker = connect(workers)
        _register(worker, "busy", requests)
        client = connect(clients)
        _say_hello(client)
        before = ask("rss")
        for kind, endpoint, greet in (("idle client", clients, _say_hello), ("idle worker", workers, _register)):
            for number in progress(peers, kind):
                greet(connect(endpoint), f"{kind} {number}")
            before, grown[kind] = _growth(ask, before, peers)
        for rid in progress(requests, "running streams"):
            client.send(m.encode(m.Generate(rid + 1, "busy", prompt="x" * PROMPT_BYTES)))
            _begin(worker, client)
        before, grown["running stream"] = _growth(ask, before, requests)
        for rid in range(requests, 2 * requests):
            client.send(m.encode(m.Generate(rid + 1, "busy", prompt="x" * PROMPT_BYTES)))
        _say_hello(client)  # it is answered when all before it have been read
        before, grown["waiting request of 1 kB"] = _growth(ask, before, requests)
    return grown


def _growth(ask: Callable[[str], int], before: int, count: int) -> tuple[int, float]:
    now = ask("rss")
    return now, (now - before) / count


def _begin(worker: zmq.Socket[bytes], client: zmq.Socket[bytes]) -> None:
    """The request that the worker got has its first chunk."""
    head = m.decoder(m.ControllerHead).decode(_received(worker)[0])
    first = m.WorkerHead(m.FIRST, head.epoch, head.client, head.rid)
    worker.send_multipart([m.encode(first), m.encode(m.FirstChunk(head.rid, 0, 0, "x", b"\1\0\0\0"))])
    client.recv()


def _say_hello(socket: zmq.Socket[bytes], _name: str = "") -> None:
    socket.send(m.encode(m.Hello(m.PROTOCOL)))
    socket.recv()


def _register(socket: zmq.Socket[bytes], name: str, slots: int = 8) -> None:
    model = "idle" if name.startswith("idle") else name
    ready = m.Ready(m.PROTOCOL, name, "bench", "ready", [m.ModelCard(model, verbs=["generate"])], slots, 1.0, TTL_MS)
    socket.send_multipart([m.encode(m.WorkerHead(m.READY, 0)), m.encode(ready)])
    _received(socket)


def _received(worker: zmq.Socket[bytes]) -> list[bytes]:
    """The next message that is no heartbeat."""
    while True:
        frames = worker.recv_multipart()
        if m.decoder(m.ControllerHead).decode(frames[0]).kind != m.BEAT:
            return frames


@contextmanager
def _controller() -> Iterator[tuple[Callable[[str], int], str, str]]:
    pipe, theirs = _spawn.Pipe()
    process = _spawn.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        clients, workers = pipe.recv()

        def ask(what: str) -> int:
            pipe.send(what)
            answer: int = pipe.recv()
            return answer

        yield ask, clients, workers
    finally:
        process.kill()
        process.join()


def _serve(pipe: Connection) -> None:
    config = ControllerConfig(
        clients=["tcp://127.0.0.1:*"],
        workers=["tcp://127.0.0.1:*"],
        queue_requests=MANY,
        client_requests=MANY,
        queue_bytes=2**40,
        client_bytes=2**40,
    )
    with Controller(config) as controller:
        pipe.send((controller.client_endpoints[0], controller.worker_endpoints[0]))
        while True:
            pipe.recv()
            gc.collect()
            pipe.send(psutil.Process().memory_info().rss)


@contextmanager
def _sockets(most: int) -> Iterator[Callable[[str], zmq.Socket[bytes]]]:
    raise_descriptor_limit()
    with zmq.Context() as context:
        context.set(zmq.MAX_SOCKETS, most)
        opened: list[zmq.Socket[bytes]] = []

        def connect(endpoint: str) -> zmq.Socket[bytes]:
            socket = context.socket(zmq.DEALER)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
            socket.setsockopt(zmq.SNDHWM, 0)
            socket.connect(endpoint)
            opened.append(socket)
            return socket

        yield connect
        for socket in opened:
            socket.close()


# --- the state machine alone, by what it allocates


def allocated(peers: int, requests: int) -> dict[str, tuple[float, list[tuple[str, float]]]]:
    """Bytes for each, and the lines of code that allocated the most of them. An idle client is nothing to the state machine."""
    tracemalloc.start()
    try:
        network = PureBroker(0, prompt_bytes=PROMPT_BYTES)
        found = {"idle client": (0.0, list[tuple[str, float]]())}
        found["idle worker"] = _traced(lambda: _add_workers(network, peers), peers)
        network = PureBroker(1, slots=requests, clients=1, prompt_bytes=PROMPT_BYTES)
        found["running stream"] = _traced(lambda: _start_streams(network, requests), requests)
        found["waiting request of 1 kB"] = _traced(lambda: network.ask(requests), requests)
    finally:
        tracemalloc.stop()
    return found


def _add_workers(network: PureBroker, count: int) -> None:
    for number in range(count):
        network.add_worker(number, 8)


def _start_streams(network: PureBroker, count: int) -> None:
    network.ask(count)
    heads = m.decoder(m.ControllerHead)
    for identity, head_bytes in network.running:
        head = heads.decode(head_bytes)
        first = m.encode(m.Chunk(head.rid, 0, 0, "first", b""))
        network.broker.from_worker(NOW, identity, m.encode(m.WorkerHead(m.FIRST, head.epoch, head.client, head.rid)), first)
    network.running.clear()


def _traced(grow: Callable[[], None], count: int) -> tuple[float, list[tuple[str, float]]]:
    gc.collect()
    before = tracemalloc.take_snapshot()
    grow()
    gc.collect()
    own = f"*{Path(__file__).parent.name}/*"
    ignored = [tracemalloc.Filter(False, tracemalloc.__file__), tracemalloc.Filter(False, own.replace("/*", "/memory.py"))]
    grown = tracemalloc.take_snapshot().filter_traces(ignored).compare_to(before.filter_traces(ignored), "lineno")
    lines = []
    for each in grown[:LINES]:
        frame = each.traceback[0]
        text = linecache.getline(frame.filename, frame.lineno).strip()
        lines.append((f"{Path(frame.filename).name}:{frame.lineno} {text}"[:90], each.size_diff / count))
    return sum(each.size_diff for each in grown) / count, lines
