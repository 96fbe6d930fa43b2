"""A worker comes, is lost and found, and goes: over real sockets, against a controller that the test plays."""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
import zmq
from structlog.testing import LogCapture
from structlog.typing import EventDict

from zmqserve import linkport, linkthread
from zmqserve import messages as m
from zmqserve.errors import (
    InvalidParameter,
    ModelLoading,
    Refused,
)
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.sockets import SNDMORE
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .fakes.controller import FakeController, chunks_of, text_of
from .fakes.gated import Gated
from .fakes.workers import WAIT_S, ScriptWorker, config, endless, generate, serving

LONG_ANSWER = 2**24
"""Characters: more than kernels hold of a connection."""


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with FakeController() as fake:
        yield fake


def test_beats_while_it_loads_and_is_ready_after(controller: FakeController) -> None:
    gate = threading.Event()
    worker = ScriptWorker(config(controller, slots=3, speed=2.0, ttl_s=0.15, served_name="served"), endless, load=gate.wait)
    worker.start()
    try:
        got = controller.expect(m.READY)
        loading = got.message
        assert (loading.state, loading.slots, [card.name for card in loading.models]) == ("loading", 0, ["served"])
        assert (loading.name, loading.backend, loading.speed, loading.ttl_ms) == (worker.name, "script", 2.0, 150)
        controller.welcome(got)
        for _ in range(3):
            controller.expect(m.LOAD)
        controller.request(generate(1))
        assert controller.expect(m.BUSY).head == m.WorkerHead(m.BUSY, controller.epoch, 1, 1)
        controller.request(m.CountTokens(2, "served", prompt="a"))
        assert controller.expect(m.FAILED).message.code == ModelLoading.code
        gate.set()
        got = controller.expect(m.READY)
        ready = got.message
        assert got.head.epoch == controller.epoch, "the registration goes on"
        assert (ready.state, ready.slots) == ("ready", 3)
        assert ready.models == [m.ModelCard("served", context_length=100, verbs=["generate", "model_details"])]
        with pytest.raises(TimeoutError, match="no controller"):
            worker.wait_ready(0.05)
        controller.welcome(got)
        worker.wait_ready(WAIT_S)
    finally:
        gate.set()
        worker.stop()
    assert worker.closed.is_set()


def test_the_directory_that_its_model_lies_in_may_go(controller: FakeController, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "m").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    gate = threading.Event()
    worker = ScriptWorker(config(controller, model="./m"), endless, load=gate.wait)
    worker.start()
    try:
        controller.welcome(controller.expect(m.READY))
        shutil.rmtree(tmp_path / "here")
        controller.send(m.ControllerHead(m.REREGISTER, 5))
        again = controller.expect(m.READY)
        assert [card.name for card in again.message.models] == ["m"]
        controller.welcome(again)
        gate.set()
        assert [card.name for card in controller.register().models] == ["m"]
    finally:
        gate.set()
        worker.stop()


def test_a_load_that_fails_ends_the_worker_with_its_error(controller: FakeController) -> None:
    gate = threading.Event()

    def fail() -> None:
        gate.wait(WAIT_S)
        raise OSError("no such model")

    worker = ScriptWorker(config(controller), load=fail)
    worker.start()
    controller.welcome(controller.expect(m.READY))
    controller.expect(m.LOAD)
    gate.set()
    controller.expect(m.BYE)
    with pytest.raises(OSError, match="no such model"):
        worker.wait_ready(WAIT_S)
    worker.stop()
    assert isinstance(worker.failure, OSError)
    assert not worker.closed.is_set()


def test_stopped_during_the_load_it_closes_what_was_loaded_later(controller: FakeController) -> None:
    gate = threading.Event()
    worker = ScriptWorker(config(controller), load=gate.wait)
    worker.start()
    worker.stop()
    assert not worker.closed.is_set()
    with pytest.raises(RuntimeError, match="stopped before 'm' was loaded"):
        worker.wait_ready(0)
    gate.set()
    assert worker.closed.wait(WAIT_S)


