"""What the Python clients add to a token's way, beside a bare socket that receives the same messages.

    python -m bench latency [--quick]

One process sends an answer's chunks at a steady pace, each with the time at which it was sent, over a DEALER; a client here notes when
it has each. The arms differ only in who receives: `bare` is a DEALER's `recv`, without decoding; the others are the SDK's clients,
which hand a decoded chunk to their caller. There is no controller between them. They take turns, answer by answer. Times are in us:
`token` is from send to hand, `first` from the request to its first chunk. `reader thread` is what Client would be with a thread between
the socket and its caller: one that receives and decodes, and a queue. In the last line: medians and 99th percentiles of each arm, and
`added`, what each adds to the bare socket's.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import zmq

from zmqserve import AsyncClient, Client, PolledClient
from zmqserve import messages as m

from .result import add_out, print_last_line, progress, rounded, table

Answer = tuple[float, list[float]]
"""Seconds to the first chunk, and of each later one from send to hand."""

_spawn = multiprocessing.get_context("spawn")


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("latency", help="what the clients add to a token's way, beside a bare DEALER")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer answers")
    parser.add_argument("--pace", type=float, default=0.002, metavar="S", help="between two tokens (default 0.002)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    answers, tokens = (20, 50) if args.quick else (60, 200)
    pipe, theirs = _spawn.Pipe()
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder, asyncio.Runner() as runner:
        names = ["bare", "Client", "reader thread", "AsyncClient", "PolledClient"]
        endpoints = {name: f"ipc://{folder}/{name}" for name in names}
        process = _spawn.Process(target=_sender, args=(theirs, list(endpoints.values()), tokens, args.pace), daemon=True)
        process.start()
        pipe.recv()
        context = zmq.Context()
        bare = context.socket(zmq.DEALER)
        bare.connect(endpoints["bare"])
        reader = _Reader(context, endpoints["reader thread"])
        client, later, polled = (
            Client(endpoints["Client"]),
            AsyncClient(endpoints["AsyncClient"]),
            PolledClient(endpoints["PolledClient"]),
        )
        arms: dict[str, Callable[[], Answer]] = {
            "bare": lambda: _bare(bare),
            "Client": lambda: _blocking(client),
            "reader thread": reader.answer,
            "AsyncClient": lambda: runner.run(_awaiting(later)),
            "PolledClient": lambda: _polling(polled),
        }
        firsts: dict[str, list[float]] = {name: [] for name in names}
        ways: dict[str, list[float]] = {name: [] for name in names}
        for arm in arms.values():
            arm()
        for _ in progress(answers, "latency"):
            for name, arm in arms.items():
                first_s, way_s = arm()
                firsts[name].append(first_s * 1e6)
                ways[name] += [each * 1e6 for each in way_s]
        client.close()
        polled.close()
        runner.run(later.close())
        bare.close(0)
        process.kill()
        process.join()
    figures = {
        name: {
            "token_p50_us": statistics.median(ways[name]),
            "token_p99_us": statistics.quantiles(ways[name], n=100)[98],
            "first_p50_us": statistics.median(firsts[name]),
            "first_max_us": max(firsts[name]),
        }
        for name in names
    }
    added = {name: {key: figures[name][key] - figures["bare"][key] for key in figures[name]} for name in names[1:]}
    rows = [(name, *(f"{value:.0f}" for value in each.values())) for name, each in figures.items()]
    print(table(("us", "token p50", "p99", "first p50", "max"), rows))
    print_last_line(
        "latency",
        {"answers": answers, "tokens": tokens, "pace_s": args.pace},
        args.out,
        figures={name: rounded(each, 1) for name, each in figures.items()},
        added={name: rounded(each, 1) for name, each in added.items()},
    )
    return 0


# --- who receives ------------------------------------------------------------------------------


def _bare(socket: zmq.Socket[bytes]) -> Answer:
    began_s = time.monotonic()
    socket.send(m.encode(m.Generate(1, "m", prompt="x")))
    socket.recv()
    first_s = time.monotonic() - began_s
    ways: list[float] = []
    decode = m.decoder(m.ToClient).decode
    while True:
        payload = socket.recv()
        now = time.monotonic()
        # Decoded when its time was taken: the bare socket's caller gets bytes.
        message = decode(payload)
        if isinstance(message, m.Done):
            return first_s, ways
        ways.append(now - float(message.text))


class _Reader:
    """A thread that has the socket; a request goes to it through a queue, too, since a socket is for one thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.connect(endpoint)
        self._asked: SimpleQueue[bytes] = SimpleQueue()
        self._came: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def answer(self) -> Answer:
        began_s = time.monotonic()
        self._asked.put(m.encode(m.Generate(1, "m", prompt="x")))
        self._came.get()
        first_s = time.monotonic() - began_s
        ways: list[float] = []
        while not isinstance(message := self._came.get(), m.Done):
            ways.append(time.monotonic() - float(message.text))
        return first_s, ways

    def _run(self) -> None:
        decode = m.decoder(m.ToClient).decode
        while True:
            self._socket.send(self._asked.get())
            message: Any = None
            while not isinstance(message, m.Done):
                message = decode(self._socket.recv())
                self._came.put(message)


