"""The worker in Node, written from PROTOCOL.md alone, with our client, over real controllers."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from zmqserve import BackendError, Client, SamplingParams, UnknownModel, Unsupported
from zmqserve.errors import InvalidParameter

from .nodes import LONG, WORDS, needs_node, node_worker, running_on
from .processes import PATIENCE_S, ServedController, eventually

pytestmark = needs_node


@pytest.fixture(scope="module")
def theirs() -> Iterator[ServedController]:
    """A controller with a worker in Node of two slots: model m, 10 ms a token."""
    with ServedController() as controller, node_worker(controller, "nw", "--slots", 2, "--step-ms", 10):
        yield controller


def test_our_client_streams_from_the_worker(theirs: ServedController) -> None:
    with Client(theirs.clients) as client:
        assert client.generate("m", WORDS).text() == WORDS
        assert client.generate("m", WORDS, stream=False).text == WORDS
        assert client.chat("m", [{"role": "user", "content": "a b c"}]).text() == "a b c"
        assert client.count_tokens("m", WORDS) == 7
        assert client.model_details("m").context_length == 8192
        assert client.generate("m", " ").text() == ""


def test_cancel_stops_the_worker(theirs: ServedController) -> None:
    with Client(theirs.clients) as client:
        with client.generate("m", LONG) as stream:
            next(iter(stream))
            assert running_on(client) == 1
        eventually(lambda: running_on(client) == 0, PATIENCE_S, "the slot is free")
        (worker,) = client.status().workers
        assert (worker.running, worker.free) == (0, 2)


def test_more_requests_than_slots_wait_in_the_controller(theirs: ServedController) -> None:
    prompts = [f"{number} " + WORDS for number in range(6)]
    with Client(theirs.clients) as client:
        streams = [client.generate("m", prompt) for prompt in prompts]
        assert (running_on(client), client.status().waiting) == (2, 4)
        assert [stream.text() for stream in streams] == prompts


def test_the_worker_refuses_what_it_cannot_do(theirs: ServedController) -> None:
    with Client(theirs.clients) as client:
        for refused, name in ((SamplingParams(top_k=3), "top_k"), (SamplingParams(n=2), "n"), (SamplingParams(stop=["a"]), "stop")):
            with pytest.raises(Unsupported) as caught:
                client.generate("m", "a b", params=refused).text()
            assert caught.value.data["parameter"] == name
        with pytest.raises(Unsupported):
            client.generate("m", np.array([1, 2], dtype=np.uint32).tolist()).text()
        assert client.generate("m", "a b", params=SamplingParams(max_tokens=1, seed=2**62, temperature=0)).text() == "a"


def test_embeddings_are_raw_float32(theirs: ServedController) -> None:
    with Client(theirs.clients) as client:
        vectors = client.embed("m", ["abc", "abcdefghij"])
    assert vectors.dtype == np.float32
    assert vectors.tolist() == [[97, 98, 99, 0, 0, 0, 0, 0], [97 + 105, 98 + 106, 99, 100, 101, 102, 103, 104]]


def test_a_worker_that_says_nothing_but_heartbeats_stays(theirs: ServedController) -> None:
    with ServedController() as controller, node_worker(controller, "nw", "--ttl-ms", 1000), Client(controller.clients) as client:
        began_s = time.monotonic()
        (before,) = client.status().workers
        # For three of its ttls; a worker that were given up would come back, younger.
        eventually(lambda: time.monotonic() - began_s > 3.0, PATIENCE_S, "3 s passed")
        (after,) = client.status().workers
        assert after.up_s - before.up_s >= 2.9
        assert after.heard_ms < 1000


def test_a_stopped_worker_is_given_up_and_comes_back() -> None:
    with ServedController() as controller, node_worker(controller, "nw", "--ttl-ms", 1000, "--step-ms", 10) as worker:
        with Client(controller.clients) as client:
            worker.send_signal(signal.SIGSTOP)
            controller.wait_for("worker gone", worker="nw")
            worker.send_signal(signal.SIGCONT)
            controller.wait_ready("nw")
            assert client.generate("m", WORDS).text() == WORDS


def test_a_worker_registers_again_with_a_controller_that_restarts() -> None:
    with ServedController() as controller, node_worker(controller, "nw"):
        clients, workers = controller.clients, controller.workers
        controller.end(signal.SIGKILL)
        with ServedController(clients, workers) as again, Client(clients) as client:
            again.wait_ready("nw")
            assert client.generate("m", WORDS).text() == WORDS


@pytest.mark.heavy  # silence has to last for 2 ttl of the controller
def test_a_silent_controller_is_left_for_a_fresh_socket_and_takes_the_worker_back() -> None:
    with ServedController() as controller, node_worker(controller, "nw"), Client(controller.clients) as client:
        controller.send(signal.SIGSTOP)
        began_s = time.monotonic()
        eventually(lambda: time.monotonic() - began_s > 7.5, PATIENCE_S, "more than 2 ttl passed")
        controller.send(signal.SIGCONT)
        controller.wait_ready("nw")
        eventually(lambda: client.generate("m", WORDS, retries=5).text() == WORDS, PATIENCE_S, "it answers")


def test_a_signal_drains_the_worker() -> None:
    with ServedController() as controller, node_worker(controller, "nw", "--step-ms", 20) as worker, Client(controller.clients) as client:
        stream = client.generate("m", " ".join([WORDS] * 5))
        next(iter(stream))
        worker.send_signal(signal.SIGTERM)
        controller.wait_for("worker draining", worker="nw")
        assert worker.poll() is None
        assert stream.text() == " ".join([WORDS] * 5)
        controller.wait_for("worker gone", worker="nw", why="it left")
        assert worker.wait(PATIENCE_S) == 0


def test_a_worker_is_drained_by_its_controller() -> None:
    with ServedController() as controller, node_worker(controller, "nw", "--step-ms", 20) as worker, Client(controller.clients) as client:
        stream = client.generate("m", WORDS)
        next(iter(stream))
        assert client.drain_worker("nw") == 1
        assert stream.text() == WORDS
        assert worker.wait(PATIENCE_S) == 0


def test_a_worker_of_two_controllers_shares_its_slots() -> None:
    with ExitStack() as stack:
        one, two = stack.enter_context(ServedController()), stack.enter_context(ServedController())
        stack.enter_context(node_worker(one, "nw", "--controller", two.workers, "--slots", 1, "--step-ms", 10))
        two.wait_ready("nw")
        first, second = stack.enter_context(Client(one.clients)), stack.enter_context(Client(two.clients))
        with first.generate("m", LONG) as busy:
            next(iter(busy))
            eventually(lambda: second.status().workers[0].others == 1, PATIENCE_S, "the other controller knows of it")
            waits = second.generate("m", WORDS)
            assert second.status().waiting == 1
        assert waits.text() == WORDS


def test_a_name_that_is_taken_is_tried_again_until_it_is_free() -> None:
    with ServedController() as controller, node_worker(controller, "nw") as first, node_worker(controller, "nw", wait=False) as second:
        controller.wait_for("worker refused")
        first.kill()
        controller.wait_for("worker gone", worker="nw")
        controller.wait_ready("nw")
        assert second.poll() is None


def test_a_worker_fails_alone_on_what_it_cannot_read(theirs: ServedController) -> None:
    with Client(theirs.clients) as client:
        with pytest.raises((InvalidParameter, UnknownModel, BackendError)):
            client.embed("m", [""])
        assert client.generate("m", "a b").text() == "a b"