def test_refused_for_good_by_all_its_controllers_it_raises(controller: FakeController) -> None:
    with FakeController() as other:
        worker = ScriptWorker(config(controller, other), endless)
        worker.start()
        refusal = m.encode(m.Refused(40103, "a loop"))
        got = controller.expect(m.READY)
        controller.send(m.ControllerHead(m.REFUSED, 0), refusal, to=got.identity)
        other.register()
        other.request(generate(1))
        other.expect(m.FIRST)
        other.send(m.ControllerHead(m.REFUSED, 0), refusal)
        with pytest.raises(Refused, match=r"refused worker script-.*: a loop"):
            worker.wait_ended(WAIT_S)


def test_refused_for_now_it_tries_again(controller: FakeController) -> None:
    worker = ScriptWorker(config(controller), endless)
    worker.start()
    try:
        got = controller.expect(m.READY)
        controller.send(m.ControllerHead(m.REFUSED, 0), m.encode(m.Refused(40000, "name taken", 1)), to=got.identity)
        assert controller.register().state == "ready"
    finally:
        worker.stop()


def test_the_heartbeat_tells_that_the_engine_hangs(controller: FakeController) -> None:
    gate = threading.Event()

    async def hang(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("first")
        gate.wait(WAIT_S)

    with serving(ScriptWorker(config(controller, ttl_s=0.06), hang), controller):
        controller.expect(m.LOAD, where=lambda got: got.message.step_age_ms == 0 and got.message.running == 0)
        controller.request(generate(1))
        controller.expect(m.FIRST)
        ages = [controller.expect(m.LOAD).message.step_age_ms for _ in range(6)]
        gate.set()
        assert ages == sorted(ages)
        assert ages[-1] > 50
        controller.expect(m.DONE)
        controller.expect(m.LOAD, where=lambda got: got.message.step_age_ms == 0)


def test_a_controller_that_comes_back_has_its_worker_back(controller: FakeController) -> None:
    ended = threading.Event()

    async def until_aborted(job: GenerateJob) -> AsyncIterator[Delta]:
        try:
            yield Delta("first")
            await asyncio.Event().wait()
        finally:
            ended.set()

    with serving(ScriptWorker(config(controller), until_aborted), controller):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        former = controller.epoch
        controller.unbind()
        assert ended.wait(WAIT_S), "it has forgotten what ran for it"
        controller.epoch = 0
        controller.bind(controller.endpoint)
        again = controller.receive()
        assert (again.head.kind, again.head.epoch) == (m.READY, 0)
        controller.welcome(again)
        assert controller.expect(m.LOAD).message.running == 0
        controller.request(generate(2))
        assert controller.expect(m.FIRST).head.epoch == controller.epoch != former


def test_a_controller_that_forgot_its_worker_and_kept_the_connection_is_told_again(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller, ttl_s=0.3), endless), controller):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        former = controller.epoch
        controller.send(m.ControllerHead(m.REREGISTER, 5))
        again = controller.expect(m.READY)
        assert again.head.epoch == 5
        controller.welcome(again)
        controller.request(generate(2))
        assert controller.expect(m.FIRST).head.epoch == controller.epoch != former
        assert controller.expect(m.LOAD).message.running == 1


def test_a_controller_that_dies_or_was_never_there_does_not_disturb_the_others(controller: FakeController) -> None:
    with FakeController() as dies, FakeController() as absent:
        absent.unbind()
        worker = ScriptWorker(config(absent, controller, dies, slots=2, ttl_s=60), endless)
        with serving(worker, controller, dies):
            controller.request(generate(1))
            controller.expect(m.FIRST)
            dies.request(generate(2))
            dies.expect(m.FIRST)
            controller.expect(m.LOAD, where=lambda got: got.message.running == 2)
            controller.request(generate(3))
            assert controller.expect(m.BUSY).head.rid == 3
            dies.unbind()
            controller.expect(m.LOAD, where=lambda got: (got.message.running, got.message.yours) == (1, 1))
            controller.request(generate(4))
            assert controller.expect(m.FIRST).head.rid == 4
            controller.cancel(1)
            assert controller.expect(m.DONE).head.rid == 1
        assert worker.failure is None


def test_nothing_of_an_old_epoch_is_sent_or_taken(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller, ttl_s=0.3), endless), controller) as worker:
        controller.request(generate(1))
        controller.expect(m.FIRST)
        controller.send(m.ControllerHead(m.REREGISTER, 5))
        controller.request(generate(2))
        former = controller.epoch
        controller.welcome(controller.expect(m.READY))
        controller.send(m.ControllerHead(m.REQUEST, former, 1, 3), m.encode(generate(3)))
        controller.request(generate(4))
        assert controller.expect(m.FIRST).head.rid == 4
        controller.expect(m.LOAD, where=lambda got: (got.message.running, got.message.yours) == (1, 1))
        assert repr(worker).startswith("ScriptWorker('script-")


