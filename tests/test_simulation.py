"""The simulation itself: it repeats, it finds bugs that are put into the code, and without them it finds none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from bench.simulate import HOUR_S, Total, quiet
from bench.simulation.network import Network
from bench.simulation.oracle import Violation
from bench.simulation.plants import PLANTS, planted
from bench.simulation.run import Run
from bench.simulation.scenario import KINDS
from bench.simulation.sockets import DealerSocket, RouterSocket
from bench.simulation.world import World
from zmqserve.delivery import FULL, GONE, SENT
from zmqserve.port import Port

REPOSITORY = Path(__file__).parent.parent
HOURS = 9.0
"""Simulated, in the test of many runs: about half a minute on one core."""
MOST_RUNS = 200
"""Within so many runs each planted bug must be found."""

DIGESTS = """
from bench.simulate import quiet
from bench.simulation.run import Run
with quiet():
    print([Run(seed).run().digest for seed in (2, 9, 20)])
"""


@pytest.fixture(autouse=True)
def no_log_lines() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_all_requests_end_once_and_exact_and_nothing_is_left_in_many_hours_of_faults() -> None:
    total = Total()
    seed = 1
    while total.simulated_s < HOURS * HOUR_S:
        failed = total.add(seed, KINDS, trace=False)
        assert failed is None
        seed += 1
    assert total.joins > 100
    assert set(total.faults) == set(KINDS)


def test_without_faults_every_request_is_answered() -> None:
    for seed in range(1, 6):
        outcomes = Run(seed, kinds=()).run().outcomes
        assert set(outcomes) <= {"whole and exact", "cancelled", "DeadlineExceeded"}


def test_a_seed_repeats_itself_whatever_the_order_of_sets_is() -> None:
    """The hash seed decides the order of sets of texts in a process."""
    environments = [{**os.environ, "PYTHONHASHSEED": seed} for seed in ("1", "2")]
    digests = [
        subprocess.run([sys.executable, "-c", DIGESTS], cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True).stdout
        for environment in environments
    ]
    assert digests[0] == digests[1]
    assert len(set(json.loads(digests[0]))) == 3


@pytest.mark.parametrize("name", sorted(PLANTS))
@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_a_planted_bug_is_found(name: str) -> None:
    with planted(name):
        for seed in range(1, MOST_RUNS + 1):
            try:
                Run(seed).run()
            except Violation:
                return
    pytest.fail(f"{name} was not found in {MOST_RUNS} runs")


def test_a_run_that_fails_says_how_to_repeat_it() -> None:
    arguments = ["-m", "bench", "simulate", "--seed", "1", "--hours", "2", "--plant", "doubled chunk"]
    ended = subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    figures = json.loads(ended.stdout.splitlines()[-1])
    command = figures["failed"]["command"].split()
    assert command[:5] == ["python", "-m", "bench", "simulate", "--seed"]
    assert f"seed {command[5]} failed" in ended.stdout


class _Host:
    """Counts how often it is stirred."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.paused = False
        self.stirred = 0

    def stir(self) -> None:
        self.stirred += 1


@pytest.fixture
def world() -> World:
    return World(1)


def _pair(world: World, room: int = 4) -> tuple[Network, RouterSocket, DealerSocket]:
    network = Network(world, room=room, delay_most_s=0.01, spikes=0.1)
    router = network.router(_Host("c"), "tcp://c:1")
    dealer = DealerSocket(network, _Host("u"), "tcp://c:1")
    world.run(world.now + 1.0)
    return network, router, dealer


def _read(router: RouterSocket) -> list[Any]:
    frames = [router.recv()]
    while router.getsockopt(int(zmq.RCVMORE)):
        frames.append(router.recv())
    return frames


def test_one_connection_keeps_the_order_whatever_the_delays(world: World) -> None:
    _, router, dealer = _pair(world, room=1000)
    for number in range(200):
        assert dealer.send(b"%d" % number, b"")
    world.run(world.now + 2.0)
    assert [int(_read(router)[1]) for _ in range(200)] == list(range(200))
    with pytest.raises(zmq.Again):
        router.recv()


def test_a_full_pipe_takes_nothing_until_half_of_it_was_read(world: World) -> None:
    _, router, dealer = _pair(world, room=4)
    assert [dealer.send(b"x") for _ in range(5)] == [True, True, True, True, False]
    world.run(world.now + 2.0)
    _read(router)
    assert not dealer.writable
    _read(router)
    assert dealer.writable


def test_a_port_keeps_what_a_full_pipe_does_not_take_and_sends_it_later(world: World) -> None:
    _, router, dealer = _pair(world, room=4)
    dealer.send(b"hello")
    world.run(world.now + 1.0)
    identity = _read(router)[0]
    socket: Any = router
    port = Port(socket, outbox_bytes=1000)
    assert [port.send(identity, b"%d" % number) for number in range(6)] == [SENT] * 6
    assert port.waiting_bytes > 0
    received: list[bytes] = []
    while len(received) < 6:
        world.run(world.now + 1.0)
        received += [dealer.recv()[0] for _ in range(len(dealer.inbox))]
        assert port.flush(world.now) == []
    assert received == [b"%d" % number for number in range(6)]
    assert port.waiting_bytes == 0
    assert port.send(identity, b"x" * 2000) == SENT
    assert FULL in [port.send(identity, b"x" * 2000) for _ in range(6)]


def test_a_broken_connection_is_noticed_by_both_sides_and_the_next_one_is_a_new_peer(world: World) -> None:
    network, router, dealer = _pair(world)
    dealer.send(b"one")
    world.run(world.now + 1.0)
    first = _read(router)[0]
    network.break_link(("u", "c"))
    world.run(world.now + 2.0)
    assert (router.broke, dealer.broke) == (1, 1)
    socket: Any = router
    assert Port(socket, outbox_bytes=1000).send(first, b"too late") == GONE
    dealer.send(b"two")
    world.run(world.now + 1.0)
    second = _read(router)[0]
    assert second != first


def test_a_stopped_link_delays_and_a_long_stop_breaks_the_connection(world: World) -> None:
    network, router, dealer = _pair(world)
    network.stop_link(("u", "c"))
    dealer.send(b"late")
    world.run(world.now + 3.0)
    assert router.waiting == 0
    network.restore_link(("u", "c"))
    assert _read(router)[1] == b"late"
    network.stop_link(("u", "c"))
    world.run(world.now + 20.0)
    assert dealer.connection is None
    network.restore_link(("u", "c"))
    world.run(world.now + 2.0)
    assert dealer.writable
