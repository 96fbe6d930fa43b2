"""Strangers, stale epochs, forgeries and violations on the worker side of the Broker."""

from __future__ import annotations

import pytest

from zmqserve import messages as m
from zmqserve.membership import MAX_TOLD

from .fakes.network import Network


def test_a_stranger_is_told_to_register_once_per_beat() -> None:
    network = Network()
    worker = network.worker(register=False)
    for _ in range(10):
        worker.say(m.LOAD, m.encode(m.Load(0, 0, 0)))
    assert len(worker.told()) == 1
    network.advance(1.0)
    worker.say(m.LOAD, m.encode(m.Load(0, 0, 0)))
    assert len(set(worker.told())) == 2


def test_strangers_remembered_are_bounded() -> None:
    network = Network()
    for number in range(MAX_TOLD + 50):
        network.broker.members.tell_to_register(network.now, b"\0%d" % number)
    assert len(network.broker.members._told) <= MAX_TOLD
    network.advance(1.0)
    network.broker.members.tell_to_register(network.now, b"\0late")
    assert len(network.broker.members._told) == 1


def test_an_uncertain_ready_counts_only_with_the_number_told() -> None:
    network = Network()
    worker = network.worker(register=False)
    worker.ready(certain=False)
    assert not worker.is_registered()
    worker.ready(worker.told()[0] + 1, certain=False)
    assert not worker.is_registered()
    worker.ready(worker.told()[0], certain=False)
    assert worker.is_registered()


def test_an_uncertain_ready_cannot_unseat_a_registered_worker() -> None:
    network = Network()
    worker = network.worker()
    epoch = worker.epoch
    worker.ready(0, certain=False)
    assert worker.epoch == epoch
    assert network.counters["dropped: stale epoch"] == 1
    worker.ready(0)
    assert worker.epoch != epoch


def test_a_number_told_to_one_peer_is_of_no_use_to_another() -> None:
    network = Network()
    one, two = network.worker("one", register=False), network.worker("two", register=False)
    one.say(m.LOAD)
    two.say(m.LOAD)
    two.ready(one.told()[0], certain=False)
    assert not two.is_registered()


def test_nothing_of_an_old_epoch_reaches_anybody() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1, deadline_ms=60_000)
    task = worker.task(1)
    network.advance(3.5)
    assert not worker.is_registered()
    for act in (task.first, task.more, task.done):
        act()
    assert client.got == []
    worker.ready(worker.told()[0])
    assert worker.task(1).head.epoch != task.head.epoch
    task.first()
    assert client.got == []
    assert network.counters["dropped: stale epoch"] == 1
    worker.task(1).done()
    network.assert_clean()


def test_a_worker_reaches_only_clients_with_an_open_flight_on_it() -> None:
    network = Network()
    client, other = network.client(), network.client()
    one, two = network.worker("one"), network.worker("two")
    client.generate(1)
    other.generate(1)
    mine, theirs = (one, two) if one.task(1).client == 1 else (two, one)
    task = mine.task(1)
    for kind in (m.FIRST, m.MORE, m.DONE, m.FAILED, m.BUSY):
        theirs.say(kind, m.encode(m.Chunk(1, 0, 0, "x", b"")), client=task.client, rid=1)
    assert client.got == []
    assert network.counters["dropped: no open flight"] == 5


@pytest.mark.parametrize("head", [b"", b"\xc1", b"\x91" * 100_000, b"\x93\x47\xd9\xff", b"\x92\xa1\xff\x00", b"\x90"])
def test_a_head_that_is_none_fences_its_sender_where_that_is_certain(head: bytes) -> None:
    network = Network()
    worker = network.worker()
    network.broker.from_worker(network.now, worker.identity, head, b"", certain=False)
    assert worker.is_registered()
    network.broker.from_worker(network.now, worker.identity, head, b"")
    assert not worker.is_registered()
    assert worker.told()
    network.broker.from_worker(network.now, b"\0nobody", head, b"")
    network.assert_clean()


@pytest.mark.parametrize("kind", [m.WELCOME, m.REQUEST, 0, -5, 2**40])
def test_a_kind_that_workers_do_not_send_is_a_violation(kind: int) -> None:
    network = Network()
    worker = network.worker()
    worker.say(kind)
    assert not worker.is_registered()
    assert network.counters["worker violations"] == 1


def test_a_heartbeat_that_is_none_is_a_violation() -> None:
    network = Network()
    worker = network.worker()
    worker.say(m.LOAD, b"\x93\x00\x00\xff")
    assert not worker.is_registered()


def test_an_infinite_flood_of_firsts_starts_a_request_once() -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.generate(1)
    worker.task(1).first()
    network.advance(0.5)
    worker.task(1).first()
    worker.task(1).done()
    assert network.ends()[0]["first_ms"] == 0.0
    network.assert_clean()
