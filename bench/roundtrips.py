"""Round trips over inproc, ipc and tcp, side by side: a request of one token, through a controller and an echo worker.

    python -m bench roundtrips [--quick]

Five networks are up at once and take turns, block by block. In `together`, controller, worker and client are threads of this one process
and share its interpreter; `apart`, each is a process of its own (inproc is only possible together). Times in us.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import zmq

from zmqserve import Client, Controller, WorkerConfig
from zmqserve.backends.echo import EchoWorker

from .model_network import PATIENCE_S, model_network
from .result import add_out, print_last_line, progress, table

BLOCK = 100


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("roundtrips", help="round trips over inproc, ipc and tcp")
    parser.add_argument("--quick", action="store_true", help="under a minute, with fewer trips")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    blocks = 5 if args.quick else 30
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="zmqserve-bench-"))
        together = {
            "inproc": ("inproc://clients", "inproc://workers"),
            "ipc": (f"ipc://{folder}/clients", f"ipc://{folder}/workers"),
            "tcp": ("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"),
        }
        clients = {f"{name}, together": stack.enter_context(_together(*endpoints)) for name, endpoints in together.items()}
        for name, tcp in (("ipc", False), ("tcp", True)):
            endpoint = stack.enter_context(model_network("m", backend="echo", tcp=tcp))
            clients[f"{name}, apart"] = stack.enter_context(Client(endpoint))
        spent: dict[str, list[float]] = {name: [] for name in clients}
        for client in clients.values():
            _trips(client, BLOCK)
        for _ in progress(blocks, "round trips"):
            for name, client in clients.items():
                spent[name] += _trips(client, BLOCK)
    figures = {
        name: {"p50_us": round(statistics.median(each) * 1e6, 1), "p99_us": round(statistics.quantiles(each, n=100)[98] * 1e6, 1)}
        for name, each in spent.items()
    }
    print(table(("round trip, us", "p50", "p99"), [(name, *(f"{value:.0f}" for value in each.values())) for name, each in figures.items()]))
    print_last_line("roundtrips", {"trips": blocks * BLOCK}, args.out, figures=figures)
    return 0


@contextmanager
def _together(clients: str, workers: str) -> Iterator[Client]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    controller = Controller(clients=[clients], workers=[workers], context=context, report=lambda *_args, **_fields: None)
    controller.start()
    worker = EchoWorker(WorkerConfig(model="m", controllers=tuple(controller.worker_endpoints), context=context))
    try:
        with worker, Client(controller.client_endpoints[0], context=context) as client:
            worker.wait_ready(PATIENCE_S)
            yield client
    finally:
        controller.stop()
        context.term()


def _trips(client: Client, count: int) -> list[float]:
    spent: list[float] = []
    for _ in range(count):
        began_s = time.perf_counter()
        client.generate("m", "x", stream=False, max_tokens=1)
        spent.append(time.perf_counter() - began_s)
    return spent
