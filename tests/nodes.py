"""The client and the worker in Node (examples/node) as processes, for their tests; these are left out where there is no Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from zmqserve import Client

from .processes import PATIENCE_S, ServedController

FOLDER = Path(__file__).parents[1] / "examples" / "node"
WORDS = "one two three fünf 🎈 six seven"
LONG = "word " * 500


def find_node() -> str | None:
    """The system's Node, or the one that the set-up put beside Python."""
    return shutil.which("node", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


NODE = find_node()
LACKS = "" if (FOLDER / "node_modules").is_dir() else "npm's packages are not installed"
if NODE is None:
    LACKS = "Node 18 or newer is not installed"
needs_node = pytest.mark.skipif(LACKS != "", reason=f"{LACKS}: `scripts/setup.sh test` does it where it can")


def node(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([NODE or "", *map(str, arguments)], cwd=FOLDER, **options)


@contextmanager
def running(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def node_worker(controller: ServedController, name: str = "nw", *arguments: object, wait: bool = True) -> Iterator[subprocess.Popen[bytes]]:
    """A worker in Node with the toy model `m`, ready."""
    with running(node("echo_worker.mjs", "--controller", controller.workers, "--model", "m", "--name", name, *arguments)) as process:
        if wait:
            controller.wait_ready(name)
        yield process


def ask(endpoint: str, verb: str, request: dict[str, Any] | None = None, *arguments: object) -> tuple[int, list[Any]]:
    """Exit code and lines of JSON of the client in Node."""
    command = [NODE or "", "ask.mjs", "--controller", endpoint, *map(str, arguments), verb, json.dumps(request or {})]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, timeout=2 * PATIENCE_S, check=False)
    assert not done.stderr, done.stderr.decode()
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def asking(endpoint: str, verb: str, request: dict[str, Any], *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """The client in Node while it asks for something of model `m`."""
    what = json.dumps({"model": "m", **request})
    with running(node("ask.mjs", "--controller", endpoint, *arguments, verb, what, stdout=subprocess.PIPE)) as process:
        yield process


def last_line(process: subprocess.Popen[bytes]) -> Any:
    """What a client printed last, when it has ended."""
    out, _ = process.communicate(timeout=2 * PATIENCE_S)
    return json.loads(out.splitlines()[-1])


def running_on(client: Client) -> int:
    return client.status().running


def answer(endpoint: str, verb: str, **request: Any) -> Any:
    """The last line that the client in Node prints for a request that is answered."""
    code, lines = ask(endpoint, verb, {"model": "m", **request})
    assert code == 0, lines
    return lines[-1]


def error(endpoint: str, verb: str, **request: Any) -> dict[str, Any]:
    """The error that the client in Node prints."""
    code, lines = ask(endpoint, verb, {"model": "m", **request})
    assert code == 1, lines
    assert isinstance(lines[-1], dict)
    return lines[-1]
