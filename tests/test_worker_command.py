"""`zmqserve worker` as a process, where that is more than its class: options, and an end that nothing holds up."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from zmqserve import Client, WorkerLost
from zmqserve import messages as m

from .fakes.controller import FakeController
from .processes import CAME, Served, ServedController, installed, zmqserve

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


def test_its_ttl_is_what_it_says() -> None:
    with FakeController() as controller, Served("worker", "echo", "--model", "m", "--ttl", "7.5", "--controller", controller.endpoint):
        assert controller.expect(m.READY, timeout_s=20).message.ttl_ms == 7500


def test_a_ttl_that_is_none_is_a_usage_error() -> None:
    ended = zmqserve("worker", "echo", "--model", "m", "--ttl", "0")
    assert (ended.returncode, ended.stderr) == (2, "zmqserve: ttl_s must be at least 0.01, got 0.0\n")
