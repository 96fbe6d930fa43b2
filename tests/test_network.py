"""The whole network as its users run it: real processes, real sockets, real deaths."""

from __future__ import annotations

import re
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from scipy.stats import chisquare

from zmqserve import Client, ConnectionFailed, ModelLoading, RequestError, UnknownModel

from .processes import CAME, PATIENCE_S, Served, ServedController, eventually, network, zmqserve


def test_a_question_goes_through_the_network_and_streams_back() -> None:
    """What the README's three terminals show."""
    with network("w") as (controller, _):
        asked = zmqserve("ask", "m", "a b c", "--max-tokens", "5", "--controller", controller.clients)
        assert (asked.returncode, asked.stdout) == (0, "a b c a b\n"), asked.stderr


def test_two_workers_share_concurrent_requests_evenly() -> None:
    with (
        network("w0", "w1", worker_arguments=("--delay-first", "0.3", "--slots", "100")) as (controller, _),
        Client(controller.clients) as client,
    ):
        with ThreadPoolExecutor(100) as threads:
            replies = list(threads.map(lambda n: client.generate("m", f"hello {n}", stream=False), range(100)))
        assert [reply.text for reply in replies] == [f"hello {n}" for n in range(100)]
        shares = Counter(reply.timings.worker for reply in replies)
        assert 49 <= shares["w0"] <= 51, shares


