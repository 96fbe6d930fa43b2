"""Models that may have only a part of their worker's slots: counted exactly, full without holding others up, tried again in time."""

from __future__ import annotations

from collections import Counter
from itertools import count
from random import Random
from typing import Any

import pytest
from scipy.stats import chisquare

from zmqserve import messages as m
from zmqserve.backends.echo import EchoWorker
from zmqserve.config import ControllerConfig
from zmqserve.dispatch import Lottery, ShortestQueue
from zmqserve.errors import InvalidParameter
from zmqserve.need import Need
from zmqserve.pool import NewPolicy
from zmqserve.registry import Registry, Worker
from zmqserve.share import Share
from zmqserve.waiting import WaitingRoom

from .fakes.controller import FakeController
from .fakes.hierarchy import Tree
from .fakes.network import Network, card
from .fakes.scripted import ScriptedClient, ScriptedWorker, Task
from .fakes.workers import WAIT_S, config

GENERATE = Need("generate")


def shared(network: Network, name: str = "w", *, a: int | None = 2, b: int | None = None, slots: int = 10, **offer: Any) -> ScriptedWorker:
    """A worker of models a and b with these shares."""
    return network.worker(name, card("a", aliases=["alias"], slots=a), card("b", slots=b), slots=slots, **offer)


def offers(worker: ScriptedWorker, *, a: int | None, b: int | None = None, **offer: Any) -> None:
    """It says READY again, with other shares."""
    worker.cards = [card("a", aliases=["alias"], slots=a), card("b", slots=b)]
    worker.ready(worker.epoch, **offer)


def ask(client: ScriptedClient, model: str, rids: range) -> None:
    for rid in rids:
        client.generate(rid, model)


def rids(worker: ScriptedWorker) -> list[int]:
    return [task.rid for task in worker.tasks]


def finish(network: Network, *workers: ScriptedWorker) -> None:
    """Answer all that runs and waits."""
    while tasks := [task for worker in workers for task in worker.tasks]:
        tasks[0].done()
        network.check()
    network.assert_clean()


# --- counting


@pytest.mark.parametrize("dispatch", ["shortest_queue", "lottery"])
def test_a_flood_for_one_model_leaves_the_other_slots_free(dispatch: str) -> None:
    network = Network(dispatch=dispatch)
    client, worker = network.client(), shared(network)
    for rid in range(1, 11):
        client.generate(rid, "alias" if rid % 2 else "a")
    assert rids(worker) == [1, 2]
    network.client().generate(20, "b")
    assert rids(worker) == [1, 2, 20]
    network.check()
    worker.task(2).done()
    assert rids(worker) == [1, 20, 3]
    finish(network, worker)
    assert not any(share.running for share in worker.seen.shares.values())


def test_what_takes_no_slot_takes_no_share() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=1)
    client.generate(1, "a")
    client.request(m.CountTokens(2, "a", prompt="x"))
    client.request(m.Embed(3, "a", texts=["x"]))
    assert rids(worker) == [1, 2]
    network.check()
    worker.task(2).failed()
    assert rids(worker) == [1]
    finish(network, worker)


@pytest.mark.parametrize("dispatch", ["shortest_queue", "lottery"])
@pytest.mark.parametrize("seed", range(5))
def test_shares_are_never_exceeded_and_never_left_idle(dispatch: str, seed: int) -> None:
    """`Network.check` says after each step whether a request waits while a worker has room for it."""
    network, random, serial = Network(dispatch=dispatch, client_requests=10**4), Random(seed), count(1)
    client = network.client()
    workers = [
        shared(network, f"w{n}", a=random.choice((1, 2, None)), b=random.choice((1, 3, 9, None)), slots=random.randrange(1, 6))
        for n in range(4)
    ]
    for _ in range(400):
        tasks = [task for worker in workers for task in worker.tasks]
        if random.random() < 0.55 or not tasks:
            client.generate(next(serial), random.choice("aaab"), affinity=random.choice((None, "s")), priority=random.randrange(2))
        else:
            random.choice(tasks).done()
        network.check()
        for worker in workers:
            seen = worker.seen
            for share in seen.shares.values():
                assert share.running <= share.of(seen.slots)
    finish(network, *workers)


def registry(policy: NewPolicy) -> Registry:
    return Registry(policy, lambda: WaitingRoom(ControllerConfig(), count(1)))


def member(known: Registry, name: str, *cards: m.ModelCard, slots: int = 10, speed: float = 1.0) -> Worker:
    worker = Worker(name.encode(), m.Ready(m.PROTOCOL, name, "fake", "ready", list(cards), slots, speed, 3000), 1, 0.0)
    known.add(worker)
    return worker


def test_lottery_draws_by_what_each_worker_has_left_for_the_model() -> None:
    known, random = registry(Lottery), Random(3)
    one, four = member(known, "one", card("a", slots=1)), member(known, "four", card("a", slots=6))
    for _ in range(2):
        known.take(four, "a")
    drawn = Counter(known.pools["a"].pick(GENERATE, random) for _ in range(10_000))
    assert chisquare([drawn[one], drawn[four]], [2_000, 8_000]).pvalue > 0.01


