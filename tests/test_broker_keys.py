"""Keys that are revoked and rules that change under a Broker, and routing ids that others take: nobody inherits anything."""

from __future__ import annotations

from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.access import UNREAD
from zmqserve.rules import parse_rules

from .fakes.keyed import asked, network_of, refusal
from .fakes.keys import ALICE, BOB, GPU, GPU2, Ring
from .fakes.network import Network, card

# --- revoking and changing


def test_a_revoked_client_is_told_and_its_work_ends() -> None:
    network = network_of()
    worker = network.worker("w", user=GPU, slots=1)
    alice, bob = network.client(user=ALICE), network.client(user=BOB)
    alice.generate(1)
    worker.task(1).first()
    alice.generate(2)
    bob.generate(3)
    network.broker.keys_changed(network.now, Ring().without(ALICE), None)
    assert {alice.error(1).code, alice.error(2).code} == {40102}
    assert worker.task(1).cancelled
    alice.send(m.Generate(4, "m", prompt="hi"))
    alice.send(m.Cancel(1))
    assert [end.code for end in alice.got[-2:]] == [40102, 40102]
    worker.task(1).more()
    worker.task(1).done("cancelled")
    assert not any(isinstance(message, m.Chunk) for message in alice.got[1:])
    worker.task(3).done()
    assert isinstance(bob.end(3), m.Done)
    assert network.counters["clients: key revoked"] == 1
    assert network.ends()[0]["outcome"] == "key revoked"
    network.broker.keys_changed(network.now, Ring(), None)
    alice.generate(5)
    worker.task(5).done()
    network.check()


def test_a_revoked_worker_is_fenced_and_its_requests_move() -> None:
    network = network_of()
    first, second = network.worker("w1", user=GPU), network.worker("w2", user=GPU2)
    client = network.client(user=ALICE)
    for rid in (1, 2):
        client.generate(rid)
    task = first.tasks[0]
    network.broker.keys_changed(network.now, Ring().without(GPU), None)
    assert not first.is_registered()
    task.first()
    task.done()
    assert client.got == []
    first.ready(first.told()[-1])
    assert refusal(first).code == 40102
    assert refusal(first).retry_after_ms is None
    while second.tasks:
        assert second.tasks[0].head.attempts == 0
        second.tasks[0].done()
    assert isinstance(client.end(1), m.Done)
    assert isinstance(client.end(2), m.Done)
    network.assert_clean()


def test_a_worker_whose_key_loses_a_model_is_fenced_and_others_are_not() -> None:
    network = network_of()
    one, two = network.worker("w1", card("a"), user=GPU), network.worker("w2", card("b"), user=GPU)
    network.broker.keys_changed(network.now, Ring(), parse_rules("[keys.gpu]\nmodels = ['b']", ""))
    assert not one.is_registered()
    assert two.is_registered()
    one.ready(one.told()[-1])
    assert refusal(one).code == 40103
    assert "'a'" in refusal(one).why


@pytest.mark.parametrize("by", ["rules", "offer", "revoked"])
def test_clients_learn_no_rules_of_a_worker_that_is_given_up_for_them(by: str) -> None:
    network = network_of("[keys.gpu]\nmodels = ['open', 'secret-*']")
    worker = network.worker("w", card("open"), card("secret-1"), user=GPU)
    alice = network.client(user=ALICE)
    alice.generate(1, "open")
    worker.task(1).first()
    if by == "offer":
        worker.cards = [card("open"), card("hidden")]
        worker.ready(worker.epoch)
    else:
        rules = parse_rules("[keys.gpu]\nmodels = ['open', 'hidden-*']", "") if by == "rules" else None
        network.broker.keys_changed(network.now, Ring().without(*([GPU] if by == "revoked" else [])), rules)
    assert not worker.is_registered()
    error = alice.error(1)
    assert (error.code, error.message) == (50007, "worker w was lost (the controller refused it)")
    why = {"rules": "may not serve model 'secret-1'", "offer": "may not serve model 'hidden'", "revoked": "this key is not one"}
    assert [why[by] in report["why"] for report in network.reports if report["event"] == "worker gone"] == [True]