@pytest.mark.heavy
def test_the_lottery_follows_speed_while_free_slots_are_equal(tmp_path: Path) -> None:
    """2,000 requests one after the other: every draw is made with all slots free, so speeds 1 and 3 get 1/4 and 3/4."""
    config = tmp_path / "controller.toml"
    config.write_text('dispatch = "lottery"\nseed = 7\n')
    with ServedController("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "--config", str(config)) as controller:
        with controller.echo("slow", "--speed", "1"):
            controller.wait_ready("slow")
            with controller.echo("fast", "--speed", "3"), Client(controller.clients) as client:
                controller.wait_ready("fast")
                shares = Counter(client.generate("m", "x", stream=False).timings.worker for _ in range(2000))
    assert chisquare([shares["slow"], shares["fast"]], [500, 1500]).pvalue > 0.01, shares


def test_a_killed_worker_is_out_of_status() -> None:
    with network("w0", "w1") as (controller, workers), Client(controller.clients) as client:
        workers["w0"].send(signal.SIGKILL)
        eventually(lambda: [worker.name for worker in client.status().workers] == ["w1"], PATIENCE_S, "w0 is out of status")
        assert client.generate("m", "still here", stream=False).text == "still here"


def test_a_stopped_worker_is_out_and_back_when_continued() -> None:
    """Its stream ends as worker_lost, and nothing that it still had for that stream reaches anybody."""
    with network("w0", worker_arguments=("--delay-per-token", "0.02")) as (controller, workers), Client(controller.clients) as client:
        stream = client.generate("m", "a b c", max_tokens=100_000, resume=False)
        next(stream)
        workers["w0"].send(signal.SIGSTOP)
        eventually(lambda: not client.status().workers, PATIENCE_S, "w0 is out of status")
        with pytest.raises(Exception, match="worker w0 was lost"):
            list(stream)
        workers["w0"].send(signal.SIGCONT)
        eventually(lambda: len(client.status().workers) == 1, PATIENCE_S, "w0 is back")
        assert client.generate("m", "x y", stream=False).text == "x y"
        state = client.status()
        assert (state.running, state.workers[0].running) == (0, 0)


def test_a_restarted_controller_has_its_workers_again_and_serves() -> None:
    with network("w0", "w1") as (controller, _):
        clients, workers = controller.clients, controller.workers
        controller.end(signal.SIGKILL)
        with ServedController(clients, workers) as again:
            with Client(clients) as client:
                eventually(lambda: sum(worker.state == "ready" for worker in client.status().workers) == 2, PATIENCE_S, "both are back")
                assert client.generate("m", "we are back", stream=False).text == "we are back"
            assert again.end() == 0


def test_the_order_of_starting_does_not_matter() -> None:
    with ServedController() as first:
        clients, workers = first.clients, first.workers
        first.end(signal.SIGKILL)
    with Served("worker", "echo", "--model", "m", "--worker-name", "early", "--controller", workers) as worker:
        assert "zmqserve controller" in worker.wait_for("controller silent", within_s=30.0)["hint"]
        with ServedController(clients, workers) as controller:
            controller.wait_ready("early")


def test_a_drained_worker_finishes_and_leaves_with_exit_code_0() -> None:
    with network("w0", "w1", worker_arguments=("--delay-per-token", "0.02")) as (controller, workers), Client(controller.clients) as client:
        stream = client.generate("m", "a b", max_tokens=30)
        next(stream)
        busy = next(worker.name for worker in client.status().workers if worker.running)
        drained = zmqserve("drain", busy, "--controller", controller.clients)
        assert (drained.returncode, busy in drained.stdout) == (0, True), drained.stderr
        assert client.generate("m", "elsewhere", stream=False).timings.worker != busy
        assert len(list(stream)) == 29
        assert workers[busy].process.wait(10) == 0


def test_closing_a_stream_stops_the_worker_and_frees_the_slot() -> None:
    with (
        network("w0", worker_arguments=("--delay-per-token", "0.01", "--slots", "1")) as (controller, _),
        Client(controller.clients) as client,
    ):
        with client.generate("m", "a b c", max_tokens=1_000_000) as stream:
            next(stream)
        controller.wait_for("request", outcome="cancelled")
        assert client.generate("m", "next", stream=False).text == "next"


def test_a_killed_client_frees_its_slots() -> None:
    with (
        network(
            "w0",
            worker_arguments=(
                "--delay-per-token",
                "0.01",
            ),
        ) as (controller, _),
        Client(controller.clients) as client,
    ):
        with Served("ask", "m", "a b c", "--max-tokens", "1000000", "--controller", controller.clients) as asking:
            eventually(lambda: client.status().running == 1, PATIENCE_S, "the request runs")
            asking.end(signal.SIGKILL)
        eventually(lambda: client.status().running == 0, PATIENCE_S, "its slot is free")


def test_wrong_requests_get_one_clear_sentence_within_a_second_and_disturb_nobody() -> None:
    with network("w0", worker_arguments=("--delay-per-token", "0.02", "--context-length", "100000")) as (controller, _):
        with Client(controller.clients) as client:
            undisturbed = client.generate("m", "a b c", max_tokens=100)
            first = next(undisturbed)
            cases: list[tuple[str, str, dict[str, Any], str]] = [
                ("nope", "x", {}, "no worker serves model 'nope'; known: m"),
                ("m", "", {}, "prompt is empty"),
                ("m", "x", {"max_tokens": -1}, "max_tokens must be an integer >= 1, got -1"),
                ("m", "x", {"max_tokens": 100_000}, "needs 100001 tokens.*100000"),
                ("m", "x", {"presence_penalty": 1.0}, "presence_penalty is not supported by the echo"),
            ]
            for model, prompt, options, message in cases:
                began = time.monotonic()
                with pytest.raises(RequestError, match=message):
                    client.generate(model, prompt, stream=False, **options)
                assert time.monotonic() - began < PATIENCE_S
            text = first.text + "".join(chunk.text for chunk in undisturbed)
            assert text.split() == ["a", "b", "c"] * 33 + ["a"]
            with pytest.raises(UnknownModel) as unknown:
                client.generate("nope", "x", stream=False)
            assert unknown.value.known_models == ["m"]


def test_a_model_that_is_still_loading_says_so() -> None:
    with ServedController() as controller, Client(controller.clients) as client:
        with Served("worker", "transformers", "--model", "/nowhere/at/all", "--name", "slow", "--controller", controller.workers) as worker:
            try:
                controller.wait_for("worker came", state="loading")
                with pytest.raises(ModelLoading) as loading:
                    client.generate("slow", "x", stream=False)
                assert loading.value.retryable
                assert loading.value.retry_after_ms
            finally:
                code = worker.process.wait(60)
            assert code != 0
            assert any("/nowhere/at/all" in line for line in worker.output)


def test_every_new_client_is_answered_at_once() -> None:
    """A connection that comes while its client looks away is noticed: no client waits for its timeout."""
    with network("w0") as (controller, _):
        for _ in range(200):
            with Client(controller.clients) as client:
                assert client.generate("m", "here", stream=False).text == "here"


def test_a_controller_that_is_not_there_is_said_soon() -> None:
    with ServedController() as controller:
        clients = controller.clients
        controller.end(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(ConnectionFailed, match=clients), Client(clients) as client:
        client.status()
    assert time.monotonic() - began < 10.0, "long before the deadline"
    asked = zmqserve("ask", "m", "x", "--controller", clients)
    assert asked.returncode == 3
    assert asked.stderr.count("\n") == 1
    assert clients in asked.stderr


@pytest.mark.parametrize("endpoint", ["tcp", "ipc"])
def test_an_endpoint_in_use_is_one_sentence_and_the_first_controller_is_undisturbed(
    endpoint: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("e")
    clients = "tcp://127.0.0.1:*" if endpoint == "tcp" else f"ipc://{folder}/c"
    with ServedController(clients) as controller:
        began = time.monotonic()
        second = zmqserve("controller", "--clients", controller.clients, "--workers", "tcp://127.0.0.1:*")
        assert time.monotonic() - began < PATIENCE_S
        assert second.returncode == 1
        assert re.fullmatch(f"zmqserve: cannot bind {re.escape(controller.clients)}: .*\n", second.stderr), second.stderr
        with controller.echo("w0"):
            controller.wait_ready("w0")
            with Client(controller.clients) as client:
                assert client.generate("m", "still mine", stream=False).text == "still mine"


def test_up_runs_a_network_and_drains_it() -> None:
    with Served("up", "echo", "--model", "m", "--replicas", "2", "--clients", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*") as up:
        clients = up.wait_for("controller up")["clients"][0]
        for _ in range(2):
            up.wait_for(CAME, state="ready")
        with Client(clients) as client:
            assert len(client.status().workers) == 2
            assert client.generate("m", "a b", stream=False).text == "a b"
        assert up.end(signal.SIGINT) == 0


def test_draining_one_replica_of_up_leaves_the_others_and_the_last_one_ends_it() -> None:
    with Served("up", "echo", "--model", "m", "--replicas", "2", "--clients", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*") as up:
        clients = up.wait_for("controller up")["clients"][0]
        first, last = (up.wait_for(CAME, state="ready")["worker"] for _ in range(2))
        with Client(clients) as client:
            client.drain_worker(first)
            up.wait_for("a worker was drained", left=1)
            assert [worker.name for worker in client.status().workers] == [last]
            assert client.generate("m", "a b", stream=False).timings.worker == last
            client.drain_worker(last)
        up.wait_for("a worker was drained", left=0)
        assert up.process.wait(PATIENCE_S) == 0


def test_up_ends_when_a_worker_fails_for_good() -> None:
    given = ("--clients", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*")
    with Served("up", "echo", "--model", "m", "--slots", "1", "--speed", "-1", *given) as up:
        assert up.process.wait(PATIENCE_S) == 1


def test_workers_of_an_up_that_was_killed_at_once_leave() -> None:
    """It is killed as soon as a worker's process is there, long before that one can have looked who its parent is."""
    with Served("up", "echo", "--model", "m", "--clients", "tcp://127.0.0.1:*", "--workers", "tcp://127.0.0.1:*") as up:
        of_up = psutil.Process(up.process.pid)
        eventually(lambda: bool(of_up.children()), PATIENCE_S, "a worker's process is there")
        workers = of_up.children()
        up.end(signal.SIGKILL, within_s=PATIENCE_S)
        _, left = psutil.wait_procs(workers, timeout=PATIENCE_S)
        for worker in left:
            worker.kill()
        assert not left