def test_a_pick_does_not_look_at_workers_whose_share_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand full ones beside one with room are not asked, one after the other, for each request."""
    known = registry(ShortestQueue)
    for number in range(1000):
        known.take(member(known, f"full{number}", card("a", slots=1), card("b")), "a")
    room = member(known, "room", card("a", slots=1))
    pool = known.pools["a"]
    assert pool.pick(GENERATE, Random(1)) is room  # by now all that has changed is known
    monkeypatch.setattr(Share, "free", None)
    monkeypatch.setattr(type(pool), "serves", None)
    assert pool.pick(GENERATE, Random(1)) is room


def test_a_session_leaves_a_worker_whose_share_is_full() -> None:
    network = Network()
    client, workers = network.client(), [shared(network, name, a=1) for name in ("one", "two")]
    client.generate(1, "a", affinity="s")
    client.generate(2, "a", affinity="s")
    assert [len(worker.tasks) for worker in workers] == [1, 1]
    finish(network, *workers)


# --- changed offers


def test_a_share_that_shrinks_below_what_runs_gets_nothing_until_that_has_ended() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=4)
    ask(client, "a", range(1, 7))
    offers(worker, a=2)
    network.check()
    for rid in (1, 2):
        worker.task(rid).done()
        assert rids(worker) == list(range(rid + 1, 5))
    worker.task(3).done()
    assert rids(worker) == [4, 5]
    finish(network, worker)


@pytest.mark.parametrize("more", [3, 10, 99, None])
def test_a_share_that_grows_is_used_at_once(more: int | None) -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=1)
    ask(client, "a", range(1, 21))
    assert rids(worker) == [1]
    offers(worker, a=more)
    assert len(worker.tasks) == min(10, more or 10)
    finish(network, worker)


def test_a_model_that_leaves_and_comes_back_keeps_what_runs_in_its_share() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=2)
    ask(client, "a", range(1, 4))
    worker.cards = [card("b")]
    worker.ready(worker.epoch)
    worker.task(1).done()
    offers(worker, a=2)
    assert rids(worker) == [2, 3]
    finish(network, worker)
    offers(worker, a=2)
    worker.cards = [card("b")]
    worker.ready(worker.epoch)
    assert list(worker.seen.shares) == ["b"], "what is neither offered nor runs is forgotten"


def test_a_new_offer_is_tried_whatever_busy_said_of_the_old_one() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=2)
    ask(client, "a", range(1, 5))
    worker.task(2).busy()
    worker.task(1).busy()
    assert worker.tasks == []
    offers(worker, a=3)
    assert rids(worker) == [1, 2, 3]
    finish(network, worker)


# --- BUSY, where others have a part of it


def test_busy_fills_that_model_only() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=2)
    ask(client, "a", range(1, 4))
    worker.task(2).busy()
    assert (rids(worker), network.counters["busy"]) == ([1], 1)
    ask(client, "b", range(10, 13))
    assert rids(worker) == [1, 10, 11, 12]
    worker.task(1).done()
    assert rids(worker) == [10, 11, 12, 2], "what one of our own leaves is ours to try, and who was refused is next"
    worker.load(running=5, yours=4)
    assert rids(worker) == [10, 11, 12, 2, 3]
    finish(network, worker)
    assert network.reports[-1]["attempts"] == 0


def test_a_heartbeat_lets_a_part_of_what_seemed_taken_be_tried() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=8, slots=20)
    ask(client, "a", range(1, 13))
    for rid in range(1, 9):
        worker.task(rid).busy()
    assert worker.tasks == []
    tried = []
    for _ in range(3):
        worker.load(running=12, yours=0)
        tried.append(len(worker.tasks))
        while worker.tasks:
            worker.tasks[0].busy()
        network.check()
    assert tried == [2, 2, 2]
    worker.load(running=3, yours=0)
    assert len(worker.tasks) == 5, "others have three of all models, so no more of this one"
    worker.load(running=5, yours=5)
    assert len(worker.tasks) == 8
    finish(network, worker)


def test_what_seemed_taken_is_tried_a_slot_at_a_time_when_it_is_little() -> None:
    share = Share()
    share.offer(100, 1000)
    share.refused(1000)
    seen = []
    while share.relent(1000):
        seen.append(share.others)
    assert seen[:4] == [75, 57, 43, 33]
    assert seen[-4:] == [3, 2, 1, 0]
    assert len(seen) < 20
    assert share.free(1000, 1000) == 100


def test_busy_of_a_model_with_all_slots_fills_the_worker() -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=2)
    client.generate(1, "b")
    client.generate(2, "b")
    worker.task(2).busy()
    client.generate(3, "a")
    assert rids(worker) == [1]
    worker.load(running=1, yours=1)
    assert sorted(rids(worker)) == [1, 2, 3]
    finish(network, worker)


@pytest.mark.parametrize("bound", [10, 11])
def test_a_share_of_all_slots_is_none(bound: int) -> None:
    network = Network()
    client, worker = network.client(), shared(network, a=bound)
    client.generate(1, "a")
    worker.task(1).busy()
    client.generate(2, "b")
    assert worker.tasks == []
    worker.load(running=0, yours=0)
    finish(network, worker)


def test_busy_after_the_model_has_left_the_worker() -> None:
    network = Network(orphan_grace_s=1.0)
    client, worker = network.client(), shared(network, a=2)
    client.generate(1, "a")
    worker.cards = [card("b")]
    worker.ready(worker.epoch)
    worker.task(1).busy()
    network.check()
    client.generate(2, "b")
    assert rids(worker) == [2]
    worker.load()
    offers(worker, a=1)
    assert rids(worker) == [2, 1]
    finish(network, worker)


class Shared:
    """A worker of two controllers with a share for a, as a real one is: BUSY beyond it, and LOADs that tell the sum over all models."""

    def __init__(self, networks: list[Network], a: int) -> None:
        self.a = a
        self.sides = [shared(network, a=a, slots=20) for network in networks]
        self.running: list[Task] = []

    def end(self, task: Task, *, others_first: bool) -> None:
        """Its DONE and the LOADs leave at the same time: one comes before the other."""
        task.worker.forget(task)
        if others_first:
            self.tell(but=task.worker)
        task.done()
        self._take()
        self.tell(but=task.worker)

    def tell(self, but: ScriptedWorker | None = None) -> None:
        """Each hears of the others' load; what it then sends beyond the share is refused."""
        for side in [side for side in self.sides if side is not but]:
            side.load(running=sum(len(each.tasks) for each in self.sides), yours=len(side.tasks))
            self._take()

    def _take(self) -> None:
        self.running = [task for task in self.running if task in task.worker.tasks]
        for task in [task for side in self.sides for task in side.tasks if task not in self.running]:
            if len(self.running) < self.a:
                self.running.append(task)
            else:
                task.busy()


