"""Every Python program under examples/ does what it says, against a network like the one that examples/README.md names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import Served, ServedController
from zmqserve import Client, Unsupported

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ServedController() as controller, controller.echo("w", "--slots", "64", model="demo"):
        controller.wait_ready("w")
        yield controller.clients


def run(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (done.stderr, done.returncode) == ("", 0)
    return done.stdout.splitlines()


def test_quick_start(endpoint: str) -> None:
    assert run("quick_start.py", endpoint) == [
        "Hello from a stream",
        "a whole answer | length | 3 tokens by w",
        "Hi there Hi there Hi there Hi there",
        "2 tokens in the conversation",
        "no worker serves model 'no-such-model'; known: demo",
    ]


def test_fan_out(endpoint: str) -> None:
    answers = ["200 streams, 1600 words", "0 prompt 0", "25 prompt 25", "50 prompt 50", "75 prompt 75"]
    assert run("fan_out.py", endpoint) == [*answers, "cancelled: True", "deadline: 40801"]
    with Client(endpoint) as client:
        assert client.status().workers[0].running == 0, "the cancelled one and the late one have ended on the worker"


def test_poll_loop(endpoint: str) -> None:
    assert sorted(run("poll_loop.py", endpoint)) == ["four five four five", "one two three one"]


def test_pipeline(endpoint: str) -> None:
    rows = [f"{row} {{'page': {row // 2}}} row {row} of many" for row in range(5)]
    lines = [line.rstrip() for line in run("pipeline.py", endpoint)]
    assert (lines[:5], lines[6:]) == (rows, ["bridge: 0"])
    assert lines[5].startswith("bad InvalidParameter ")
    assert "temperature" in lines[5]


def test_controller_inside() -> None:
    assert run("controller_inside.py") == ["all in one process", "[True]", "stopped"]


def test_a_backend_of_another_package_is_found_by_its_entry_point(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    shutil.copytree(EXAMPLES / "custom_backend", source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--target", str(site))
    install = [sys.executable, "-m", "pip", "install", *options, str(source)]
    subprocess.run(install, check=True, timeout=120)
    env = os.environ | {"PYTHONPATH": str(site)}
    arguments = ("worker", "shout", "--model", "loud", "--worker-name", "shouter", "--pause", "0.001")
    with (
        ServedController() as controller,
        Served(*arguments, "--controller", controller.workers, env=env),
        Client(controller.clients) as client,
    ):
        controller.wait_ready("shouter")
        reply = client.generate("loud", "hello there world", stream=False, max_tokens=2)
        assert (reply.text, reply.finish_reason, reply.usage.prompt_tokens) == ("HELLO THERE ", "length", 3)
        with pytest.raises(Unsupported, match="temperature"):
            client.generate("loud", "x", stream=False, temperature=0.5)
