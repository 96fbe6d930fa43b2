"""What goes wrong, when and for how long, by chance; and how all of it is put right at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from .causes import Chronicle
from .node import Node
from .scenario import CONDITIONS, Scenario
from .workers import WorkerNode

if TYPE_CHECKING:
    from .clients import ClientNode
    from .controllers import ControllerNode
    from .network import Network
    from .world import World

SHORT_S = (0.05, 2.5)
LONG_S = (2.5, 20.0)
"""How long a fault lasts: half of the time it is short, below what leases tell."""
RESTORE_GAP_S = 1.5
"""Most time between two links that are stopped, or restored, one by one."""

N = TypeVar("N", bound=Node)


class Faults:
    """Befalls the nodes of one run."""

    def __init__(
        self,
        world: World,
        network: Network,
        chronicle: Chronicle,
        scenario: Scenario,
        *,
        controllers: Sequence[ControllerNode],
        workers: Sequence[WorkerNode],
        clients: Sequence[ClientNode],
    ) -> None:
        self.world, self.network, self.chronicle = world, network, chronicle
        self.random = world.random_for("faults")
        self.controllers, self.workers, self.clients = controllers, workers, clients
        self.twins: list[WorkerNode] = []
        self._gap_s = scenario.gap_s
        self._active = True
        self._open: list[int] = []
        self._by_kind: dict[str, Callable[[str], object]] = {
            "worker killed": lambda kind: self._kill(kind, "worker", self.workers),
            "worker paused": lambda kind: self._pause(kind, "worker", self.workers),
            "worker drained": self._drain,
            "worker doubled": self._double,
            "engine hung": self._hang,
            "controller killed": lambda kind: self._kill(kind, "controller", self.controllers),
            "controller paused": lambda kind: self._pause(kind, "controller", self.controllers),
            "controller left": self._shut_down,
            "client killed": lambda kind: self._kill(kind, "client", self.clients),
            "client paused": lambda kind: self._pause(kind, "client", self.clients),
            "client slow": self._slow,
            "connection broken": self._break,
            "link stopped": self._stop_link,
            "links stopped one by one": self._stop_all,
            "clock leapt": self._leap,
        }
        self._kinds = [kind for kind in scenario.kinds if kind not in CONDITIONS]
        for kind in scenario.kinds:
            if kind in CONDITIONS:
                chronicle.counts[kind] += 1
        for worker in workers:
            worker.on_left = self._left

    def __repr__(self) -> str:
        return f"Faults({self._kinds})"

    def start(self) -> None:
        """From now on things go wrong."""
        if self._kinds:
            self.world.after(self.random.expovariate(1 / self._gap_s), self._strike)

    def _strike(self) -> None:
        if self._active:
            kind = self.random.choice(self._kinds)
            self._by_kind[kind](kind)
            self.start()

    def heal(self) -> None:
        """Nothing goes wrong any more, and what did is put right, one after the other in any order."""
        self._active = False
        steps: list[Callable[[], object]] = [self._restorer(link) for link in sorted(self.network.stopped)]
        for node in (*self.controllers, *self.workers, *self.clients):
            steps += [node.resume, node.start]
        steps += [twin.kill for twin in self.twins]
        steps += [self._unhanger(worker) for worker in self.workers]
        steps += [self._reader(client) for client in self.clients]
        self.random.shuffle(steps)
        for step in steps:
            self.world.after(self.random.uniform(0.0, RESTORE_GAP_S), step)
        self.world.after(RESTORE_GAP_S, self._all_over)
        # One that was draining has left meanwhile.
        for worker in self.workers:
            self.world.after(RESTORE_GAP_S + worker.config.grace_s, worker.start)

    def _all_over(self) -> None:
        for number in self._open:
            self.chronicle.over(number, self.world.now)

    def _restorer(self, link: tuple[str, str]) -> Callable[[], object]:
        return lambda: self.network.restore_link(link)

    def _unhanger(self, worker: WorkerNode) -> Callable[[], object]:
        return lambda: worker.hang(hung=False)

    def _reader(self, client: ClientNode) -> Callable[[], object]:
        return lambda: client.read_again()

    # --- kinds

    def _kill(self, kind: str, group: str, nodes: Sequence[Node]) -> None:
        node = self._some(nodes)
        if node is not None:
            node.kill()
            self._until(kind, group, node.start, node.name)

    def _pause(self, kind: str, group: str, nodes: Sequence[Node]) -> None:
        node = self._some(nodes)
        if node is not None and not node.paused:
            node.pause()
            self._until(kind, group, node.resume, node.name)

    def _drain(self, kind: str) -> None:
        worker = self._some(self.workers)
        if worker is not None and not worker.paused:
            life = worker.life
            worker.terminate()
            # One that is stopped meanwhile leaves when it goes on; `_left` starts it again.
            self._until(kind, "worker", lambda: None, worker.name, still=lambda: worker.alive and worker.life == life)

    def _left(self, worker: WorkerNode) -> None:
        """It was drained, or refused for another of its name: what runs it starts it again."""
        if self._active:
            self._until("worker drained", "worker", worker.start, worker.name, counted=False)

    def _double(self, kind: str) -> None:
        """Another process comes with the name of one that is there, or was a moment ago."""
        worker = self._some(self.workers)
        if worker is None or any(twin.config is worker.config and twin.alive for twin in self.twins):
            return
        twin = WorkerNode(
            self.world,
            self.network,
            f"{worker.name}'{len(self.twins)}",
            worker.config,
            token_s=worker.token_s,
            load_s=worker.load_s,
            shares=worker.shares,
        )
        self.twins.append(twin)
        if self.random.random() < 0.5:
            self.chronicle.add(kind, "worker", self.world.now, worker.name, counted=False, until_s=self.world.now)
            worker.kill()
        twin.start()

        def end() -> None:
            twin.kill()
            worker.start()

        self._until(kind, "worker", end, worker.name, twin.name)

    def _hang(self, kind: str) -> None:
        worker = self._some(self.workers)
        if worker is not None and not worker.hung:
            worker.hang(hung=True)
            self._until(kind, "worker", lambda: worker.hang(hung=False), worker.name)

    def _shut_down(self, kind: str) -> None:
        controller = self._some(self.controllers)
        if controller is not None and not controller.paused:
            controller.stop()
            self._until(kind, "controller", controller.start, controller.name)

    def _slow(self, kind: str) -> None:
        client = self._some(self.clients)
        if client is not None and client.reads:
            client.reads = False
            self._until(kind, "client", client.read_again, client.name)

    def _break(self, kind: str) -> None:
        links = self.network.links()
        if links:
            link = self.random.choice(links)
            self.network.break_link(link)
            self.chronicle.add(kind, "link", self.world.now, *link, until_s=self.world.now)
            self.world.note(f"the connection {link} breaks")

    def _stop_link(self, kind: str) -> None:
        links = self.network.links()
        if links:
            link = self.random.choice(links)
            self._cut(link)
            self._until(kind, "link", self._restorer(link), *link)

    def _stop_all(self, kind: str) -> None:
        """All links, one by one; then they come back in another order."""
        links = self.network.links()
        self.random.shuffle(links)
        when_s = 0.0
        for link in links:
            self.world.after(when_s, self._cut, link)
            when_s += self.random.uniform(0.0, RESTORE_GAP_S)
        when_s += self.random.uniform(*SHORT_S)
        # Each is a fault that may take a worker; together they count as one.
        numbers = [
            self.chronicle.add(
                kind, "link", self.world.now, *link, until_s=self.world.now + when_s + RESTORE_GAP_S * len(links), counted=not place
            )
            for place, link in enumerate(links)
        ]
        self._open += numbers
        self.random.shuffle(links)
        for link in links:
            self.world.after(when_s, self.network.restore_link, link)
            when_s += self.random.uniform(0.0, RESTORE_GAP_S)

    def _cut(self, link: tuple[str, str]) -> None:
        if self._active:
            self.world.note(f"the link {link} is stopped")
            self.network.stop_link(link)

    def _leap(self, kind: str) -> None:
        node = self._some((*self.controllers, *self.workers, *self.clients))
        if node is not None:
            self.chronicle.add(kind, "clock", self.world.now, node.name, until_s=self.world.now)
            node.jump(self.random.uniform(0.5, 30.0))

    # --- within

    def _some(self, nodes: Sequence[N]) -> N | None:
        alive = [node for node in nodes if node.alive]
        return self.random.choice(alive) if alive else None

    def _until(
        self,
        kind: str,
        group: str,
        end: Callable[[], object],
        *names: str,
        counted: bool = True,
        still: Callable[[], bool] = lambda: False,
    ) -> None:
        """`end` puts it right after a while; not as long as it is `still` going on."""
        number = self.chronicle.add(kind, group, self.world.now, *names, counted=counted)
        self._open.append(number)

        def over() -> None:
            if self._active and still():
                self.world.after(self.random.uniform(*SHORT_S), over)
            elif self._active:
                end()
                self.chronicle.over(number, self.world.now)

        self.world.after(self.random.uniform(*self.random.choice((SHORT_S, LONG_S))), over)
