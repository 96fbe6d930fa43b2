"""Controllers below controllers as real processes: parent > child > grandchild > echo worker."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import zmq

from bench.ports import free_port
from zmqserve import Client, Controller, DeadlineExceeded, WorkerLost
from zmqserve import messages as m
from zmqserve.errors import InvalidEndpoint, InvalidParameter

from .fakes.controller import FakeController
from .processes import PATIENCE_S, Served, ServedController, deaths, eventually

WORDS = "one two three four five six seven"


def text_of(tokens: int) -> str:
    """What an echo worker answers to WORDS."""
    return " ".join(WORDS.split()[number % 7] for number in range(tokens))


class Tree:
    """Controllers and workers that end together. Each controller is named, and knows its parents from its start."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        self.controllers: dict[str, ServedController] = {}
        self.workers: dict[str, Served] = {}

    def controller(self, name: str, *parents: str, workers: str = "tcp://127.0.0.1:*", above: tuple[str, ...] = ()) -> ServedController:
        """A controller below those of these names (or worker endpoints `above`), registered with each."""
        ends = [*(self.controllers[parent].workers for parent in parents), *above]
        options = [option for end in ends for option in ("--parent", end)]
        served = ServedController("tcp://127.0.0.1:*", workers, "--name", name, *options)
        self.controllers[name] = self.stack.enter_context(served)
        for parent in parents:
            self.controllers[parent].wait_for("worker came", worker=name)
        return served

    def worker(self, name: str, controller: str, *arguments: str) -> Served:
        """An echo worker, known at the top when this returns."""
        served = self.workers[name] = self.stack.enter_context(self.controllers[controller].echo(name, *arguments))
        self.controllers[controller].wait_ready(name)
        return served

    def wait_slots(self, slots: int) -> None:
        """Wait until the first controller has heard of so many slots."""
        first = next(iter(self.controllers.values()))
        with Client(first.clients) as client:
            eventually(lambda: sum(worker.slots for worker in client.status().workers) == slots, 20, f"{slots} slots at the top")


@pytest.fixture
def tree() -> Iterator[Tree]:
    made = Tree()
    with made.stack:
        yield made


@pytest.fixture(scope="module")
def chain() -> Iterator[Tree]:
    """Three levels and one worker."""
    made = Tree()
    with made.stack:
        made.controller("top")
        made.controller("middle", "top")
        made.controller("low", "middle")
        made.worker("echo", "low", "--slots", "2", "--delay-per-token", "0.01")
        made.wait_slots(2)
        yield made


def all_idle(tree: Tree) -> bool:
    """Whether no controller has anything in progress."""
    for controller in tree.controllers.values():
        with Client(controller.clients) as client:
            status = client.status()
        if status.running or status.waiting or status.clients or any(worker.free != worker.slots for worker in status.workers):
            return False
    return True


def test_every_verb_passes_three_levels(chain: Tree) -> None:
    with Client(chain.controllers["top"].clients) as client:
        with client.generate("m", WORDS, max_tokens=10) as stream:
            assert "".join(chunk.text for chunk in stream) == text_of(10)
        assert stream.completion.timings.worker == "echo"
        assert client.generate("m", WORDS, max_tokens=3, stream=False).text == text_of(3)
        with client.chat("m", [{"role": "user", "content": WORDS}], max_tokens=4) as stream:
            assert stream.text() == text_of(4)
        assert client.embed("m", ["a", "b"]).shape == (2, 384)
        assert client.count_tokens("m", WORDS) == 7
        assert client.model_details("m").name == "m"
        (model,) = client.models()
        assert (model.name, model.state, model.workers, model.slots) == ("m", "ready", ["middle"], 2)
        (child,) = client.status().workers
        assert (child.backend, len(child.controllers)) == ("controller", 2)
    eventually(lambda: all_idle(chain), PATIENCE_S, "all idle")


def test_closing_a_stream_frees_the_slot_three_levels_below(chain: Tree) -> None:
    with Client(chain.controllers["top"].clients) as client:
        for _ in range(2):  # both slots, twice
            streams = [client.generate("m", WORDS, max_tokens=100_000) for _ in range(2)]
            for stream in streams:
                next(iter(stream))
            for stream in streams:
                stream.close()
    eventually(lambda: all_idle(chain), PATIENCE_S, "all idle after the streams were closed")


def test_waiting_counts_once_and_deadlines_hold(chain: Tree) -> None:
    with Client(chain.controllers["top"].clients) as client:
        streams = [client.generate("m", WORDS, max_tokens=40) for _ in range(2)]
        began = time.monotonic()
        reply = client.generate("m", WORDS, max_tokens=1, stream=False)
        waited_ms = (time.monotonic() - began) * 1000
        assert 100 < reply.timings.queue_ms < waited_ms
        for stream in streams:
            assert stream.text() == text_of(40)
        with pytest.raises(DeadlineExceeded), client.generate("m", WORDS, max_tokens=100_000, timeout_s=0.5) as late:
            late.text()
    eventually(lambda: all_idle(chain), PATIENCE_S, "all idle after the deadline")


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stream_goes_on_by_another_branch_when_a_child_dies(tree: Tree, number: signal.Signals) -> None:
    tree.controller("top")
    for side in ("left", "right"):
        tree.controller(side, "top")
        tree.controller(f"{side}-low", side)
        tree.worker(f"{side}-echo", f"{side}-low", "--slots", "4", "--delay-per-token", "0.01")
    tree.wait_slots(8)
    with Client(tree.controllers["top"].clients) as client, client.generate("m", WORDS, max_tokens=150) as stream:
        chunks = iter(stream)
        text = "".join(next(chunks).text for _ in range(10))
        running = next(worker.name for worker in client.status().workers if worker.running)
        tree.controllers[running].send(number)
        last, gap_s = time.monotonic(), 0.0
        for chunk in chunks:
            text += chunk.text
            gap_s, last = max(gap_s, time.monotonic() - last), time.monotonic()
        assert text == text_of(150)
        assert stream.resumed == 1
        assert gap_s < PATIENCE_S
    del tree.controllers[running]
    left = tree.controllers.pop(f"{running}-low")
    eventually(lambda: all_idle(tree), PATIENCE_S, "all idle above")
    tree.controllers["top"] = left
    eventually(lambda: all_idle(tree), PATIENCE_S, "the dead child's requests cancelled below")


