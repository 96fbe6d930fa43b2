"""The code of README and docs/pipelines.md runs as it stands there; only the endpoints are those of the test's network."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from .processes import PATIENCE_S, ServedController, network

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "pipelines.md")
BLOCKS = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
RAW = next(block for block in BLOCKS if "zmq.REQ)" in block)
STREAMED = next(block for block in BLOCKS if "zmq.DEALER" in block)


def run(block: str, endpoint: str) -> str:
    """Run a block in a Python of its own; returns what it printed."""
    code = block.replace("tcp://127.0.0.1:5570", endpoint)
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_client_block() -> None:
    block = next(block for block in BLOCKS if "client.chat" in block)
    with network("w") as (controller, _):
        lines = run(block, controller.clients).splitlines()
    assert lines == ["a b c a ba b c a b length 5 w", "hello there", "(2, 384) 3 ['m']"]


def test_the_asyncio_block() -> None:
    block = next(block for block in BLOCKS if "client.map" in block)
    with network("w", worker_arguments=("--slots", "8")) as (controller, _):
        assert run(block, controller.clients).splitlines() == ["a b c a b200", "0 x y", "1 z z"]


def test_the_embeddings_block() -> None:
    """An echo worker stands in for the model: it has as many dimensions."""
    block = next(block for block in BLOCKS if "truncate_tokens" in block)
    with ServedController() as controller, controller.echo("w", model="all-minilm-l6-v2"):
        controller.wait_ready("w")
        assert run(block, controller.clients).splitlines() == ["(3, 384) [1. 1. 1.]", "(1, 64)"]


def test_the_failover_block() -> None:
    block = next(block for block in BLOCKS if "reply.resumed" in block)
    with network("w") as (controller, _):
        assert run(block, controller.clients).splitlines() == ["a b c 0", "a", " b", " c"]


def test_the_worker_block() -> None:
    block = next(block for block in BLOCKS if "class Shout" in block)
    assert run(block, "not used").splitlines()[-1] == "MAKE IT LOUD "


def test_the_raw_block() -> None:
    with network("w") as (controller, _):
        assert run(RAW, controller.clients) == "a b c a b\n"
        assert run(RAW.replace('"m"', '"nope"'), controller.clients) == "error 40301: no worker serves model 'nope'; known: m\n"


@pytest.mark.parametrize("devices", [1, 2])
def test_the_raw_blocks_through_proxies(devices: int) -> None:
    with network("w") as (controller, _), proxies(controller.clients, devices) as endpoint:
        assert run(RAW, endpoint) == "a b c a b\n"
        assert run(STREAMED, endpoint) == "a b c a b"


def test_the_dealer_block() -> None:
    with network("w") as (controller, _):
        assert run(STREAMED, controller.clients) == "a b c a b"
        assert run(STREAMED.replace('"m"', '"nope"'), controller.clients) == "error 40301: no worker serves model 'nope'; known: m\n"


@pytest.mark.parametrize("devices", [0, 1])
def test_the_poller_block(devices: int) -> None:
    block = next(block for block in BLOCKS if "PolledClient(" in block)
    with network("w") as (controller, _), proxies(controller.clients, devices) as endpoint:
        assert run(block, endpoint) == "a b c a b"


def test_the_inproc_block() -> None:
    block = next(block for block in BLOCKS if "Controller(context=context" in block)
    assert run(block, "not used") == "a b c\n"


def test_the_bridge_block() -> None:
    block = next(block for block in BLOCKS if "with Bridge(" in block)
    with network("w") as (controller, _):
        lines = run(block, controller.clients).splitlines()
    assert lines == ["0 {'file': 'f'} a b c a", "1 {'file': 'f'} x y x y", "2 {'file': 'f'} InvalidParameter"]


@contextmanager
def proxies(endpoint: str, count: int) -> Iterator[str]:
    """So many C proxies in a row, each a ROUTER for clients and a DEALER towards the next."""
    context = zmq.Context()
    threads, controls, sockets = [], [], []
    try:
        for number in range(count):
            front, back, control, steer = (context.socket(kind) for kind in (zmq.ROUTER, zmq.DEALER, zmq.PAIR, zmq.PAIR))
            sockets += [front, back, control, steer]
            back.connect(endpoint)
            port = front.bind_to_random_port("tcp://127.0.0.1")
            control.bind(f"inproc://control{number}")
            steer.connect(f"inproc://control{number}")
            thread = threading.Thread(target=zmq.proxy_steerable, args=(front, back, None, steer))
            thread.start()
            threads.append(thread)
            controls.append(control)
            endpoint = f"tcp://127.0.0.1:{port}"
        yield endpoint
    finally:
        for control, thread in zip(controls, threads, strict=True):
            control.send(b"TERMINATE")
            thread.join()
        for socket in sockets:
            socket.close(0)
        context.term()
