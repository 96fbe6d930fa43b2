"""A controller that is made to hold too much ends with a last word, and others take over. libzmq cannot refuse a message without an end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from bench.zmtp import MORE, RawPeer, frame
from zmqserve import Client, Controller
from zmqserve.errors import MemoryExceeded

from .processes import PATIENCE_S, ServedController, eventually

MIB = 2**20
PART = frame(b"x" * (512 * 1024), MORE)
"""A frame well below the limit of a message, of one that is never finished."""


@contextmanager
def flood(endpoint: str) -> Iterator[None]:
    """Send parts of one message to an endpoint for as long as it takes them."""
    over = threading.Event()
    peer = RawPeer(endpoint)

    def send() -> None:
        try:
            while not over.is_set():
                peer.write(PART)
        except OSError:
            pass

    thread = threading.Thread(target=send, name="flood")
    thread.start()
    try:
        yield
    finally:
        over.set()
        peer.close()
        thread.join(PATIENCE_S)


@pytest.mark.parametrize("side", ["clients", "workers"])
def test_a_message_without_an_end_ends_the_controller_and_not_the_machine(side: str, tmp_path: Path) -> None:
    config = tmp_path / "controller.toml"
    config.write_text(f"memory_bytes = {200 * MIB}\nmessage_bytes = {MIB}\n")
    with ServedController("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "--config", str(config)) as controller, controller.echo("w") as worker:
        controller.wait_ready("w")
        with Client(controller.clients) as client:
            assert client.generate("m", "hello there", stream=False).text
            with flood(getattr(controller, side)):
                last = controller.wait_for("memory exceeded")
                controller.process.wait(PATIENCE_S)
                assert controller.end() == 4
        assert (last["level"], last["limit_bytes"]) == ("critical", 200 * MIB)
        assert 200 * MIB < last["held_bytes"] < 1500 * MIB
        assert (last["outbox_bytes"], last["request_bytes"], last["workers"]) == (0, 0, 1)
        assert "memory_bytes" in controller.output[-1]
        worker.end()


@pytest.mark.heavy
def test_its_clients_go_on_elsewhere(tmp_path: Path) -> None:
    config = tmp_path / "controller.toml"
    config.write_text(f"memory_bytes = {150 * MIB}\n")
    with (
        ServedController("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", "--config", str(config)) as first,
        ServedController() as second,
        first.echo("w", "--delay-per-token", "0.02", also=[second]) as worker,
    ):
        for controller in (first, second):
            controller.wait_ready("w")
        words = " ".join(f"word{number}" for number in range(250))
        with Client([first.clients, second.clients]) as client, client.generate("m", words, max_tokens=250) as stream:
            text = next(stream).text
            with flood(first.clients):
                text += "".join(chunk.text for chunk in stream)
                assert first.process.wait(PATIENCE_S) == 4
            assert stream.completion.resumed > 0
            assert text.split() == words.split()
        worker.end()


def test_an_embedded_one_ends_and_says_why() -> None:
    held = psutil.Process().memory_info().rss
    lines: list[str] = []
    controller = Controller(
        clients=["inproc://clients"], workers=["inproc://workers"], memory_bytes=held // 2, report=lambda event, **_: lines.append(event)
    )
    controller.start()
    eventually(lambda: not controller.running, PATIENCE_S, "it ends")
    with pytest.raises(MemoryExceeded, match="memory_bytes"):
        controller.stop()
    assert "memory exceeded" in lines
    assert lines[-1] == "controller down"
    controller.stop()


def test_so_does_run_in_the_callers_thread() -> None:
    controller = Controller(clients=["inproc://clients"], workers=["inproc://workers"], memory_bytes=MIB)
    with pytest.raises(MemoryExceeded):
        controller.run()
