"""A whole network inside one process: one context, no TCP, started and stopped in any order and from anywhere."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import psutil
import pytest
import zmq
import zmq.asyncio

from zmqserve import AsyncClient, Bridge, Client, Controller, InvalidParameter, PolledClient, WorkerConfig, ZmqserveError
from zmqserve.backends.echo import EchoWorker

from .processes import PATIENCE_S, eventually

Context = zmq.Context[Any]
CLIENTS, WORKERS = "inproc://clients", "inproc://workers"
LONG = 400
"""Tokens of an answer that is still under way when the test does something to it."""


@pytest.fixture
def context() -> Iterator[Context]:
    """Ends with the test: everything in it must have been closed then."""
    with zmq.Context() as made:
        yield made


def controller(context: Context, **settings: Any) -> Controller:
    return Controller(context=context, clients=[CLIENTS], workers=[WORKERS], **settings)


def worker(context: Context, name: str = "w", *, ttl_s: float = 3.0, **options: Any) -> EchoWorker:
    return EchoWorker(WorkerConfig(model="m", name=name, context=context, controllers=(WORKERS,), ttl_s=ttl_s), **options)


@pytest.mark.parametrize("kind", [zmq.asyncio.Context, type("Own", (zmq.Context,), {})])
def test_a_context_of_asyncio_or_a_class_of_yours_serves_as_well(kind: Callable[[], Context]) -> None:
    """The sockets of zmq.asyncio give futures, which a socket's loop took for messages without end."""
    with kind() as context, network(context):
        with Client(CLIENTS, context=context) as client:
            assert client.generate("m", "a b", stream=False, max_tokens=2).text == "a b"
        with PolledClient(CLIENTS, context=context) as driven:
            assert polled(driven, driven.count_tokens("m", "a b")) == 2

        async def ask() -> str:
            async with AsyncClient(CLIENTS, context=context) as client:
                return await client.generate("m", "c d", max_tokens=2).text()

        assert asyncio.run(ask()) == "c d"
        same = zmq.Context(context)
        with same.socket(zmq.PUSH) as jobs, same.socket(zmq.PULL) as results:
            jobs.bind("inproc://jobs")
            results.bind("inproc://results")
            with Bridge(CLIENTS, pull="inproc://jobs", push="inproc://results", model="m", context=context):
                jobs.send(b'{"prompt": "e f", "params": {"max_tokens": 2}}')
                assert results.poll(int(1000 * PATIENCE_S))
                assert b'"text":"e f"' in results.recv()


@pytest.mark.parametrize("make", [Client, AsyncClient, PolledClient, Controller, partial(Bridge, pull=CLIENTS, push=CLIENTS)])
def test_what_is_no_context_is_refused(make: Callable[..., Any]) -> None:
    gone = zmq.Context()
    gone.term()
    for wrong in ("context", gone):
        with pytest.raises(InvalidParameter, match=r"zmq\.Context that is open") as caught:
            make(context=wrong)
        assert caught.value.parameter == "context"


@contextmanager
def network(context: Context, **options: Any) -> Iterator[Controller]:
    with controller(context) as made, worker(context, **options) as echo:
        echo.wait_ready(PATIENCE_S)
        yield made


def polled(client: PolledClient, asked: Any) -> Any:
    """Drive it with a zmq.Poller until this is answered."""
    poller = zmq.Poller()
    poller.register(client, zmq.POLLIN)
    until_s = time.monotonic() + PATIENCE_S
    while not asked.done:
        assert time.monotonic() < until_s
        poller.poll(client.wait_ms())
        client.process()
    return asked.result()


# --- verbs -------------------------------------------------------------------------------------


def test_every_verb_without_any_tcp(context: Context) -> None:
    with network(context), Client(CLIENTS, context=context) as client:
        assert client.generate("m", "a b").text() == "a b"
        assert client.chat("m", [{"role": "user", "content": "hi"}], stream=False).text == "hi"
        assert client.embed("m", ["x", "y"]).shape == (2, 384)
        assert client.count_tokens("m", "a b") == 2
        assert client.model_details("m").name == "m"
        assert [model.name for model in client.models()] == ["m"]
        assert [each.name for each in client.status().workers] == ["w"]
        assert [result.text for result in client.map("m", ["a", "b"])] == ["a", "b"]
        assert psutil.Process().net_connections(kind="inet") == []
        assert client.drain_worker("w") == 0


def test_every_verb_of_the_async_client(context: Context) -> None:
    async def ask() -> None:
        async with AsyncClient(CLIENTS, context=context) as client:
            assert [chunk.text async for chunk in client.generate("m", "a b")] == ["a", " b"]
            assert (await client.embed("m", ["x"])).shape == (1, 384)
            assert await client.count_tokens("m", "a b") == 2
            assert (await client.model_details("m")).name == "m"
            assert [model.name for model in await client.models()] == ["m"]
            assert len((await client.status()).workers) == 1
            assert [result.text async for result in client.map("m", ["a", "b"])] == ["a", "b"]

    with network(context):
        asyncio.run(ask())


