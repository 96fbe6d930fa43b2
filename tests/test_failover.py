"""What callers of the SDK see when workers and controllers die: real processes, killed and stopped. The figures are printed (-s)."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest

from zmqserve import errors
from zmqserve.client import Client
from zmqserve.stream import Stream

from .processes import CAME, PATIENCE_S, ServedController, deaths, eventually, network

SLOW = ("--delay-per-token", "0.01")
PROMPT = "one two three four five six seven"
WORDS = PROMPT.split()


def show(what: str, reading: Reading) -> None:
    """Print the figure; pytest shows it with -s."""
    sys.stdout.write(f"{what}: longest gap {max(reading.gaps_s) * 1000:.0f} ms\n")


def wanted(tokens: int) -> str:
    """What an undisturbed echo worker answers to PROMPT."""
    return " ".join(WORDS[place % len(WORDS)] for place in range(tokens))


class Reading:
    """Streams that are read in threads of their own, with the longest time that each had nothing to read."""

    def __init__(self, client: Client, count: int, tokens: int) -> None:
        self.tokens = tokens
        self.streams: list[Stream] = [client.generate("m", PROMPT, max_tokens=tokens) for _ in range(count)]
        self.gaps_s = [0.0] * count
        self.begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(count)
        self._readers = [self._pool.submit(self._read, number) for number in range(count)]
        for _ in range(count):
            assert self.begun.acquire(timeout=PATIENCE_S)

    def _read(self, number: int) -> None:
        before = None
        for chunk in self.streams[number]:
            now = monotonic()
            if before is not None:
                self.gaps_s[number] = max(self.gaps_s[number], now - before)
            before = now
            if chunk.seq == 10:
                self.begun.release()

    def finish(self) -> list[Any]:
        """Read to the end: the answers must be whole and exact. Returns how often each was resumed."""
        with self._pool:
            for reader in self._readers:
                reader.result(PATIENCE_S)
        for stream in self.streams:
            answer = stream.completion
            assert answer.text == wanted(self.tokens)
            assert (len(answer.token_ids), answer.usage.completion_tokens) == (self.tokens, self.tokens)
            assert answer.resumed == stream.resumed
        return [stream.resumed for stream in self.streams]


class Pair:
    """Two controllers and two workers of both; clients turn to `first` first."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.first, self.second = (stack.enter_context(ServedController()) for _ in range(2))
        self.workers = [stack.enter_context(self.first.echo(name, *SLOW, "--slots", "16", also=[self.second])) for name in ("w1", "w2")]
        for controller in (self.first, self.second):
            for _ in range(2):
                controller.wait_for(CAME, state="ready")

    def client(self, **options: Any) -> Client:
        return self._stack.enter_context(Client([self.first.clients, self.second.clients], **options))

    def again(self, controller: ServedController) -> ServedController:
        """Start a controller that was killed on the same endpoints, and wait for its workers."""
        back = self._stack.enter_context(ServedController(controller.clients, controller.workers))
        for _ in range(2):
            back.wait_for(CAME, state="ready")
        return back


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


# --- controllers -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on_at_the_next_controller(pair: Pair, fault: signal.Signals) -> None:
    client = pair.client()
    reading = Reading(client, 4, 100)
    pair.first.send(fault)
    assert reading.finish() == [1] * 4
    show(f"{fault.name} of a controller", reading)
    assert max(reading.gaps_s) < PATIENCE_S


def test_a_leaving_controller_passes_its_streams_on(pair: Pair) -> None:
    client = pair.client()
    reading = Reading(client, 4, 100)
    assert pair.first.end(signal.SIGTERM) == 0
    assert reading.finish() == [1] * 4
    show("SIGTERM of a controller", reading)
    assert max(reading.gaps_s) < PATIENCE_S


def test_a_controller_that_comes_back_is_used_again(pair: Pair) -> None:
    client = pair.client()
    reading = Reading(client, 2, 400)
    pair.first.end(signal.SIGKILL)
    eventually(lambda: all(stream.resumed == 1 for stream in reading.streams), PATIENCE_S, "at the second")
    back = pair.again(pair.first)
    pair.second.end(signal.SIGKILL)
    assert reading.finish() == [2] * 2
    assert client.status().client_endpoints == [back.clients]


def test_one_controller_that_restarts_loses_nothing() -> None:
    with ExitStack() as stack:
        controller = stack.enter_context(ServedController())
        stack.enter_context(controller.echo("w", *SLOW, "--slots", "16"))
        controller.wait_ready("w")
        client = stack.enter_context(Client(controller.clients))
        reading = Reading(client, 4, 100)
        controller.end(signal.SIGKILL)
        stack.enter_context(ServedController(controller.clients, controller.workers))
        assert reading.finish() == [1] * 4
        show("restart of the only controller", reading)