def test_two_controllers_share_its_slots_and_hear_of_each_other_at_once(controller: FakeController) -> None:
    with FakeController() as other, serving(ScriptWorker(config(controller, other, slots=1, ttl_s=60), endless), controller, other):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        assert other.expect(m.LOAD, where=lambda got: got.message.running == 1).message.yours == 0
        other.request(generate(2))
        assert other.expect(m.BUSY).head.rid == 2
        controller.cancel(1)
        controller.expect(m.DONE)
        assert other.expect(m.LOAD, where=lambda got: got.message.running == 0).message.yours == 0
        other.request(generate(3))
        assert other.expect(m.FIRST).head.rid == 3


def gated(gates: list[Callable[[], object]], *last: Delta) -> Callable[[GenerateJob], AsyncIterator[Delta]]:
    """A script that says one word and goes on to the `last` when its gate, which it adds to `gates`, is opened."""

    async def script(job: GenerateJob) -> AsyncIterator[Delta]:
        gate = asyncio.Event()
        loop = asyncio.get_running_loop()
        gates.append(lambda: loop.call_soon_threadsafe(gate.set))
        yield Delta("first")
        await gate.wait()
        for delta in last:
            yield delta

    return script


def test_draining_finishes_what_runs_and_says_goodbye(controller: FakeController) -> None:
    gates: list[Callable[[], object]] = []
    worker = ScriptWorker(config(controller), gated(gates, Delta("last")))
    with serving(worker, controller):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        worker.drain()
        controller.expect(m.DRAINING)
        controller.request(generate(2))
        assert controller.expect(m.BUSY).head.rid == 2
        gates[0]()
        assert text_of(controller.answer_of(1), 1) == "last"
        controller.expect(m.BYE)
        assert worker.closed.wait(WAIT_S)
    assert worker.failure is None


def test_a_controller_may_drain_it_and_the_rest_is_aborted_after_the_grace(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller), endless), controller) as worker:
        controller.request(generate(1))
        controller.expect(m.FIRST)
        controller.send(m.ControllerHead(m.DRAIN, controller.epoch, deadline_ms=50))
        controller.expect(m.DRAINING)
        controller.expect(m.BYE)
    assert worker.failure is None


