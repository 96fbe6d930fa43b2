"""Log lines never stop or end the program that writes them."""

from __future__ import annotations

import os

import pytest

from zmqserve import Client, logs

from .processes import ServedController


def test_a_reader_that_pauses_loses_lines_and_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "MOST_LINES", 100)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file, os.fdopen(reading, "rb") as reader:
        lines = logs.Lines(file)
        line = b"x" * 999 + b"\n"
        for _ in range(2000):  # more than the pipe and the queue hold
            lines.write(line)
        got: list[bytes] = []
        while not any(b"log lines were dropped" in part for part in got):
            got.append(reader.readline())
            lines.write(b"later\n")
        lines.close()
    assert len([part for part in got if part == line]) < 2000


def test_a_reader_that_is_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as file:
        lines = logs.Lines(file)
        lines.write("to nobody\n")
        lines.close()


def test_a_controller_outlives_the_reader_of_its_log() -> None:
    with ServedController() as controller, controller.echo("w0"):
        controller.wait_ready("w0")
        assert controller.process.stderr is not None
        os.dup2(os.open(os.devnull, os.O_RDONLY), controller.process.stderr.fileno())  # the pipe has no reader now
        with Client(controller.clients) as client:
            for _ in range(5):
                assert client.generate("m", "still here", stream=False).text == "still here"