@pytest.mark.heavy
def test_a_poison_prompt_kills_two_workers_in_all(tree: Tree) -> None:
    tree.controller("top")
    for side in ("left", "right"):
        tree.controller(side, "top")
        for number in (1, 2):
            tree.worker(f"{side}-{number}", side, "--slots", "2", "--faults")
    tree.wait_slots(8)
    with Client(tree.controllers["top"].clients) as client:
        with pytest.raises(WorkerLost) as caught:
            client.generate("m", "a b !die", stream=False)
        assert caught.value.retryable is False
        eventually(lambda: deaths(tree.workers.values()) >= 2, PATIENCE_S, "both processes at an end")
        assert client.generate("m", WORDS, max_tokens=2, stream=False).text == text_of(2)
        assert deaths(tree.workers.values()) == 2


def test_two_parents_share_a_child_without_overbooking_it(tree: Tree) -> None:
    tree.controller("left")
    tree.controller("right")
    tree.controller("child", "left", "right")
    tree.worker("echo", "child", "--slots", "2", "--delay-per-token", "0.01")
    tree.wait_slots(2)
    with Client(tree.controllers["left"].clients) as one, Client(tree.controllers["right"].clients) as two:
        eventually(lambda: sum(worker.slots for worker in two.status().workers) == 2, 20, "two slots on the right")
        streams = [client.generate("m", WORDS, max_tokens=30) for _ in range(5) for client in (one, two)]
        for stream in streams:
            assert stream.text() == text_of(30)
    eventually(lambda: all_idle(tree), PATIENCE_S, "all idle")


def test_two_controllers_that_name_each_other_are_told_and_serve_on(tree: Tree) -> None:
    end = f"tcp://127.0.0.1:{free_port()}"
    one = tree.controller("one", above=(end,))
    two = tree.controller("two", workers=end, above=(one.workers,))
    tree.worker("echo", "two", "--slots", "2")
    with Client(one.clients) as first, Client(two.clients) as second:

        def no_loop() -> bool:
            below = [any(worker.controllers for worker in client.status().workers) for client in (first, second)]
            return below != [True, True] and any("a loop of --parent links" in line for line in [*one.output, *two.output])

        eventually(no_loop, 10, "a loop refused")
        assert second.generate("m", WORDS, max_tokens=2, stream=False).text == text_of(2)


def test_a_parent_that_cannot_be_one_is_said_before_anything_is_served() -> None:
    with pytest.raises(InvalidEndpoint, match="nowhere"):
        Controller(clients=["inproc://c"], workers=["inproc://w"], parents=["nowhere"]).bind()
    with pytest.raises(InvalidParameter, match="twice"):
        Controller(parents=["tcp://127.0.0.1:5571"] * 2)


def test_a_controller_stops_whether_its_parent_is_there_or_not() -> None:
    with Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"], name="top") as top:
        with Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"], parents=[*top.worker_endpoints, "tcp://127.0.0.1:9"]):
            with Client(top.client_endpoints[0]) as client:
                eventually(lambda: bool(client.status().workers), PATIENCE_S, "the child is registered")
        with Client(top.client_endpoints[0]) as client:
            eventually(lambda: not client.status().workers, 2.5, "the child said BYE")


def test_a_child_outlives_a_parent_that_sends_and_does_not_read(tmp_path: Path) -> None:
    unread = threading.Event()
    ends = ["tcp://127.0.0.1:*"]

    def report(event: str, **_: object) -> None:
        if event == "parent does not read":
            unread.set()

    with (
        FakeController(f"ipc://{tmp_path}/parent") as parent,
        Controller(clients=ends, workers=ends, parents=[parent.endpoint], pipe_messages=10, outbox_bytes=10_000, report=report) as child,
    ):
        former = parent.expect(m.READY)
        parent.welcome(former)
        # Where the child has gone while its queue is full, libzmq has the sender wait until that very thread has read all that came.
        parent.socket.setsockopt(zmq.SNDTIMEO, 100)
        rid = 0
        while not unread.is_set():
            rid += 1
            assert rid < 1_000_000, "it keeps more than it may"
            with suppress(zmq.ZMQError):
                parent.request(m.CountTokens(rid, "nobody's", prompt="x"))
        again = parent.expect(m.READY, m.FAILED, where=lambda got: got.head.kind == m.READY)
        assert again.identity != former.identity
        parent.welcome(again)
        parent.request(m.CountTokens(rid + 1, "nobody's", prompt="x"))
        assert parent.expect(m.FAILED, where=lambda got: got.identity == again.identity).head.rid == rid + 1
        assert child.running