def test_two_controllers_share_a_models_slots_and_both_are_served() -> None:
    networks = [Network(seed=seed) for seed in (1, 2)]
    worker = Shared(networks, a=4)
    clients = [network.client() for network in networks]
    for rid in range(1, 61):
        clients[rid % 2].generate(rid, "a")
    worker.tell()
    random, ended = Random(1), [0, 0]
    while worker.running:
        both_ask = all(len(network.broker.registry.pools["a"].waiting) for network in networks)
        assert len(worker.running) == 4 or not both_ask, "no slot is idle while requests wait"
        task = worker.running[0]
        ended[task.rid % 2] += both_ask
        worker.end(task, others_first=random.random() < 0.5)
        for network in networks:
            network.check()
    assert min(ended) >= 10, "nobody starves while both ask"
    assert sum(network.counters["busy"] for network in networks) > 0
    for network in networks:
        network.assert_clean()


# --- what is told of it


@pytest.mark.parametrize("slots", [0, -1, m.MAX_SLOTS + 1])
def test_a_backend_whose_model_could_never_be_asked_does_not_start(slots: int) -> None:
    class Wrong(EchoWorker):
        def load(self) -> list[m.ModelCard]:
            return [m.ModelCard("a", slots=slots)]

    with FakeController() as controller:
        worker = Wrong(config(controller))
        worker.start()
        with pytest.raises(InvalidParameter, match=rf"slots of model 'a' .*got {slots}"):
            worker.wait_ready(WAIT_S)
        worker.stop()


def test_a_models_slots_are_those_that_it_may_have() -> None:
    network = Network()
    shared(network, "one", a=2, slots=10)
    shared(network, "two", slots=5, a=None)
    shared(network, "three", slots=1, a=3)
    client = network.client()
    client.send(m.ListModels(1))
    assert {model.card.name: model.slots for model in client.got[-1].models} == {"a": 8, "b": 16}


def test_a_child_tells_its_parent_the_slots_of_each_model() -> None:
    """So the parent sends no model more than fits."""
    tree = Tree()
    a, b = tree.chain(2)
    one, two = b.worker("one", card("m"), slots=2), b.worker("two", card("k", slots=1), card("l"), slots=3)
    tree.run()
    (child,) = a.broker.registry
    assert child.slots == 5
    assert {name: share.slots for name, share in child.shares.items()} == {"m": 2, "k": 1, "l": 3}
    client = a.client()
    for model, first in (("m", 1), ("k", 11), ("l", 21)):
        ask(client, model, range(first, first + 5))
    tree.run()
    assert (rids(one), rids(two)) == ([1, 2], [11, 21, 22])
    assert a.counters["busy"] == 0
    three = b.worker("three", card("m", slots=4), slots=4)
    tree.run()
    assert len(three.tasks) == 3
    while tasks := [task for worker in (one, two, three) for task in worker.tasks]:
        tasks[0].done()
        tree.run()
    tree.assert_clean()


def test_a_child_whose_workers_serve_every_model_with_all_slots_tells_none() -> None:
    tree = Tree()
    a, b = tree.chain(2)
    b.worker("one", card("m"), card("k"), slots=2)
    b.worker("two", card("m"), card("k"), slots=3)
    tree.run()
    (child,) = a.broker.registry
    assert [each.slots for each in child.cards.values()] == [None, None]