@contextmanager
def leaving(controller: FakeController, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BaseModelWorker, Gated]]:
    """A worker that was drained and has answered: it ends as soon as the answer has left, and its link takes nothing."""
    monkeypatch.setattr(linkthread, "LINGER_MS", 0)
    answered, closed = threading.Event(), threading.Event()
    close = linkport.LinkPort.close

    async def answer(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("x" * LONG_ANSWER)
        answered.set()

    def closes(port: linkport.LinkPort, linger_ms: int) -> None:
        close(port, linger_ms)
        closed.set()

    monkeypatch.setattr(linkport.LinkPort, "close", closes)
    with Gated(controller.endpoint) as link:
        worker = ScriptWorker(config(controller, controllers=(link.endpoint,), grace_s=600.0), answer)
        worker.start()
        try:
            controller.register(ttl_ms=600_000)
            link.shut()
            controller.request(generate(1))
            assert answered.wait(WAIT_S)
            worker.drain()
            assert closed.wait(WAIT_S)
            yield worker, link
        finally:
            worker.stop()


def test_what_is_finished_leaves_within_the_grace_however_slow_the_link(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leaving(controller, monkeypatch) as (worker, link):
        with pytest.raises(TimeoutError, match="has not ended"):
            worker.wait_ended(0.1)
        link.open()
        assert len(controller.expect(m.FIRST).message.text) == LONG_ANSWER
        controller.expect(m.DONE, m.DRAINING)
        controller.expect(m.DONE, m.DRAINING)
        controller.expect(m.BYE)
        worker.wait_ended(WAIT_S)
    assert worker.failure is None


def test_one_that_is_stopped_does_not_wait_for_what_leaves(controller: FakeController, monkeypatch: pytest.MonkeyPatch) -> None:
    with leaving(controller, monkeypatch) as (worker, _):
        worker.stop()
        worker.wait_ended(0)
    assert worker.failure is None


def _recorded(monkeypatch: pytest.MonkeyPatch, logger: str) -> MutableSequence[EventDict]:
    """What `logger` says from here on."""
    capture = LogCapture()
    monkeypatch.setattr(logger, structlog.wrap_logger(None, processors=[capture], wrapper_class=structlog.stdlib.BoundLogger))
    return capture.entries


@pytest.mark.parametrize("answers_wait", [False, True])
def test_draining_does_not_wait_for_a_controller_that_is_not_there(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch, answers_wait: bool
) -> None:
    lines = _recorded(monkeypatch, "zmqserve.workload.log")
    gates: list[Callable[[], object]] = []
    worker = ScriptWorker(config(controller, grace_s=60.0), gated(gates))
    worker.start()
    try:
        controller.register(ttl_ms=1000)
        if answers_wait:
            controller.request(generate(1))
            controller.expect(m.FIRST)
        controller.unbind()
        worker.drain()
        for gate in gates:
            with suppress(RuntimeError):  # its loop is closed: it has noticed, and ended already
                gate()
        worker.wait_ended(WAIT_S)
    finally:
        worker.stop()
        controller.bind(controller.endpoint)
    assert worker.failure is None
    assert "controller silent" not in {line["event"] for line in lines}


def test_a_worker_and_its_controller_in_one_process_find_each_other_again() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    settings = WorkerConfig(model="m", controllers=("inproc://workers",), context=context)
    with FakeController("inproc://workers", context=context) as controller, serving(ScriptWorker(settings, endless), controller):
        for rid in (1, 2):
            controller.unbind()
            controller.epoch = 0
            controller.bind("inproc://workers")
            controller.register(ttl_ms=300)
            controller.request(generate(rid))
            assert controller.expect(m.FIRST, m.READY, where=lambda got: got.head.kind == m.FIRST).head.rid == rid
    context.term()


def test_a_connection_that_breaks_within_a_message_costs_neither_the_message_nor_the_worker(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks = [True, True]

    def breaking(socket: zmq.Socket[bytes]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """As libzmq does: the second part of a message says EAGAIN, and the first is forgotten."""
        heads: list[bytes] = []

        def send(data: bytes, flags: int) -> None:
            if flags == SNDMORE:
                heads.append(data)
                return
            head = heads.pop()
            if breaks:
                breaks.pop()
                raise zmq.Again
            socket.send(head, SNDMORE)
            socket.send(data, flags)

        return socket.recv, send

    monkeypatch.setattr(linkport, "raw_calls", breaking)
    with serving(ScriptWorker(config(controller), endless), controller) as worker:
        controller.request(generate(1))
        assert controller.expect(m.FIRST).head.rid == 1
        assert not breaks
    assert worker.failure is None


@pytest.mark.parametrize(("error", "traced"), [(InvalidParameter("no such file"), False), (OSError("no such file"), True)])
def test_only_what_is_unexpected_in_a_load_is_logged_with_its_trace(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch, error: Exception, traced: bool
) -> None:
    def fail() -> None:
        raise error

    lines = _recorded(monkeypatch, "zmqserve.worker.log")
    worker = ScriptWorker(config(controller), load=fail)
    with pytest.raises(type(error)):
        worker.run()
    (line,) = lines
    assert line["event"] == "load failed"
    assert bool(line.get("exc_info")) is traced
    assert (line.get("why") == "no such file") is not traced


def test_a_worker_whose_context_is_terminated_ends(controller: FakeController) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    worker = ScriptWorker(config(controller, context=context), endless)
    with serving(worker, controller):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        context.term()
        worker.wait_ended(WAIT_S)
    assert worker.failure is None


def process(controller: FakeController, *, grace_s: float = 30.0, **options: Any) -> subprocess.Popen[bytes]:
    """An EchoWorker in a process of its own."""
    settings = f"model='m', controllers=({controller.endpoint!r},), ttl_s=0.3, grace_s={grace_s}"
    code = (
        "from zmqserve.backends.echo import EchoWorker\n"
        "from zmqserve.worker import WorkerConfig\n"
        f"EchoWorker(WorkerConfig({settings}), **{options!r}).run()\n"
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_the_process_and_it_exits_with_0(controller: FakeController, number: signal.Signals) -> None:
    with process(controller, delay_per_token_s=0.01) as worker:
        try:
            controller.register(timeout_s=30)
            controller.request(generate(1, max_tokens=30))
            controller.expect(m.FIRST)
            worker.send_signal(number)
            got = [controller.expect(m.MORE, m.DRAINING, m.DONE)]
            while got[-1].head.kind != m.DONE:
                got.append(controller.expect(m.MORE, m.DRAINING, m.DONE))
            assert m.DRAINING in {each.head.kind for each in got}
            assert len(chunks_of(got, 1)) == 29
            controller.expect(m.BYE)
            assert worker.wait(WAIT_S) == 0
        finally:
            worker.kill()


def _blocks(process: int, thread: int, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process}/task/{thread}/status").read_text()
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) & 1 << number - 1)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have ids of their own only there")
def test_a_signal_that_another_thread_gets_drains_the_process_too(controller: FakeController) -> None:
    """Which thread gets it is the kernel's choice, and Python runs handlers in the main thread only, when that wakes up."""
    with process(controller) as worker:
        try:
            controller.register(timeout_s=30)
            # The oldest beside the main thread lives as long as the worker; libzmq's take no signals.
            others = sorted({int(name) for name in os.listdir(f"/proc/{worker.pid}/task")} - {worker.pid})
            thread = next(each for each in others if not _blocks(worker.pid, each, signal.SIGTERM))
            assert ctypes.CDLL(None).tgkill(worker.pid, thread, signal.SIGTERM) == 0
            controller.expect(m.DRAINING)
            controller.expect(m.BYE)
            assert worker.wait(WAIT_S) == 0
        finally:
            worker.kill()


def test_what_still_runs_after_the_grace_is_left_to_the_controllers_and_that_is_no_failure(controller: FakeController) -> None:
    with process(controller, grace_s=0.1, delay_per_token_s=60.0) as worker:
        try:
            controller.register(timeout_s=30)
            controller.request(generate(1))
            controller.expect(m.FIRST)
            worker.send_signal(signal.SIGTERM)
            controller.expect(m.DRAINING)
            controller.request(generate(2))
            assert controller.expect(m.BUSY).head.rid == 2
            controller.expect(m.BYE)
            assert worker.wait(WAIT_S) == 0
        finally:
            worker.kill()


def test_a_second_interrupt_ends_at_once(controller: FakeController) -> None:
    with process(controller, delay_per_token_s=60.0) as worker:
        try:
            controller.register(timeout_s=30)
            controller.request(generate(1))
            controller.expect(m.FIRST)
            worker.send_signal(signal.SIGINT)
            controller.expect(m.DRAINING)
            worker.send_signal(signal.SIGINT)
            controller.expect(m.BYE)
            assert worker.wait(WAIT_S) == 0
        finally:
            worker.kill()


def test_the_faults_die_and_hang(controller: FakeController) -> None:
    with process(controller, faults=True) as worker:
        try:
            controller.register(timeout_s=30)
            controller.request(generate(1, "a !hang"))
            controller.expect(m.FIRST)
            controller.expect(m.LOAD, where=lambda got: got.message.step_age_ms > 200)
        finally:
            worker.kill()
    with process(controller, faults=True) as worker:
        try:
            controller.epoch = 0
            controller.register(timeout_s=30)
            controller.request(generate(1, "!die"))
            assert worker.wait(WAIT_S) == 70
        finally:
            worker.kill()


@pytest.mark.parametrize(
    "settings",
    [
        {"controllers": ()},
        {"controllers": "tcp://127.0.0.1:1"},
        {"slots": 0},
        {"speed": 0.0},
        {"ttl_s": 0.0},
        {"grace_s": -1.0},
        {"name": ""},
        {"name": "half a pair \ud800"},
        {"served_name": "\udc80"},
        {"model": "\udc80"},
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter, match=next(iter(settings))):
        WorkerConfig(**settings)


def test_a_worker_starts_once(controller: FakeController) -> None:
    worker = ScriptWorker(config(controller), endless)
    worker.stop()
    worker.start()
    worker.stop()
    worker.stop()
    with pytest.raises(RuntimeError, match="was started before"):
        worker.start()
