"""Log lines never stop or end the program that writes them."""

from __future__ import annotations

import io
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from zmqserve import Client, Controller, WorkerConfig, logs
from zmqserve.backends.echo import EchoWorker
from zmqserve.flight import Flight

from .processes import PATIENCE_S, ServedController, on_a_terminal


@pytest.fixture
def written() -> Iterator[list[structlog.typing.EventDict]]:
    """What structlog was told to write; it has its defaults again afterwards."""
    with structlog.testing.capture_logs() as lines:
        yield lines
    structlog.reset_defaults()


def configure(level: int, *, cached: bool = True) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(level), cache_logger_on_first_use=cached)


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


def test_what_waits_for_a_reader_that_pauses_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few lines may hold much: an exception's text, or what a peer chose."""
    monkeypatch.setattr(logs, "MOST_BYTES", 10 * 2**20)
    reading, writing = os.pipe()
    with os.fdopen(writing, "wb") as file, os.fdopen(reading, "rb") as reader:
        lines = logs.Lines(file)
        line = b"x" * (2**20 - 1) + b"\n"
        for _ in range(200):
            lines.write(line)
        got: list[bytes] = []
        while len(got) < 150 and not any(b"log lines were dropped" in part for part in got):
            got.append(reader.readline())
            lines.write(b"later\n")
        lines.close()
    assert 10 <= got.count(line) <= 25  # those, and what was being written when the others came


def test_lines_that_wait_are_written_in_pieces_that_a_pipe_takes_whole() -> None:
    """A pipe takes a piece of PIPE_BUF bytes or none of it, so a program that is killed meanwhile leaves no half of a line."""
    pieces: list[bytes] = []

    class File(io.BytesIO):
        def write(self, data: Any) -> int:
            pieces.append(bytes(data))
            return len(data)

    written = [b"%d " % number + b"x" * (number * 37 % 900) + b"\n" for number in range(300)] + [b"y" * 9000 + b"\n"]
    lines = logs.Lines(File())
    for line in written:
        lines.write(line)
    lines.close()
    assert b"".join(pieces) == b"".join(written)
    assert all(piece.endswith(b"\n") for piece in pieces)
    assert all(len(piece) <= select.PIPE_BUF for piece in pieces[:-1])
    assert len(pieces) < 100


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


@pytest.mark.parametrize("cached", [True, False])
def test_a_logger_knows_what_is_written_as_it_is_configured_now(written: list[Any], cached: bool) -> None:
    log = logs.Logger("here")
    for level in (logging.WARNING, logging.INFO, logging.ERROR):
        configure(level, cached=cached)
        asked = (logging.INFO, logging.WARNING, logging.ERROR)
        assert [log.writes(each) for each in asked] == [each >= level for each in asked]
        log.warning("said", level_then=level)
    assert [line["level_then"] for line in written] == [logging.WARNING, logging.INFO]


def test_without_a_configuration_only_warnings_are_written() -> None:
    log = logs.Logger("here")
    assert [log.writes(level) for level in (logging.DEBUG, logging.INFO, logging.WARNING)] == [False, False, True]


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_the_line_of_a_request_is_made_only_where_it_is_written(written: list[Any], monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    made: list[object] = []
    log = Flight.log
    monkeypatch.setattr(Flight, "log", lambda *of: made.append(of) or log(*of))  # type: ignore[func-returns-value]
    configure(level)
    with Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"]) as controller:
        worker = EchoWorker(WorkerConfig(model="m", controllers=tuple(controller.worker_endpoints)))
        with worker, Client(controller.client_endpoints) as client:
            worker.wait_ready(PATIENCE_S)
            assert client.generate("m", "hi", stream=False).text == "hi"
    requests = [each for each in written if each["event"] == "request"]
    assert len(made) == len(requests) == (1 if level == logging.INFO else 0)
    for each in requests:
        assert (each["model"], each["verb"], each["log_level"]) == ("m", "generate", "info")


def test_what_peers_choose_does_not_move_a_terminals_cursor() -> None:
    program = "from zmqserve import logs; logs.configure(as_json=False); logs.Logger('z').info('request', trace='\\x1b[2J', model='plain')"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=PATIENCE_S, check=True).stderr
    assert b"plain" in shown
    assert b"\\x1b[2J" in shown
    assert b"\x1b[2J" not in shown


FAILS = """
from zmqserve import logs
def answer(prompt, trace):
    raise ValueError(f"no answer for {trace}")
CONFIGURED
try:
    answer("the pass" + "word", "\\x1b]0;title\\x07\\x9b2J")
except ValueError as error:
    logs.Logger("z").error("request failed", trace="\\x9b2J", exc_info=error)
"""


@pytest.mark.parametrize("configured", ["logs.configure()", "logs.configure(as_json=True)", ""])
def test_a_traceback_shows_no_locals_and_does_not_move_a_terminals_cursor(configured: str) -> None:
    """Among the locals of a backend are prompts. structlog's own way to show a traceback shows them wherever rich is installed."""
    pytest.importorskip("rich")
    shown = on_a_terminal("-c", FAILS.replace("CONFIGURED", configured))
    assert "Traceback (most recent call last)" in shown
    assert "ValueError: no answer for" in shown
    assert "\\u001b]0;title\\u0007\\u009b2J" in shown.replace("\\\\", "\\")
    assert "the password" not in shown
    assert not any(sign in shown for sign in ("\x1b]", "\x07", "\x9b"))