def test_every_verb_of_the_polled_client(context: Context) -> None:
    with network(context), PolledClient(CLIENTS, context=context) as client:
        assert polled(client, client.generate("m", "a b", stream=False)).text == "a b"
        assert polled(client, client.embed("m", ["x"])).shape == (1, 384)
        assert polled(client, client.count_tokens("m", "a b")) == 2
        assert polled(client, client.model_details("m")).name == "m"
        assert [model.name for model in polled(client, client.models())] == ["m"]
        assert len(polled(client, client.status()).workers) == 1


# --- beginnings and ends -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "order", [("worker", "client", "controller"), ("client", "controller", "worker"), ("controller", "worker", "client")]
)
def test_the_order_of_starting_does_not_matter(context: Context, order: tuple[str, ...]) -> None:
    """What connects to an inproc name before it is bound is served when it is."""
    serving, echo = controller(context), worker(context)
    with Client(CLIENTS, context=context, connect_timeout_s=PATIENCE_S) as client, ThreadPoolExecutor(1) as pool:
        answers = []
        starts: dict[str, Callable[[], Any]] = {
            "worker": echo.start,
            "controller": serving.start,
            "client": lambda: answers.append(pool.submit(lambda: client.generate("m", "a b", retries=50).text())),
        }
        try:
            for name in order:
                starts[name]()
            assert answers[0].result(PATIENCE_S) == "a b"
        finally:
            echo.stop()
            serving.stop()


@pytest.mark.parametrize("order", list(itertools.permutations(("controller", "worker", "client"))))
def test_the_order_of_stopping_does_not_matter(context: Context, order: tuple[str, ...]) -> None:
    """With an answer under way; and all is let go of, or the context could not end."""
    serving, echo = controller(context), worker(context, delay_per_token_s=0.01)
    client = Client(CLIENTS, context=context, failover_s=0.5)
    serving.start()
    echo.start()
    echo.wait_ready(PATIENCE_S)
    stream = client.generate("m", "a b c", max_tokens=LONG)
    next(stream)
    stops = {"controller": serving.stop, "worker": echo.stop, "client": client.close}
    for name in order:
        began_s = time.monotonic()
        stops[name]()
        assert time.monotonic() - began_s < PATIENCE_S
    with pytest.raises(ZmqserveError):
        stream.text()


def test_nothing_is_left_behind() -> None:
    def once() -> None:
        with zmq.Context() as context, network(context), Client(CLIENTS, context=context) as client:
            client.generate("m", "a", stream=False)

    once()
    gc.collect()
    descriptors, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        once()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, PATIENCE_S, "as many descriptors as before")
    assert threading.active_count() == threads


def test_stop_from_another_thread_while_one_waits_in_run(context: Context) -> None:
    serving, echo = controller(context), worker(context)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(serving.run), pool.submit(echo.run)]
        with Client(CLIENTS, context=context, connect_timeout_s=PATIENCE_S) as client:
            assert client.generate("m", "a b", stream=False, retries=50).text == "a b"
        echo.stop()
        serving.stop()
        for each in running:
            each.result(PATIENCE_S)


def test_a_context_that_its_owner_ends_ends_all(capfd: pytest.CaptureFixture[str]) -> None:
    """No hang, no traceback."""
    context: Context = zmq.Context()
    serving, echo = controller(context), worker(context, delay_per_token_s=0.01)
    serving.start()
    echo.start()
    echo.wait_ready(PATIENCE_S)
    client = Client(CLIENTS, context=context)
    stream = client.generate("m", "a b c", max_tokens=LONG)
    next(stream)
    context.term()
    with pytest.raises(ZmqserveError):
        stream.text()
    echo.wait_ended(PATIENCE_S)
    serving.stop()
    client.close()
    assert capfd.readouterr().err == ""


# --- losses ------------------------------------------------------------------------------------


def test_a_controller_that_is_stopped_and_started_again_has_everybody_back(context: Context) -> None:
    """Nobody is told of broken inproc connections: its peers find it by its silence, within its ttl."""
    serving = controller(context, ttl_s=1.5)
    with worker(context, delay_per_token_s=0.01, ttl_s=1.5) as echo, Client(CLIENTS, context=context, ttl_s=1.5) as client:
        serving.start()
        echo.wait_ready(PATIENCE_S)
        stream = client.generate("m", "a b c", max_tokens=LONG)
        words = [next(stream).text for _ in range(3)]
        for _ in range(2):
            serving.stop()
            serving.start()
            words += [next(stream).text for _ in range(3)]
        words += [chunk.text for chunk in stream]
        assert "".join(words) == " ".join("abc"[k % 3] for k in range(LONG))
        assert stream.resumed == 2
        assert client.generate("m", "x", stream=False).text == "x"
        serving.stop()


