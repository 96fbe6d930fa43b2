"""What dies, hangs or does not read, with real processes: whatever it held is free again in time, and everybody else goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqserve import Client, DeadlineExceeded, Overloaded, WorkerLost
from zmqserve import messages as m
from zmqserve.params import SamplingParams

from .processes import PATIENCE_S, Served, ServedController, eventually, network

ENDLESS = 1_000_000
_to_client = m.decoder(m.ToClient).decode


@contextmanager
def configured(
    path: Path, *names: str, arguments: tuple[str, ...] = (), **settings: Any
) -> Iterator[tuple[ServedController, dict[str, Served]]]:
    """A network whose controller has these settings."""
    file = path / "controller.toml"
    file.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    with network(*names, worker_arguments=arguments, controller_arguments=("--config", str(file))) as pair:
        yield pair


@contextmanager
def streaming(endpoint: str, count: int) -> Iterator[subprocess.Popen[bytes]]:
    """A client process with so many streams, all of which have begun."""
    command = [sys.executable, "-m", "tests.streaming_client", endpoint, str(count)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"streaming\n"
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()


def idle(client: Client) -> bool:
    """Nothing runs or waits, and every slot is free."""
    status = client.status()
    return not (status.running or status.waiting or status.clients) and all(w.free == w.slots for w in status.workers)


@contextmanager
def proxied(backend: str) -> Iterator[str]:
    """A `zmq.proxy` before a controller; its endpoint."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front, back, control = context.socket(zmq.ROUTER), context.socket(zmq.DEALER), context.socket(zmq.PAIR)
    for socket in (front, back, control):
        socket.setsockopt(zmq.LINGER, 0)
    port = front.bind_to_random_port("tcp://127.0.0.1")
    back.connect(backend)
    control.bind("inproc://control")
    thread = threading.Thread(target=zmq.proxy_steerable, args=(front, back, None, control), name="proxy")
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        with context.socket(zmq.PAIR) as steer:
            steer.connect("inproc://control")
            steer.send(b"TERMINATE")
            thread.join(PATIENCE_S)
        for socket in (front, back, control):
            socket.close()
        context.term()


# --- clients


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_client_with_a_hundred_streams_that_dies_or_stops_frees_its_slots(number: signal.Signals) -> None:
    """The killed one is found by the next chunk, the stopped one by its silence (3 s)."""
    with (
        network("w", worker_arguments=("--delay-per-token", "0.1")) as (controller, _),
        Client(controller.clients) as client,
        streaming(controller.clients, 100) as process,
    ):
        assert client.status().running == 100
        process.send_signal(number)
        eventually(lambda: idle(client), PATIENCE_S, "its slots are free")
        assert client.generate("m", "still here", stream=False).text == "still here"


def test_a_client_that_dies_behind_a_proxy_is_given_up_when_it_has_been_silent() -> None:
    """The proxy lives, so no send fails: what its controller has is the missing Pings."""
    with (
        network("w", worker_arguments=("--delay-per-token", "0.1")) as (controller, _),
        Client(controller.clients) as client,
        proxied(controller.clients) as endpoint,
        Client(endpoint) as neighbour,
    ):
        other = neighbour.generate("m", "a b", max_tokens=ENDLESS)
        with streaming(endpoint, 5) as process:
            assert client.status().running == 6
            process.send_signal(signal.SIGKILL)
            eventually(lambda: client.status().running == 1, PATIENCE_S, "its slots are free")
        next(other)
        other.close()
        eventually(lambda: idle(client), PATIENCE_S, "all is idle")