def test_rules_alone_may_change_and_hold_from_the_next_request() -> None:
    network = network_of()
    worker = network.worker("w", user=GPU)
    alice = network.client(user=ALICE)
    alice.generate(1)
    network.broker.keys_changed(network.now, Ring(), parse_rules("[keys.alice]\ndeny = ['m:*']", ""))
    assert asked(alice, m.Generate(2, "m", prompt="hi")).code == 40104
    worker.task(1).done()
    assert isinstance(alice.end(1), m.Done)


def test_keys_cannot_change_where_there_are_none() -> None:
    with pytest.raises(RuntimeError, match="without keys"):
        Network().broker.keys_changed(1000.0, Ring(), None)


# --- routing ids are the peer's choice


@pytest.mark.parametrize(
    "message",
    [m.Cancel(1), m.Ping(1, [1]), m.Generate(1, "m", prompt="mine"), m.Hello(1), m.Status(1), b"\xc1"],
    ids=lambda each: type(each).__name__,
)
def test_who_takes_a_routing_id_takes_nothing_with_it(message: Any) -> None:
    """Its owner has gone, or libzmq would let nobody have it: what it had open ends, and the other begins with nothing."""
    network = network_of("[keys.alice]\nrequests_in_flight = 1")
    worker = network.worker("w", user=GPU, slots=1)
    alice = network.client(b"\0same", user=ALICE)
    alice.generate(1)
    worker.task(1).first()
    thief = network.client(b"\0same", user=BOB)
    thief.send(message)
    assert network.counters["clients: client gone"] == 1
    worker.task(1).more()
    worker.task(1).done("cancelled")
    assert not any(isinstance(each, m.Chunk | m.Done) for each in thief.got)
    if isinstance(message, m.Generate):
        worker.task(1).done()
        assert isinstance(thief.end(1), m.Done)
    network.check()
    assert not network.broker.flights.open


@pytest.mark.parametrize("kind", [m.READY, m.LOAD, m.DRAINING, m.BYE, m.FIRST, m.MORE, m.DONE])
def test_nor_does_a_worker_that_takes_anothers(kind: int) -> None:
    network = network_of()
    owner = network.worker("w", user=GPU)
    client = network.client(user=ALICE)
    client.generate(1)
    task = owner.task(1)
    thief = network.worker("thief", identity=owner.identity, user=GPU2, register=False)
    thief.say(kind, m.encode(m.Load(0, 0, 0)), epoch=owner.epoch, client=task.client, rid=1)
    assert not thief.is_registered()
    assert client.got == []
    assert thief.kinds() in ([m.REREGISTER], [m.REFUSED])


@pytest.mark.parametrize("kind", [m.READY, m.LOAD, m.BYE, m.DONE])
def test_a_frame_forged_behind_anothers_routing_id_harms_nobody(kind: int) -> None:
    """A reader out of step takes a frame of one worker for the routing id of another's message; the key is still the sender's."""
    network = network_of()
    owner = network.worker("w", user=GPU)
    forger = network.worker("forger", identity=owner.identity, user=GPU2, register=False)
    forger.say(kind, m.encode(m.Load(0, 0, 0)), epoch=owner.epoch, certain=False)
    assert network.broker.registry.by_name["w"].user == GPU
    assert network.counters["dropped: forged"] == 1
    assert forger.got == []


def test_a_worker_that_registers_again_out_of_step_says_so_once_more() -> None:
    network = network_of()
    worker = network.worker("w", user=GPU)
    worker.user = UNREAD
    worker.ready(0)
    assert not worker.is_registered()
    number = worker.told()[-1]
    worker.user = GPU
    worker.ready(number)
    assert worker.is_registered()
    worker.user = UNREAD
    worker.ready(worker.epoch, slots=3)
    assert (worker.seen.slots, worker.seen.user) == (3, GPU)
