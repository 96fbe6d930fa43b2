"""What a socket's monitor tells when thousands of connections end at once: all of it, a little at a time."""

from __future__ import annotations

import select
import socket as plain
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import zmq

from zmqserve import Client
from zmqserve import messages as m
from zmqserve.controller import MONITORED, Controller
from zmqserve.sockets import Binding, Monitor, SocketLimits, router

from .keyrings import Keys
from .processes import PATIENCE_S, eventually
from .test_controller import ANY, RawWorker, connected

MANY = 3 * MONITORED + 8
SOON_S = 5.0
"""A break that the monitor tells may take so long on a busy machine; beats and leases here are far slower."""
SLOW_TTL_S = 60.0


def come_and_go(endpoint: str, count: int) -> None:
    """So many connections that say nothing. When this returns libzmq has ended them all, and has told its monitor before."""
    host, port = endpoint.removeprefix("tcp://").split(":")
    with ExitStack() as stack:
        made = [stack.enter_context(plain.create_connection((host, int(port)), PATIENCE_S)) for _ in range(count)]
        for each in made:
            each.shutdown(plain.SHUT_WR)
        for each in made:
            while each.recv(256):
                pass


class Bound:
    """A controller's socket."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = router(self.context, SocketLimits())
        self.endpoint = Binding(self.socket, ANY).endpoint

    def close(self) -> None:
        self.socket.close(linger=0)
        self.context.term()


@pytest.fixture
def bound() -> Iterator[Bound]:
    with closing(Bound()) as made:
        yield made


def test_what_a_take_leaves_is_there_for_the_next(bound: Bound) -> None:
    with closing(Monitor(bound.socket)) as monitor:
        come_and_go(bound.endpoint, 20)
        taken: list[int] = []
        while not taken or monitor.more:
            taken.append(monitor.take(8))
        assert taken == [8, 8, 4]


def test_when_nothing_is_left_the_descriptor_tells_of_what_comes_next(bound: Bound) -> None:
    with closing(Monitor(bound.socket)) as monitor:
        poller = select.poll()
        poller.register(monitor.fd, select.POLLIN)
        for count in (8, 3):
            come_and_go(bound.endpoint, count)
            assert poller.poll(1000 * PATIENCE_S)
            broken = monitor.take(8)
            while monitor.more:
                broken += monitor.take(8)
            assert broken == count


def test_a_monitor_without_breaks_tells_of_handshakes_only(bound: Bound) -> None:
    told: list[int] = []
    with closing(Monitor(bound.socket, lambda event, _value: told.append(event), breaks=False)) as monitor:
        come_and_go(bound.endpoint, 5)
        assert monitor.take() == 0
        assert told == [zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL] * 5
        assert not monitor.more


@pytest.mark.parametrize("side", ["clients", "workers"])
def test_a_controller_counts_all_that_have_come_and_gone_while_it_was_busy(tmp_path: Path, side: str) -> None:
    keys = Keys(tmp_path)
    for name, role in (("boss", "admin"), ("alice", "client")):
        keys.new(name, role)

    def report(event: str, **_fields: Any) -> None:
        if event == "keys changed":  # its loop waits for this to return
            come_and_go((controller.client_endpoints if side == "clients" else controller.worker_endpoints)[0], MANY)

    controller = Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys), report=report)
    with controller, Client(controller.client_endpoints[0], **keys.as_client("boss")) as boss:
        assert boss.status().counters.get("refused handshakes: not finished", 0) == 0
        keys.revoke("alice")
        controller.reload()
        counted: list[int] = []

        def are_counted() -> bool:
            counted.append(boss.status().counters.get("refused handshakes: not finished", 0))
            return counted[-1] >= MANY

        eventually(are_counted, PATIENCE_S, f"{MANY} are counted")
        assert counted[-1] == MANY


def test_a_worker_that_breaks_off_after_many_strangers_is_missed_at_once() -> None:
    gone = threading.Event()

    def report(event: str, **_fields: Any) -> None:
        if event == "worker came":
            come_and_go(controller.worker_endpoints[0], MANY)
        elif event == "worker gone":
            gone.set()

    controller = Controller(clients=[ANY], workers=[ANY], report=report, ttl_s=SLOW_TTL_S)
    with controller, connected(controller.worker_endpoints[0]) as socket:
        worker = RawWorker(socket)
        for _ in range(2):  # the controller asks whose connections these were
            while m.read(m.decoder(m.ControllerHead), worker.socket.recv_multipart()[0]).kind != m.BEAT:
                pass
        assert not gone.is_set()
        socket.close()
        assert gone.wait(SOON_S)