def test_a_client_that_does_not_read_is_let_go_of_and_nobody_else_notices(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/c.ipc"
    config = tmp_path / "controller.toml"
    config.write_text("outbox_bytes = 100000\n")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with ServedController(endpoint, "tcp://127.0.0.1:*", "--config", str(config)) as controller, controller.echo("w"):
        controller.wait_ready("w")
        with Client(endpoint) as client, context.socket(zmq.DEALER) as slow:
            slow.setsockopt(zmq.LINGER, 0)
            slow.setsockopt(zmq.RCVHWM, 1)
            slow.connect(endpoint)
            for rid in (1, 2):
                slow.send(m.encode(m.Generate(rid, "m", prompt="x" * 2000, params=SamplingParams(max_tokens=ENDLESS))))
            controller.wait_for("request", outcome="slow consumer")
            eventually(lambda: idle(client), PATIENCE_S, "its slots are free")
            assert client.status().outbox_bytes < 100_000
            assert client.generate("m", "quick", stream=False).text == "quick"
            ends: dict[int, int] = {}
            while len(ends) < 2:
                assert slow.poll(10_000), "the ends did not come"
                message = _to_client(slow.recv())
                if isinstance(message, m.Error):
                    ends[message.rid] = message.code
            assert ends == {1: 42904, 2: 42904}
    context.term()


@pytest.mark.heavy
def test_ten_thousand_streams_of_one_client_fill_its_bound_and_the_rest_are_told_at_once() -> None:
    with (
        network("w", worker_arguments=("--slots", "2", "--delay-per-token", "0.1")) as (controller, _),
        Client(controller.clients) as other,
    ):
        with Client(controller.clients) as client:
            streams = [client.generate("m", "a b", max_tokens=ENDLESS) for _ in range(10_000)]
            opened_s = time.monotonic()
            for stream in streams[1002:]:
                with pytest.raises(Overloaded) as caught:
                    next(stream)
                assert (caught.value.data["bound"], caught.value.data["limit"]) == ("client_requests", 1000)
            assert time.monotonic() - opened_s < 60.0, "nobody waited for a deadline"
            status = other.status()
            assert (status.running, status.waiting) == (2, 1000)
            assert other.count_tokens("m", "a b c") == 3  # nobody else is the worse for it
        eventually(lambda: idle(other), PATIENCE_S, "all is idle")


# --- deadlines


def test_deadlines_pass_in_the_queue_and_mid_stream_and_free_the_slot() -> None:
    with (
        network("w", worker_arguments=("--slots", "1", "--delay-per-token", "0.05")) as (controller, _),
        Client(controller.clients) as client,
    ):
        running = client.generate("m", "a b", max_tokens=ENDLESS, timeout_s=4.0)
        next(running)
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.generate("m", "c d", stream=False, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - began_s < 3.5, "before the slot was free"
        with pytest.raises(DeadlineExceeded):
            list(running)
        assert time.monotonic() - began_s < PATIENCE_S
        eventually(lambda: idle(client), PATIENCE_S, "the slot is free")


def test_a_deadline_passes_on_a_worker_whose_engine_hangs(tmp_path: Path) -> None:
    """It beats, so it is not dead, and it does not step, so it answers nothing: the client need not wait until it is given up."""
    with configured(tmp_path, "w", arguments=("--faults",), stall_s=60.0) as (controller, _), Client(controller.clients) as client:
        began_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="before a worker had answered"):
            client.generate("m", "!hang", stream=False, timeout_s=1.0)
        assert 1.0 <= time.monotonic() - began_s < PATIENCE_S, "well before stall_s"
        assert client.status().running == 1  # the slot is not free: the engine still has it


# --- engines that hang


def test_a_hung_engines_requests_move_and_it_gets_no_new_work(tmp_path: Path) -> None:
    """Its heartbeats go on. What had not begun is answered elsewhere; what had begun ends, to be resumed."""
    slow = ("--faults", "--delay-first", "1.0", "--delay-per-token", "0.05", "--slots", "4")
    with configured(tmp_path, "hung", arguments=slow, stall_s=1.0, cancel_timeout_s=1.0) as (controller, _):
        with Client(controller.clients) as client:
            begun = client.generate("m", "a b c !hang", resume=False)
            next(begun)
            waiting = [client.generate("m", f"x {n}") for n in range(3)]
            controller.wait_for("worker stalled", worker="hung")
            assert client.status().workers[0].free == 0
            with controller.echo("well"):
                controller.wait_ready("well")
                assert client.generate("m", "new", stream=False).timings.worker == "well"
                controller.wait_for("worker gone", worker="hung")
                assert ["".join(chunk.text for chunk in stream) for stream in waiting] == [f"x {n}" for n in range(3)]
                with pytest.raises(WorkerLost, match="stalled"):
                    list(begun)
                for n in range(5):
                    assert client.generate("m", f"after {n}", stream=False).timings.worker == "well"


# --- workers


def test_a_killed_worker_is_found_by_its_broken_connection(tmp_path: Path) -> None:
    """Beats go every ten seconds here, so it is not they that find it. What it had not begun is answered elsewhere."""
    with (
        configured(tmp_path, "w0", "w1", arguments=("--delay-first", "0.3"), ttl_s=30.0) as (controller, workers),
        Client(controller.clients) as client,
    ):
        asked = client.generate("m", "a b c")
        busy = next(worker.name for worker in client.status().workers if worker.running)
        workers[busy].send(signal.SIGKILL)
        began_s = time.monotonic()
        controller.wait_for("worker gone", worker=busy, why="connection lost")
        assert time.monotonic() - began_s < 10.0, "before the next beat was due"
        assert "".join(chunk.text for chunk in asked) == "a b c"
        assert asked.timings is not None
        assert asked.timings.worker != busy


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["SIGTERM", "drain"])
def test_a_rolling_restart_of_all_workers_under_load_loses_nothing(how: str) -> None:
    arguments = ("--delay-per-token", "0.02", "--slots", "8")
    words = "a b c d e f g"
    with network("w0", "w1", worker_arguments=arguments) as (controller, workers), Client(controller.clients) as client:
        stop = threading.Event()
        replies: list[Any] = []
        failures: list[BaseException] = []

        def load() -> None:
            while not stop.is_set():
                try:
                    replies.append(client.generate("m", words, stream=False, max_tokens=28))
                except Exception as error:  # noqa: BLE001 - whatever it is, it is the test's result
                    failures.append(error)

        threads = [threading.Thread(target=load, name=f"load {n}") for n in range(8)]
        for thread in threads:
            thread.start()
        try:
            for name in ("w0", "w1"):
                if how == "drain":
                    client.drain_worker(name)
                else:
                    workers[name].send(signal.SIGTERM)
                assert workers[name].process.wait(PATIENCE_S) == 0
                workers[f"{name} again"] = controller.echo(f"{name}-again", *arguments)
                controller.wait_ready(f"{name}-again")
        finally:
            stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)
        assert failures == []
        assert {reply.text for reply in replies} == {" ".join([words] * 4)}
        eventually(lambda: idle(client), PATIENCE_S, "all is idle")
