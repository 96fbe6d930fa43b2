"""A controller and a worker, processes of their own, for benchmarks that compare them with something else."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zmqserve import Client

from .ports import free_ports

PATIENCE_S = 300.0
LOOK_S = 0.05


@contextmanager
def model_network(model: str, *options: str, backend: str = "transformers", tcp: bool = False) -> Iterator[str]:
    """Gives the endpoint for clients, once the model is loaded; ``ipc``, or with `tcp` one on loopback."""
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder, Path(folder, "log").open("wb+") as log:
        clients, workers = f"ipc://{folder}/clients", f"ipc://{folder}/workers"
        if tcp:
            clients, workers = (f"tcp://127.0.0.1:{port}" for port in free_ports(2))
        commands = (
            ("controller", "--clients", clients, "--workers", workers),
            ("worker", backend, "--model", model, "--controller", workers, *options),
        )
        processes = [subprocess.Popen([sys.executable, "-m", "zmqserve", *command], stdout=log, stderr=log) for command in commands]
        try:
            with Client(clients, connect_timeout_s=PATIENCE_S) as client:
                until_s = time.monotonic() + PATIENCE_S
                while not any(worker.state == "ready" for worker in client.status().workers):
                    if time.monotonic() > until_s or any(process.poll() is not None for process in processes):
                        raise RuntimeError(f"the worker is not ready:\n{Path(log.name).read_text()}")
                    time.sleep(LOOK_S)
            yield clients
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()
