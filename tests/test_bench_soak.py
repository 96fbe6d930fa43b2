"""What a soak makes of its samples, and that what its churn starts lives until the soak lets go of it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from bench import soak_churn
from bench.chaos_network import Child, Network
from bench.soak_churn import Churn
from bench.soak_slopes import Sample, Slope, line, sample, slopes

from .processes import PATIENCE_S, eventually

ANSWERS = """
import signal, sys
from pathlib import Path
from bench.chaos_child import end_with_parent
end_with_parent(int(sys.argv[1]))
signal.signal(signal.SIGUSR1, lambda *_: Path(sys.argv[2] + ".answer").touch())
Path(sys.argv[2]).touch()
while True:
    signal.pause()
"""
"""A process that ends with its parent, says when it is up, and that it lives when it is asked by a signal."""
BOUNDS = {"memory_mb": 1.0, "descriptors": 2.0, "threads": 1.0}


def test_a_line_has_its_slope_and_no_error_and_noise_has_an_error() -> None:
    assert line([0.0, 1.0, 2.0, 3.0], [5.0, 7.0, 9.0, 11.0]) == pytest.approx((2.0, 0.0))
    slope, error = line([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0])
    assert slope == pytest.approx(0.2)
    assert error > slope


def test_what_rises_by_more_than_it_may_in_an_hour_is_over_and_noise_is_not() -> None:
    minutes = [Sample(60.0 * minute, 40.0 + 2.0 * minute / 60, 12 + minute % 2, 4) for minute in range(30)]
    memory, descriptors, threads = slopes("client", minutes, BOUNDS)
    assert (memory.what, memory.first) == ("client: memory_mb", 40.0)
    assert memory.last == pytest.approx(40.0 + 2.0 * 29 / 60)
    assert memory.per_hour == pytest.approx(2.0)
    assert memory.is_over
    assert not descriptors.is_over
    assert threads.per_hour == 0.0
    assert not threads.is_over
    assert not Slope("worker: memory_mb", 1.5, 0.6, 40.0, 40.5, 1.0).is_over


def test_a_sample_is_of_a_process_that_lives(tmp_path: Path) -> None:
    child = Child("sampled", [sys.executable, "-c", "input()"], tmp_path / "log", piped=True)
    assert sample(child, 0.0) is None
    child.start()
    try:
        found = sample(child, 7.0)
        assert found is not None
        assert found.at_s == 7.0
        assert found.memory_mb > 0
        assert found.descriptors >= 3
        assert found.threads >= 1
    finally:
        child.kill()
    assert sample(child, 8.0) is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere processes are not bound to the thread that started them")
def test_what_churn_has_started_lives_on_after_it_has_stopped_and_ends_when_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soak_churn, "WORKER_GAP_S", 0.05)
    monkeypatch.setattr(soak_churn, "DOWN_S", 0.0)
    monkeypatch.setattr(soak_churn, "CLIENT_GAP_S", 1e6)
    monkeypatch.setattr(soak_churn, "PROCESS_GAP_S", 1e6)
    worker = Child("worker", [sys.executable, "-c", ANSWERS, str(os.getpid()), str(tmp_path / "{start}")], tmp_path / "log")
    worker.start()
    churn = Churn(Network(tmp_path), None, [worker], [], Random(1))
    churn.start()
    try:
        eventually(lambda: worker.starts > 1, PATIENCE_S, "the worker went and came back")
        churn.stop()
        eventually((tmp_path / str(worker.starts)).exists, PATIENCE_S, "the worker is up")
        worker.send(signal.SIGUSR1)
        eventually((tmp_path / f"{worker.starts}.answer").exists, PATIENCE_S, "the worker answered")
        assert [gone.worker for gone in churn.gone] == ["worker"] * (worker.starts - 1)
        assert churn.wrong == []
        churn.close()
        eventually(lambda: worker.ended() == -signal.SIGKILL, PATIENCE_S, "the worker ended")
    finally:
        churn.close()
        worker.kill()