def test_without_a_controller_requests_end_after_failover_s_or_their_deadline() -> None:
    with network("w", worker_arguments=SLOW) as (controller, _), Client(controller.clients, failover_s=1.0) as client:
        begun, late = client.generate("m", PROMPT), client.generate("m", PROMPT, timeout_s=30)
        short = client.generate("m", PROMPT, timeout_s=0.8)
        next(begun)
        controller.end(signal.SIGKILL)
        lost_s = monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            short.text()
        for stream in (begun, late):
            with pytest.raises(errors.ControllerLost, match=r"none answered at .* within 1 s"):
                stream.text()
        assert 0.9 < monotonic() - lost_s < PATIENCE_S
        with pytest.raises(errors.ControllerUnreachable):
            client.models()


def test_close_during_a_failover_ends_everything() -> None:
    with network("w", worker_arguments=SLOW) as (controller, _), Client(controller.clients) as client, ThreadPoolExecutor(2) as pool:
        stream = client.generate("m", PROMPT)
        next(stream)
        controller.end(signal.SIGKILL)
        waiting: list[Future[Any]] = [pool.submit(stream.text), pool.submit(lambda: client.generate("m", PROMPT).text())]
        eventually(lambda: len(client._connection._pump.session.calls) == 2, PATIENCE_S, "both wait for a controller")
        client.close()
        for ended in waiting:
            with pytest.raises(errors.ConnectionFailed, match="closed"):
                ended.result(PATIENCE_S)


@pytest.mark.parametrize("victim", ["worker", "controller"])
def test_a_begun_answer_that_may_not_be_resumed_ends(pair: Pair, victim: str) -> None:
    client = pair.client(resume=False)
    stream, other = client.generate("m", PROMPT), client.generate("m", PROMPT, max_tokens=150, resume=True)
    (next(stream), next(other))
    if victim == "worker":
        for worker in pair.workers:
            worker.end(signal.SIGKILL)
    else:
        pair.first.end(signal.SIGKILL)
        assert other.text() == wanted(150)
    with pytest.raises(errors.WorkerLost if victim == "worker" else errors.ControllerLost) as caught:
        stream.text()
    assert caught.value.retryable
    assert stream.resumed == 0


def test_the_command_ask_works_across_a_failover(pair: Pair) -> None:
    ask = [sys.executable, "-m", "zmqserve", "ask", "m", PROMPT, "--max-tokens", "150"]
    ask += [argument for controller in (pair.first, pair.second) for argument in ("--controller", controller.clients)]
    with subprocess.Popen(ask, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        begun = process.stdout.read(20)
        pair.first.send(signal.SIGKILL)
        rest = process.stdout.read()
    assert process.returncode == 0
    assert (begun + rest).startswith(wanted(150))


# --- workers -----------------------------------------------------------------------------------


def test_streams_of_a_killed_worker_go_on_at_another(pair: Pair) -> None:
    client = pair.client()
    reading = Reading(client, 6, 100)
    pair.workers[0].send(signal.SIGKILL)
    resumed = reading.finish()
    show("SIGKILL of a worker", reading)
    assert set(resumed) == {0, 1}
    assert max(reading.gaps_s) < PATIENCE_S


def test_a_request_that_kills_workers_stops_after_two() -> None:
    """Although the first of them had made progress with it: its tokens leave one by one, so most have when it dies."""
    prompt = f"{' '.join('abcdefghijklmnopqrstu')} !die"
    with network("a", "b", "c", worker_arguments=("--faults", *SLOW)) as (controller, workers), Client(controller.clients) as client:
        with pytest.raises(errors.WorkerLost) as caught:
            client.generate("m", prompt, stream=False, max_tokens=50)
        assert not caught.value.retryable
        eventually(lambda: deaths(workers.values()) >= 2, PATIENCE_S, "both processes at an end")
        assert client.generate("m", "still there", stream=False, max_tokens=2).text == "still there"
        assert deaths(workers.values()) == 2


def test_retries_wait_for_a_full_queue(tmp_path: Any) -> None:
    config = tmp_path / "config.toml"
    config.write_text("queue_requests = 1\n")
    with network("w", worker_arguments=(*SLOW, "--slots", "1"), controller_arguments=("--config", str(config))) as (controller, _):
        with Client(controller.clients) as client:
            running = client.generate("m", PROMPT, max_tokens=50)
            next(running)
            waits = client.generate("m", PROMPT, max_tokens=50)
            with pytest.raises(errors.Overloaded):
                client.generate("m", PROMPT, stream=False, max_tokens=5)
            assert client.generate("m", PROMPT, stream=False, max_tokens=5, retries=20).text == wanted(5)
            assert running.text() == waits.text() == wanted(50)
