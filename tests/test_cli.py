"""What the command says, and its exit codes, when its surroundings are not as usual."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.broker import Broker, chunk, done
from zmqserve import messages as m
from zmqserve.cli import main

from .processes import PATIENCE_S, ServedController, on_a_terminal, zmqserve

FULL = Path("/dev/full")


def test_embed_without_numpy_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert main(["embed", "m", "x", "--controller", "tcp://127.0.0.1:1"]) == 1
    assert (
        capsys.readouterr().err == 'zmqserve: embed returns numpy arrays, and numpy is not installed: pip install "zmqserve[embeddings]"\n'
    )


def test_signs_that_the_terminal_does_not_have_are_replaced() -> None:
    def answer(asked: m.Generate) -> list[object]:
        return [done(asked.rid, 0, last=chunk(asked.rid, 0, "caf\u00e9"))]

    with Broker(answer) as broker:
        asked = zmqserve("ask", "m", "x", "--raw", "--controller", broker.endpoint, env={"PYTHONIOENCODING": "ascii"})
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, "caf?\n", "")


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_is_full_is_one_sentence(unbuffered: str) -> None:
    with Broker(lambda asked: [m.Models(asked.rid, [])]) as broker, FULL.open("w") as full:
        command = [sys.executable, "-m", "zmqserve", "models", "--controller", broker.endpoint]
        told = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert (told.returncode, told.stderr) == (1, "zmqserve: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("command", [["models"], ["status"], ["drain", "w"], ["ask", "m", "x"]])
@pytest.mark.parametrize("value", ["nan", "-1", "0", "inf"])
def test_a_timeout_that_is_none_is_a_usage_error(command: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, f"--timeout={value}", "--controller", "tcp://127.0.0.1:1"]) == 2
    assert "timeout_s must be a number of seconds above 0" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["models"], ["status"], ["drain", "w"], ["ask", "m", "x"]])
def test_the_timeout_holds_for_every_command(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A controller that answers nothing but Pings."""
    with Broker() as broker:
        assert main([*command, "--timeout", "0.2", "--controller", broker.endpoint]) == 1
    assert capsys.readouterr().err == "zmqserve: no end came within the deadline of 0.2 s\n"


def test_what_ended_an_answer_stands_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with ServedController() as controller, controller.echo("w", "--faults"):
        controller.wait_ready("w")
        for prompt, said in (("a b !raise", "a b\n"), ("!raise", "")):
            assert main(["ask", "m", prompt, "--controller", controller.clients]) == 1
            told = capsys.readouterr()
            assert told.out == said
            assert told.err.startswith("zmqserve: ")


def test_a_model_without_a_name_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["worker", "echo", "--model", ""])
    assert capsys.readouterr().err.endswith("argument --model: must not be empty\n")


@pytest.mark.parametrize(
    ("stdin", "why"),
    [
        (io.TextIOWrapper(io.BytesIO(b"a\xff"), "utf-8"), "'utf-8' codec can't decode byte 0xff in position 1: invalid start byte"),
        (None, "it is closed"),
    ],
    ids=["no text", "closed"],
)
def test_a_prompt_that_cannot_be_read_is_a_usage_error(
    stdin: io.TextIOWrapper | None, why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["ask", "m", "-", "--controller", "tcp://127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == f"zmqserve: no prompt can be read from standard input: {why}\n"


def test_a_wrong_endpoint_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--controller", "tcp://*:5570"]) == 2
    assert "'tcp://*:5570' is not a usable endpoint" in capsys.readouterr().err


HOSTILE = "a\x1b]0;title\x07b\rc\x9b2Jd\x7f"
ESCAPED = "a\\u001b]0;title\\u0007b\\u000dc\\u009b2Jd\\u007f"


def hostile(asked: Any) -> list[object]:
    """The answers of a controller, or a worker, that would like to write elsewhere on the terminal of who asks."""
    match asked:
        case m.Generate(model="fails"):
            return [m.Error(asked.rid, 50001, f"BackendError: {HOSTILE}")]
        case m.Generate():
            last = m.Done(asked.rid, 1, ["stop"], m.Usage(1, 2), m.Timings(HOSTILE), chunk(asked.rid, 1, f"{HOSTILE}\tlast"))
            return [chunk(asked.rid, 0, f"{HOSTILE}\n"), last]
        case m.ListModels():
            card = m.ModelCard(f"m{HOSTILE}", verbs=["generate", f"{HOSTILE}\nx"])
            return [m.Models(asked.rid, [m.ModelStatus(card, "ready", ["w"])])]
    worker = m.WorkerStatus(f"w{HOSTILE}", HOSTILE, "ready", ["m"], 1, 0)
    state = m.ControllerStatus(HOSTILE, HOSTILE, 1, "lottery", 1.0, [HOSTILE], [HOSTILE], [worker], [])
    return [m.StatusReply(asked.rid, state)]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["ask", "m", "x", "--raw", "--stats"], [f"{ESCAPED}\n{ESCAPED}\tlast\n", f"worker {ESCAPED}\n"]),
        (["ask", "fails", "x", "--raw"], [f"zmqserve: BackendError: {ESCAPED}\n"]),
        (["models"], [f"\nm{ESCAPED}  ready", f"generate,{ESCAPED}\\u000ax\n"]),
        (["status"], [f"controller {ESCAPED}, ", f"clients on {ESCAPED}; workers on {ESCAPED}\n", f"\nw{ESCAPED}  {ESCAPED}  ready"]),
        (["status", "--json"], ['"controller": "a\\u001b]0;title\\u0007b\\rc\\u009b2Jd\\u007f"']),
    ],
    ids=["an answer", "an error", "models", "status", "JSON"],
)
def test_what_peers_say_does_not_move_a_terminals_cursor(command: list[str], told: list[str]) -> None:
    with Broker(hostile) as broker:
        shown = on_a_terminal("-m", "zmqserve", *command, "--controller", broker.endpoint)
    assert [text for text in told if text not in shown] == [], shown
    assert [sign for sign in shown if not sign.isprintable() and sign not in "\n\t"] == []
    if "--json" in command:
        assert json.loads(shown)["controller"] == HOSTILE


def test_what_is_no_terminal_gets_answers_as_they_are() -> None:
    with Broker(hostile) as broker:
        asked = subprocess.run(
            [sys.executable, "-m", "zmqserve", "ask", "m", "x", "--raw", "--controller", broker.endpoint],
            capture_output=True,
            timeout=PATIENCE_S,
            check=True,
        )
    assert asked.stdout.decode() == f"{HOSTILE}\n{HOSTILE}\tlast\n"
