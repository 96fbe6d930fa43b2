"""`zmqserve worker` as a process, where that is more than its class: options, and an end that nothing holds up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zmqserve import Client, WorkerLost
from zmqserve import messages as m

from .fakes.controller import FakeController
from .processes import CAME, PATIENCE_S, Served, ServedController, installed, zmqserve

HANGING = """
import asyncio
import threading
from zmqserve import BackendError, BaseModelWorker, Delta, ModelCard, worker

worker.ENGINE_JOIN_S = 0.1

class Worker(BaseModelWorker):
    backend = "hanging"

    def load(self):
        return [ModelCard("m")]

    async def generate(self, job):
        yield Delta("begun")
        if job.request.prompt != "hang":
            self._fail({"break": BackendError("no more of it"), "crash": OSError("worse")}[job.request.prompt])
        await asyncio.to_thread(threading.Event().wait)
"""

LOADING = """
import threading
from concurrent.futures import ThreadPoolExecutor
from zmqserve import BackendError, BaseModelWorker

class Worker(BaseModelWorker):
    backend = "loading"

    def load(self):
        if self.config.model == "break":
            self._fail(BackendError("no more of it"))
        with ThreadPoolExecutor() as pool:
            pool.submit(threading.Event().wait)
"""


@pytest.mark.parametrize(
    ("prompt", "code", "last"),
    [("hang", 0, ""), ("break", 1, "zmqserve: no more of it\n"), ("crash", 1, "OSError: worse\n")],
)
def test_a_thread_that_hangs_does_not_hold_the_end_up(tmp_path: Path, prompt: str, code: int, last: str) -> None:
    env = installed(tmp_path, "hanging", HANGING)
    with ServedController() as controller:
        options = ("--model", "m", "--grace", "0", "--controller", controller.workers)
        with Served("worker", "hanging", *options, env=env) as worker, Client(controller.clients) as client:
            controller.wait_for(CAME, state="ready")
            stream = client.generate("m", prompt, resume=False)
            assert next(stream).text == "begun"
            if prompt == "hang":
                worker.send(signal.SIGTERM)
            worker.wait_for("engine does not end: leaving it")
            assert worker.end(signal.SIGCONT) == code
            assert (last or "leaving it") in worker.output[-1]
            with pytest.raises(WorkerLost):
                stream.text()


@pytest.mark.parametrize(("model", "code", "last"), [("m", 0, "draining"), ("break", 1, "zmqserve: no more of it\n")])
def test_a_load_in_threads_of_its_own_does_not_hold_the_end_up(tmp_path: Path, model: str, code: int, last: str) -> None:
    env = installed(tmp_path, "loading", LOADING)
    options = ("--model", model, "--controller")
    with FakeController() as controller, Served("worker", "loading", *options, controller.endpoint, env=env) as worker:
        if model == "m":
            controller.welcome(controller.expect(m.READY, timeout_s=20))
            worker.wait_for("registered", state="loading")
        assert worker.end(signal.SIGCONT if code else signal.SIGTERM) == code
        assert last in worker.output[-1]


def test_a_load_does_not_hold_up_the_end_of_one_whose_words_nobody_reads(tmp_path: Path) -> None:
    env = {**os.environ, **installed(tmp_path, "loading", LOADING)}
    reads, writes = os.pipe()
    os.close(reads)
    with FakeController() as controller, os.fdopen(writes, "w") as words:
        command = [sys.executable, "-m", "zmqserve", "worker", "loading", "--model", "break", "--controller", controller.endpoint]
        with subprocess.Popen(command, stderr=words, env=env) as worker:
            try:
                assert worker.wait(PATIENCE_S) == 1
            finally:
                worker.kill()


def test_what_ends_it_is_its_last_line(tmp_path: Path) -> None:
    """Also when lines were logged just before: those leave by a thread of their own, some time later."""
    source = """
from zmqserve import BackendError, BaseModelWorker
from zmqserve.logs import Logger

class Worker(BaseModelWorker):
    backend = "logging"

    def load(self):
        Logger("here").info("just before")
        raise BackendError("no more of it")

    def run(self):
        self.load()
"""
    env = installed(tmp_path, "logging_backend", source)
    with Served("worker", "logging_backend", "--model", "m", env=env) as worker:
        worker.wait_for("just before")
        assert worker.end(signal.SIGCONT) == 1
        assert worker.output[-1] == "zmqserve: no more of it\n"


def test_its_ttl_is_what_it_says() -> None:
    with FakeController() as controller, Served("worker", "echo", "--model", "m", "--ttl", "7.5", "--controller", controller.endpoint):
        assert controller.expect(m.READY, timeout_s=20).message.ttl_ms == 7500


@pytest.mark.parametrize(("given", "shown"), [("0", "0.0"), ("1e7", "10000000.0")])
def test_a_ttl_that_is_none_is_a_usage_error(given: str, shown: str) -> None:
    ended = zmqserve("worker", "echo", "--model", "m", "--ttl", given)
    assert (ended.returncode, ended.stderr) == (2, f"zmqserve: ttl_s must be from 0.01 to 1e6, got {shown}\n")
