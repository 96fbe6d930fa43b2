"""`python -m zmqserve.demo`: the main job, small. A controller, two workers with a real model, one question.

The same by hand, in three terminals: README.md.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .client import Client
from .controller import Controller
from .errors import ZmqserveError
from .terminal import figures
from .up import worker_environment

MODEL = "smollm2-135m"
QUESTION = "What is the capital of France, and what is it known for? Answer in two sentences."
WORKERS = 2
MOST_WAIT_S = 300.0


def main(arguments: Sequence[str]) -> int:
    """Run the demo; `arguments` may hold another question."""
    question = " ".join(arguments) or QUESTION
    from .backends import smollm2

    try:
        smollm2.MODEL.fetch()
        with tempfile.TemporaryDirectory(prefix="zmqserve-demo-") as folder:
            return _show(question, Path(folder))
    except ZmqserveError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _show(question: str, folder: Path) -> int:
    began = time.monotonic()
    with Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"], report=lambda *_, **__: None) as controller:
        print(f"controller: clients on {controller.client_endpoints[0]}, workers on {controller.worker_endpoints[0]}")
        print(f"workers:    {WORKERS} starting; importing torch and loading {MODEL} takes some seconds ...", flush=True)
        logs = [(folder / f"worker{number}.log").open("wb+") for number in range(WORKERS)]
        command = [sys.executable, "-m", "zmqserve", "worker", "transformers", "--model", MODEL, "--exit-with-parent", str(os.getpid())]
        command += ["--controller", controller.worker_endpoints[0]]
        shared = worker_environment(WORKERS)
        workers = [subprocess.Popen([*command, "--worker-name", f"demo-{n}"], stderr=log, env=shared) for n, log in enumerate(logs)]
        try:
            with Client(controller.client_endpoints[0]) as client:
                _wait_until_ready(client, workers, [Path(log.name) for log in logs])
                print(f"workers:    {WORKERS} ready after {time.monotonic() - began:.1f} s\n\n> {question}\n", flush=True)
                turns = [{"role": "user", "content": question}]
                with client.chat(MODEL, turns, max_tokens=96, temperature=0.0) as stream:
                    for chunk in stream:
                        print(chunk.text, end="", flush=True)
                print(f"\n\n{figures(stream.completion)}")
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()
            for log in logs:
                log.close()
    return 0


def _wait_until_ready(client: Client, workers: list[subprocess.Popen[bytes]], logs: list[Path]) -> None:
    until = time.monotonic() + MOST_WAIT_S
    while sum(worker.state == "ready" for worker in client.status().workers) < len(workers):
        for worker, log in zip(workers, logs, strict=True):
            if worker.poll() is not None:
                raise ZmqserveError(f"a worker ended with exit code {worker.returncode}; the end of its log:\n{log.read_text()[-2000:]}")
        if time.monotonic() > until:
            raise ZmqserveError(f"the workers were not ready after {MOST_WAIT_S:.0f} s; the end of a log:\n{logs[0].read_text()[-2000:]}")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