def test_a_worker_that_is_stopped_is_replaced_by_another(context: Context) -> None:
    with controller(context), worker(context, "w1", delay_per_token_s=0.01) as first, Client(CLIENTS, context=context) as client:
        first.wait_ready(PATIENCE_S)
        stream = client.generate("m", "a b c", max_tokens=LONG)
        words = [next(stream).text for _ in range(3)]
        with worker(context, "w2", delay_per_token_s=0.001) as second:
            second.wait_ready(PATIENCE_S)
            first.stop()
            words += [chunk.text for chunk in stream]
            assert "".join(words) == " ".join("abc"[k % 3] for k in range(LONG))
            assert (stream.resumed, stream.timings.worker) == (1, "w2")


# --- inside somebody's program -----------------------------------------------------------------


def program(body: str, *, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program of its own: with a network at inproc, and `client` to ask it."""
    head = """
        import logging, os, signal, sys, threading, time
        import zmq
        import structlog
        from zmqserve import Client, Controller, WorkerConfig
        from zmqserve.backends.echo import EchoWorker
        context = zmq.Context()
        controller = Controller(context=context, clients=["inproc://c"], workers=["inproc://w"], stall_s=0.5)
        def worker(name, **options):
            return EchoWorker(WorkerConfig(model="m", name=name, context=context, controllers=("inproc://w",)), **options)
        client = Client("inproc://c", context=context)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert done.returncode == expect, done.stderr
    return done


def test_signal_handlers_and_logging_stay_the_programs_own() -> None:
    done = program("""
        numbers = [number for number in signal.valid_signals() if signal.getsignal(number) is not None]
        before = {number: signal.getsignal(number) for number in numbers}
        def same():
            return {number: signal.getsignal(number) for number in numbers} == before
        with controller, worker("w") as echo:
            echo.wait_ready(10)
            assert client.generate("m", "a", stream=False).text == "a"
            assert same()
        client.close()
        context.term()
        assert same()
        assert not structlog.is_configured()
        assert not logging.getLogger().handlers
    """)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_program_that_configured_structlog_gets_the_events_its_own_way() -> None:
    done = program("""
        events = []
        def keep(logger, method, event):
            events.append(event["event"])
            raise structlog.DropEvent
        structlog.configure(processors=[keep])
        with controller, worker("w") as echo:
            echo.wait_ready(10)
            client.generate("m", "a", stream=False)
        client.close()
        assert {"controller up", "worker came", "request", "controller down"} <= set(events), events
        assert structlog.get_config()["processors"] == [keep]
    """)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.heavy
def test_an_engine_that_hangs_is_left_and_the_program_ends() -> None:
    """Its thread cannot be stopped: `stop` says so and goes on, what it ran has moved, and the interpreter does not wait for it."""
    done = program("""
        with controller, worker("hangs", faults=True) as hung:
            hung.wait_ready(10)
            stream = client.generate("m", "a !hang b", max_tokens=3)
            print(next(stream).text)
            with worker("sound") as sound:
                sound.wait_ready(10)
                print(stream.text(), stream.resumed)
                began = time.monotonic()
                hung.stop()
                assert time.monotonic() - began < 8
                print(client.generate("m", "x", stream=False).text)
        client.close()
        context.term()
    """)
    assert done.stdout == "a\na !hang b 1\nx\n"
    assert "engine does not end" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_load_that_fails_reaches_who_waits(context: Context) -> None:
    class Broken(EchoWorker):
        def load(self) -> Any:
            raise OSError("no such weights")

    with controller(context):
        broken = Broken(WorkerConfig(model="m", context=context, controllers=(WORKERS,)))
        with broken, pytest.raises(OSError, match="no such weights"):
            broken.wait_ready(PATIENCE_S)
        assert isinstance(broken.failure, OSError)


def test_what_breaks_a_controllers_thread_comes_out_of_stop(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = controller(context)
    serving.bind()
    broke = threading.Event()

    def breaking(*_: Any) -> None:
        broke.set()
        raise MemoryError("none left")

    monkeypatch.setattr(serving, "_loop", breaking)
    serving.start()
    assert broke.wait(PATIENCE_S)
    with pytest.raises(MemoryError, match="none left"):
        serving.stop()
    serving.stop()
    monkeypatch.undo()
    with serving, Client(CLIENTS, context=context) as client:
        assert client.models() == []


def test_a_program_that_is_interrupted_leaves_its_blocks_in_order() -> None:
    done = program(
        """
        with controller, worker("w", delay_per_token_s=0.01) as echo, client:
            echo.wait_ready(10)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            try:
                for chunk in client.generate("m", "a b", max_tokens=10**6):
                    pass
            except KeyboardInterrupt:
                print("interrupted")
        context.term()
        print("ended")
        """
    )
    assert (done.stdout, done.stderr) == ("interrupted\nended\n", "")
