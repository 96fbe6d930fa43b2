"""Who gets which slot: sessions keep their worker, a flood of one client delays nobody, and controllers never overbook a worker."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from zmqserve import Client
from zmqserve import messages as m
from zmqserve.errors import Overloaded

from .fakes.network import Network, card
from .fakes.scripted import ScriptedWorker, Task
from .processes import PATIENCE_S, ServedController, eventually

SESSIONS = 100


# --- affinity


def serve(network: Network, workers: list[ScriptedWorker]) -> dict[int, str]:
    """Answer all that runs; returns each request's worker."""
    where: dict[int, str] = {}
    while tasks := [task for worker in workers for task in worker.tasks]:
        for task in tasks:
            where[task.rid] = task.worker.name
            task.done()
        network.check()
    return where


def test_sessions_keep_their_worker_and_a_kill_moves_only_the_dead_ones() -> None:
    network = Network()
    client, rids = network.client(), count(1)
    workers = [network.worker(f"w{number}", slots=SESSIONS) for number in range(5)]

    def talk() -> list[str]:
        """Each session asks once; they all run at the same time."""
        asked = [next(rids) for _ in range(SESSIONS)]
        for session, rid in enumerate(asked):
            client.generate(rid, affinity=f"session-{session}")
        where = serve(network, workers)
        return [where[rid] for rid in asked]

    before = talk()
    assert len(set(before)) == 5
    assert all(talk() == before for _ in range(5))
    dead = workers.pop(2)
    dead.die()
    network.broker.members.disconnected(network.now)
    after = talk()
    assert "w2" not in after
    assert [now for then, now in zip(before, after, strict=True) if then != "w2"] == [then for then in before if then != "w2"]
    assert all(talk() == after for _ in range(5))
    workers.append(network.worker("w2", slots=SESSIONS))
    assert talk() == before
    network.assert_clean()


def test_a_session_whose_worker_is_full_goes_elsewhere_and_comes_back() -> None:
    network = Network()
    client = network.client()
    workers = [network.worker(f"w{number}", slots=1) for number in range(2)]
    client.generate(1, affinity="a")
    client.generate(2, affinity="a")
    homes = {task.rid: task.worker.name for worker in workers for task in worker.tasks}
    assert set(homes.values()) == {"w0", "w1"}
    serve(network, workers)
    client.generate(3, affinity="a")
    assert serve(network, workers) == {3: homes[1]}
    network.assert_clean()


# --- fairness


@pytest.mark.parametrize("verb", ["generate", "embed"])
@pytest.mark.parametrize("same_model", [True, False])
def test_a_thousand_queued_requests_delay_anothers_single_one_by_a_service_time(verb: str, same_model: bool) -> None:
    """Whatever the other asks: the worker is the same."""
    network = Network()
    greedy, modest = network.client(), network.client()
    worker = network.worker("w", card("m"), card("n"), slots=4)
    for rid in range(1, 1001):
        greedy.generate(rid)
    model = "m" if same_model else "n"
    modest.request(m.Embed(5000, model, texts=["a"]) if verb == "embed" else m.Generate(5000, model, prompt="a"))
    served = 0
    while not modest.ends(5000):
        network.advance(0.1)
        worker.tasks[0].done()
        served += 1
    assert served <= 6  # those that ran, one turn of the greedy one, and its own
    network.advance(0.1)
    while worker.tasks:
        worker.tasks[0].done()
    network.assert_clean()


def test_a_client_at_its_bound_is_told_so_and_others_still_wait() -> None:
    network = Network(client_requests=10, queue_requests=15)
    greedy, modest, third = network.client(), network.client(), network.client()
    worker = network.worker(slots=2)
    for rid in range(1, 14):
        greedy.generate(rid)
    error = greedy.error(13)
    assert (error.code, error.data["bound"], error.data["limit"], error.data["waiting"]) == (Overloaded.code, "client_requests", 10, 10)
    for rid in range(101, 106):
        modest.generate(rid)
    third.generate(200)
    assert third.error(200).data["bound"] == "queue_requests"
    assert not modest.got
    serve(network, [worker])
    network.assert_clean()


