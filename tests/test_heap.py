"""What a process that serves holds from its beginning is no work for the garbage collector; a program of the user's is left alone."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests.processes import ANY, PATIENCE_S, ServedController
from zmqserve import Client

WORKER = """
import gc, sys
from zmqserve import BaseModelWorker, Delta, ModelCard, WorkerConfig

class Frozen(BaseModelWorker):
    backend = "frozen"

    def load(self):
        self.heap = [[] for _ in range(100_000)]
        return [ModelCard("m")]

    async def generate(self, job):
        yield Delta(f"{gc.get_freeze_count() >= len(self.heap)}")

worker = Frozen(WorkerConfig(controllers=(sys.argv[1],)))
"""
RUN = "worker.run()"
START = "worker.start(); worker.wait_ended()"

COMMAND = """
import gc, os, signal, sys, threading, time
from zmqserve.cli import main

def watch():
    while not gc.get_freeze_count():
        time.sleep(0.01)
    print("frozen", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=watch, daemon=True).start()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("serve", "frozen"), [(RUN, "True"), (START, "False")], ids=["run", "start"])
def test_a_worker_that_is_all_of_its_process_freezes_what_it_loaded(serve: str, frozen: str) -> None:
    with ServedController() as controller:
        process = subprocess.Popen([sys.executable, "-c", WORKER + serve, controller.workers])
        try:
            with Client(controller.clients) as client:
                controller.wait_for(("worker came", "worker changed"), state="ready")
                assert client.generate("m", "is it frozen?", stream=False).text == frozen
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)


@pytest.mark.parametrize(
    "arguments",
    [
        ("controller", "--clients", ANY, "--workers", ANY),
        ("up", "echo", "--model", "m", "--clients", ANY, "--workers", ANY),
        ("bridge", "--model", "m", "--pull", "tcp://127.0.0.1:9", "--push", "tcp://127.0.0.1:9", "--drain", "0.1"),
    ],
    ids=["controller", "up", "bridge"],
)
def test_a_command_that_serves_freezes_what_it_is_made_of(arguments: tuple[str, ...]) -> None:
    ended = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ended.stdout == "frozen\n", ended.stderr
