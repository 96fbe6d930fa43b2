"""Requests that have lost a worker are tried one at a time: the one that kills must not take the others with it again."""

from __future__ import annotations

from zmqserve import messages as m
from zmqserve.pool import TRIAL_ROUNDS

from .fakes.hierarchy import Tree
from .fakes.network import Network
from .fakes.scripted import ScriptedWorker

SLOTS = 200


def running(worker: ScriptedWorker) -> set[int]:
    return {task.rid for task in worker.tasks}


def test_a_worker_tries_one_suspect_until_its_first_chunk() -> None:
    network = Network()
    worker = network.worker("w", slots=SLOTS)
    client = network.client()
    for rid in (1, 2, 3):
        client.generate(rid, attempts=1)
    assert running(worker) == {1}
    worker.task(1).first()
    assert running(worker) == {1, 2}
    worker.task(2).done()
    assert running(worker) == {1, 3}
    network.check()
    for rid in (1, 3):
        worker.task(rid).done()
    network.assert_clean()


def test_others_do_not_wait_for_a_trial() -> None:
    network = Network()
    worker = network.worker("w", slots=SLOTS)
    client = network.client()
    client.generate(1, attempts=1)
    client.generate(2, attempts=1)
    client.generate(3)
    client.request(m.CountTokens(4, "m", attempts=1, prompt="light"))
    assert running(worker) == {1, 3, 4}


def test_what_a_dead_worker_had_not_begun_is_tried_elsewhere_one_by_one() -> None:
    network = Network()
    first = network.worker("w0", slots=SLOTS)
    client = network.client()
    for rid in (1, 2, 3):
        client.generate(rid)
    second, third = network.worker("w1", slots=SLOTS), network.worker("w2", slots=SLOTS)
    first.die()
    network.advance(1.0)
    assert (len(second.tasks), len(third.tasks)) == (1, 1)
    killer = second.tasks[0]
    second.die()
    network.advance(1.0)
    assert client.error(killer.rid).code == 50007
    assert not client.error(killer.rid).retryable
    third.tasks[0].done()
    third.tasks[0].done()
    network.assert_clean()


def test_a_worker_that_left_of_its_own_will_makes_nobody_suspect() -> None:
    network = Network()
    first = network.worker("w0", slots=SLOTS)
    client = network.client()
    for rid in (1, 2, 3):
        client.generate(rid)
    second = network.worker("w1", slots=SLOTS)
    first.say(m.BYE)
    assert running(second) == {1, 2, 3}


def test_a_suspect_that_is_turned_away_or_cancelled_ends_its_trial() -> None:
    network = Network()
    worker = network.worker("w", slots=SLOTS)
    client = network.client()
    for rid in (1, 2, 3):
        client.generate(rid, attempts=1)
    client.cancel(2)
    worker.task(1).busy()
    worker.load(0, 0, 0)
    assert running(worker) == {1}
    client.cancel(1)
    worker.task(1).done("cancelled")
    assert running(worker) == {3}
    network.check()


def test_very_many_suspects_are_tried_several_at_a_time() -> None:
    """They are all tried after a bounded number of turns, whoever there is to try them."""
    network = Network()
    worker = network.worker("w", slots=SLOTS)
    client = network.client()
    for rid in range(1, SLOTS + 1):
        client.generate(rid, attempts=1)
        network.check()
    turns, most = 0, 0
    while len(worker.tasks) < SLOTS:
        waiting = [task for task in worker.tasks if not task.seq]
        most = max(most, len(waiting))
        for task in waiting:
            task.first()
        turns += 1
    assert most == SLOTS // TRIAL_ROUNDS
    assert turns < 4 * TRIAL_ROUNDS
    for task in list(worker.tasks):
        task.done()
    network.assert_clean()


def test_nothing_comes_after_the_end_of_a_request_whose_worker_died_with_its_first_chunk() -> None:
    """The trial is over, and the next suspect that is sent there finds the worker gone."""
    network = Network()
    worker = network.worker("w", slots=SLOTS)
    client = network.client()
    for rid in (1, 2):
        client.generate(rid, attempts=1)
    task = worker.task(1)
    worker.die()
    task.first()
    assert client.error(1).code == 50007
    assert [message for message in client.got if message.rid == 1][1:] == []


def test_a_suspect_of_a_parent_waits_for_its_trial_below_and_holds_up_nobody() -> None:
    tree = Tree()
    a = tree.node("a")
    client, lost = a.client(), a.worker("lost")
    client.generate(2)
    b = tree.node("b", a)
    own, worker = b.client(), b.worker(slots=SLOTS)
    own.generate(1, attempts=1)
    tree.run()
    lost.die()
    tree.run(1.5)
    assert running(worker) == {1}
    client.generate(3)
    tree.run()
    assert running(worker) == {1, 3}
    worker.task(1).first()
    tree.run()
    assert worker.task(2).head.attempts == 1
    for rid in (1, 2, 3):
        worker.task(rid).done()
    tree.assert_clean()