def _blocking(client: Client) -> Answer:
    began_s = time.monotonic()
    ways: list[float] = []
    for chunk in client.generate("m", "x"):
        ways.append(time.monotonic() - float(chunk.text))
        if chunk.seq == 0:
            first_s = time.monotonic() - began_s
    return first_s, ways[1:]


async def _awaiting(client: AsyncClient) -> Answer:
    began_s = time.monotonic()
    ways: list[float] = []
    async for chunk in client.generate("m", "x"):
        ways.append(time.monotonic() - float(chunk.text))
        if chunk.seq == 0:
            first_s = time.monotonic() - began_s
    return first_s, ways[1:]


def _polling(client: PolledClient) -> Answer:
    poller = zmq.Poller()
    poller.register(client, zmq.POLLIN)
    began_s = time.monotonic()
    ways: list[float] = []
    stream = client.generate("m", "x")
    while not stream.done:
        poller.poll(client.wait_ms())
        client.process()
        for chunk in stream.take():
            ways.append(time.monotonic() - float(chunk.text))
            if chunk.seq == 0:
                first_s = time.monotonic() - began_s
    return first_s, ways[1:]


# --- who sends, in a process of its own --------------------------------------------------------


def _sender(ready: Connection, endpoints: list[str], tokens: int, pace_s: float) -> None:
    """For each endpoint a controller that knows one client. Runs until it is killed."""
    context = zmq.Context()
    poller = zmq.Poller()
    decode = m.decoder(m.FromClient).decode
    for endpoint in endpoints:
        socket = context.socket(zmq.DEALER)
        socket.bind(endpoint)
        poller.register(socket, zmq.POLLIN)
    ready.send("ready")
    while True:
        for socket, _ in poller.poll():
            asked = decode(socket.recv())
            if isinstance(asked, m.Hello):
                socket.send(m.encode(m.Welcome(m.PROTOCOL, "bench", m.Limits())))
            elif isinstance(asked, m.Ping):
                socket.send(m.encode(m.Pong("bench", [])))
            elif isinstance(asked, m.Generate):
                _send_answer(socket, asked.rid, tokens, pace_s)


def _send_answer(socket: zmq.Socket[bytes], rid: int, tokens: int, pace_s: float) -> None:
    for seq in range(tokens):
        if seq:
            time.sleep(pace_s)
        kind = m.Chunk if seq else m.FirstChunk
        socket.send(m.encode(kind(rid, seq, 0, repr(time.monotonic()), b"\1\0\0\0")))
    time.sleep(pace_s)
    usage, timings = m.Usage(1, tokens), m.Timings("bench", 0.0, 0.0, 0.0)
    socket.send(m.encode(m.Done(rid, tokens, ["length"], usage, timings)))
