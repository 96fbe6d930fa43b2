"""`bench dispatch` and `bench memory` measure what they say they do, at a small scale."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from bench import dispatch_load, memory
from bench.dispatch_load import BLOCK, SLOTS, WAITING_PER_WORKER, Case, loaded, measure
from bench.pure_broker import NOW, PureBroker
from zmqserve.dispatch import POLICIES


@pytest.mark.parametrize("dispatch", POLICIES)
@pytest.mark.parametrize(("affinity", "models"), [(False, 1), (True, 1), (False, 3)])
def test_a_full_network_keeps_its_queue_while_requests_come_and_end(dispatch: str, affinity: bool, models: int) -> None:
    workers = 2 * BLOCK // SLOTS
    network = loaded(Case(True, dispatch, affinity, models), workers)
    assert (len(network.running), network.waiting) == (workers * SLOTS, workers * WAITING_PER_WORKER)
    dispatch_load._block(network)
    assert (len(network.running), network.waiting) == (workers * SLOTS, workers * WAITING_PER_WORKER)
    assert network.broker.counters["ended: length"] == BLOCK


def test_in_a_half_full_network_each_request_gets_a_slot_at_once() -> None:
    network = loaded(Case(False, "shortest_queue", False, 1), 2 * BLOCK // SLOTS + 2)
    running = len(network.running)
    dispatch_load._block(network)
    assert (len(network.running), network.waiting) == (running, 0)


def test_one_session_stays_on_one_worker() -> None:
    network = PureBroker(20, slots=8, affinity=True)
    ((envelope, payload),) = network.requests(1)
    network.ask(20)
    workers = set()
    for _ in range(3):
        network.broker.from_client(NOW, envelope, payload)
        workers.add(network.running[-1][0])
        network.running[:-1] = []
        ((identity, head, done),) = network.ends(1)
        network.broker.from_worker(NOW, identity, head, done)
    assert len(workers) == 1


def test_both_sizes_are_measured_as_often() -> None:
    times = measure(Case(True, "lottery", False, 1), {"small": 8, "large": 16}, repeats=3, blocks=2)
    assert {size: len(each) for size, each in times.items()} == {"small": 3, "large": 3}
    assert all(value > 0 for each in times.values() for value in each)


@pytest.mark.heavy
def test_dispatch_ends_with_a_ratio_for_each_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch_load.run(argparse.Namespace(quick=True, small=8, large=16, out=tmp_path)) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["ratios"]) == len(result["figures"]) == 12
    (kept,) = tmp_path.glob("dispatch-*.json")
    assert json.loads(kept.read_text()) == result


def test_the_state_machine_holds_a_waiting_requests_bytes_once_and_a_streams_no_more() -> None:
    found = memory.allocated(20, 200)
    waiting, stream = found["waiting request of 1 kB"][0], found["running stream"][0]
    assert memory.PROMPT_BYTES < waiting < 2 * memory.PROMPT_BYTES
    assert 0 < stream < memory.PROMPT_BYTES
    assert found["idle worker"][0] > found["idle client"][0] == 0


@pytest.mark.heavy
def test_a_controllers_memory_grows_with_what_comes(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.run(argparse.Namespace(quick=True, out=None)) == 0
    grown = json.loads(capsys.readouterr().out.splitlines()[-1])["bytes"]
    assert set(grown) == set(memory.KINDS)
    assert grown["waiting request of 1 kB"]["process"] > memory.PROMPT_BYTES
    assert all(each["process"] > 0 for each in grown.values())
