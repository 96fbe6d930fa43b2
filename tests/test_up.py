"""`zmqserve up`: what is decided about its workers, with programs in their place that only end."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from zmqserve.cli import main
from zmqserve.up import MOST_YOUNG_DEATHS, STEADY_S, Replica, exit_with_parent

from .processes import ANY, CAME, PATIENCE_S, Served, installed, zmqserve

BRIEF = """
from zmqserve import up
from zmqserve.backends.echo import EchoWorker as Worker

up.STEADY_S = 0.0
"""


def ended(code: int) -> Replica:
    """A replica whose process has ended with this code."""
    replica = Replica(0, "b", [sys.executable, "-S", "-c", f"raise SystemExit({code})"], dict(os.environ))
    assert replica.keep_running(time.monotonic()) is None
    assert replica.process is not None
    replica.process.wait(PATIENCE_S)
    return replica


def test_a_worker_that_was_drained_is_done() -> None:
    assert ended(0).keep_running(time.monotonic()) == 0


def test_a_worker_that_was_given_wrong_arguments_is_not_started_again() -> None:
    assert ended(2).keep_running(time.monotonic()) == 2


def test_a_worker_that_dies_young_is_given_up_after_some_tries() -> None:
    replica, now = ended(7), time.monotonic()
    for _ in range(MOST_YOUNG_DEATHS - 1):
        assert replica.keep_running(now) is None
        now += 60.0
        assert replica.keep_running(now) is None
        assert replica.process is not None
        replica.process.wait(PATIENCE_S)
    assert replica.keep_running(now) == 7


def test_a_worker_that_ran_steadily_once_is_started_again_whatever_kills_it() -> None:
    """As prompts do that are asked one after the other."""
    replica, now = ended(7), time.monotonic() + STEADY_S
    replica.is_ready(now - STEADY_S)
    for _ in range(2 * MOST_YOUNG_DEATHS):
        assert replica.keep_running(now) is None
        now += STEADY_S  # the longest wait
        assert replica.keep_running(now) is None
        assert replica.process is not None
        replica.process.wait(PATIENCE_S)


def test_a_worker_that_never_gets_ready_is_given_up_however_long_it_loads() -> None:
    replica, now = ended(7), time.monotonic()
    for _ in range(MOST_YOUNG_DEATHS - 1):
        now += 2 * STEADY_S
        assert replica.keep_running(now) is None
        now += 2 * STEADY_S
        assert replica.keep_running(now) is None
        assert replica.process is not None
        replica.process.wait(PATIENCE_S)
    assert replica.keep_running(now + 2 * STEADY_S) == 7


def test_workers_of_up_that_were_ready_are_started_again_whatever_kills_them(tmp_path: Path) -> None:
    env = installed(tmp_path, "brief", BRIEF)
    with Served("up", "brief", "--model", "m", "--clients", ANY, "--workers", ANY, env=env) as up:
        names = set()
        for _ in range(MOST_YOUNG_DEATHS + 1):
            names.add(up.wait_for(CAME, state="ready")["worker"])
            (worker,) = psutil.Process(up.process.pid).children()
            worker.kill()
        assert len(names) == MOST_YOUNG_DEATHS + 1
        assert all(name.startswith(f"echo-{socket.gethostname()}-") for name in names)


def test_keys_for_another_network_are_not_for_the_workers_of_up() -> None:
    keys = {"ZMQSERVE_KEY": "/no/such.key_secret", "ZMQSERVE_CONTROLLER_KEY": "/no/such.key"}
    with Served("up", "echo", "--model", "m", "--clients", ANY, "--workers", ANY, env=keys) as up:
        up.wait_for(CAME, state="ready")
        assert up.end() == 0


def test_a_worker_whose_parent_is_gone_already_leaves_at_once() -> None:
    with pytest.raises(SystemExit, match=f"process {os.getpid()}, which started this worker, is gone"):
        exit_with_parent(os.getpid())
    left = zmqserve("worker", "echo", "--model", "m", "--controller", "tcp://127.0.0.1:1", "--exit-with-parent", "1000000000")
    assert left.returncode != 0
    assert left.stderr == "zmqserve: process 1000000000, which started this worker, is gone\n"


@pytest.mark.parametrize(
    ("option", "value"),
    [("--grace", "-5"), ("--grace", "nan"), ("--grace", "x"), ("--slots", "x"), ("--slots", "0"), ("--replicas", "1.5")],
)
def test_wrong_numbers_are_usage_errors_before_anything_starts(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["up", "echo", "--model", "m", option, value])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"zmqserve up: error: argument {option}: must be ")
    assert repr(value) in told
