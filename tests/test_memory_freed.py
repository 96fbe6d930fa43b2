"""Memory that was freed ends no controller, memory that is held does. In processes of their own: what a C library keeps is a process's."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from typing import Any

import pytest

from zmqserve.memory import TRIM_BYTES

from .processes import PATIENCE_S

GROW = """
import json, sys
from zmqserve.memory import LOOK_S, MemoryWatch

few = []

def grow():
    parts = [bytes(4000) + b"x" for _ in range(50_000)]  # 200 MB
    few.extend(parts[::100])  # these stay in use, and the memory between them stays the process's
    return parts

watch = MemoryWatch(2**50)
before = watch.held_bytes()
"""
CONTROLLER = """
parts = grow()
if "freed" in sys.argv:
    del parts
filled = watch.held_bytes()

import zmq
from zmqserve import Client, Controller
from zmqserve.errors import MemoryExceeded

ended = ""
limit = before + 100 * 2**20
with zmq.Context() as context:
    settings = {"memory_bytes": limit, "report": lambda *_, **__: None}
    controller = Controller(clients=["inproc://c"], workers=["inproc://w"], context=context, **settings)
    controller.bind()
    if "freed" in sys.argv:
        controller.start()
        with Client("inproc://c", context=context) as client:
            client.status()
        controller.stop()
    else:
        try:
            controller.run()
        except MemoryExceeded as error:
            ended = error.message
print(json.dumps({"limit": limit, "filled": filled, "after": watch.held_bytes(), "ended": ended}))
"""
WATCH = """
held = []
for now in (0.0, LOOK_S, 2 * LOOK_S, 1e6):
    watch.look(now)
    held.append(watch.held_bytes())
    grow()
print(json.dumps(held))
"""

pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="of glibc")


def run(script: str, *arguments: str) -> Any:
    command = [sys.executable, "-c", GROW + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_controller_goes_on_when_what_is_over_the_limit_was_freed() -> None:
    said = run(CONTROLLER, "freed")
    assert said["filled"] > said["limit"] > said["after"]
    assert said["ended"] == ""


def test_a_controller_ends_when_it_is_held() -> None:
    said = run(CONTROLLER, "held")
    assert said["filled"] > said["limit"]
    assert said["after"] > said["limit"]
    assert "memory_bytes" in said["ended"]


def test_a_process_that_has_grown_gives_back_what_is_free_long_before_its_limit_and_now_and_then_only() -> None:
    """It grows by 200 MB before each look but the first, and all but a few of them are free."""
    first, grown, soon, later = run(WATCH)
    assert grown - first < TRIM_BYTES
    assert soon - grown > TRIM_BYTES
    assert later - first < TRIM_BYTES