def test_retry_after_is_true_of_a_queue_with_known_service_times() -> None:
    """16 slots, 50 ms a request: what Overloaded says is when half of the line is gone, within a tenth."""
    network = Network(queue_requests=400, client_requests=400)
    client, worker = network.client(), network.worker(slots=16)
    finish: dict[int, float] = {}

    def run_until(when_s: float) -> None:
        while network.now < when_s:
            for task in worker.tasks:
                finish.setdefault(task.rid, network.now + 0.05)
            network.advance(max(0.0, min(finish[task.rid] for task in worker.tasks) - network.now) if worker.tasks else 0.05)
            for task in [task for task in worker.tasks if finish[task.rid] <= network.now]:
                task.done()

    for rid in range(1, 417):
        client.generate(rid)
    run_until(network.now + 0.2)  # something is observed
    pool = network.broker.registry.pools["m"]
    for rid in range(1000, 1000 + 400 - len(pool.waiting)):
        client.generate(rid)
    client.generate(5000)
    told_ms = client.error(5000).retry_after_ms
    assert told_ms is not None
    waiting = len(pool.waiting)
    assert waiting == 400
    run_until(network.now + told_ms / 1000)
    assert len(pool.waiting) == pytest.approx(waiting / 2, abs=waiting / 10)
    run_until(network.now + 10)
    network.assert_clean()


# --- several controllers


class Shared:
    """A worker of two controllers, as a real one is: it answers BUSY beyond its slots and tells each of the others' load."""

    def __init__(self, networks: list[Network], slots: int) -> None:
        self.slots = slots
        self.sides = [network.worker("shared", slots=slots) for network in networks]
        self.most = 0
        self.busy = 0

    def tell(self) -> None:
        """What was sent beyond its slots is refused; then all hear how full it is."""
        while len(self.tasks()) > self.slots:
            self.tasks()[-1].busy()
            self.busy += 1
            self._beat()
        self.most = max(self.most, len(self.tasks()))
        self._beat()

    def _beat(self) -> None:
        for side in self.sides:
            side.load(running=len(self.tasks()), yours=len(side.tasks))

    def tasks(self) -> list[Task]:
        return sorted((task for side in self.sides for task in side.tasks), key=lambda task: task.rid)


def test_two_controllers_never_overbook_a_worker_and_lose_nothing() -> None:
    networks = [Network(seed=seed) for seed in (1, 2)]
    shared = Shared(networks, slots=4)
    clients = [network.client() for network in networks]
    for rid in range(1, 41):
        clients[rid % 2].generate(rid)  # both find four free slots at first: neither knows of the other's yet
    shared.tell()
    ended: Counter[str] = Counter()
    while tasks := shared.tasks():
        assert len(tasks) <= 4
        ended[tasks[0].worker.network.broker.controller_id] += 1
        tasks[0].done()
        shared.tell()
        for network in networks:
            network.advance(0.05)
            network.check()
    assert sum(ended.values()) == 40
    assert shared.busy > 0
    assert shared.most == 4
    assert all(report["attempts"] == 0 for network in networks for report in network.ends())
    for network in networks:
        network.assert_clean()


def test_real_controllers_share_a_worker_of_four_slots() -> None:
    """Forty requests through two of them at once: never more than four run, and all are answered."""
    with ServedController() as one, ServedController() as two:
        arguments = ("--slots", "4", "--delay-first", "0.1", "--controller", two.workers)
        with one.echo("w", *arguments), Client(one.clients) as first, Client(two.clients) as second:
            for controller in (one, two):
                controller.wait_ready("w")
            most, began = 0, time.monotonic()
            with ThreadPoolExecutor(40) as threads:
                asked = [threads.submit((first, second)[n % 2].generate, "m", f"a {n}", stream=False) for n in range(40)]
                while not all(future.done() for future in asked):
                    most = max(most, *(client.status().workers[0].others for client in (first, second)))
                replies = [future.result() for future in asked]
            assert [reply.text for reply in replies] == [f"a {n}" for n in range(40)]
            assert 1 <= most <= 4  # as the worker tells one controller of the other's
            assert time.monotonic() - began >= 40 / 4 * 0.1  # so much four slots need
            for client in (first, second):
                eventually(lambda c=client: c.status().workers[0].free == 4, PATIENCE_S, "every slot is free again")  # type: ignore[misc]
