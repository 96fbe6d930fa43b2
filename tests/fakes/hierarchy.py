"""Controllers above controllers, without sockets: Brokers wired together, with one clock for all and workers that beat by themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any

from zmqserve import messages as m
from zmqserve.delivery import GONE, SENT
from zmqserve.link import ControllerLink
from zmqserve.registry import Worker
from zmqserve.uplink import Uplink

from .network import Network

STEP_S = 0.01
BEAT_S = 0.5
MOST_SLOTS = 100
"""More than any child here ever offers."""

_head = m.decoder(m.WorkerHead)


class Node(Network):
    """One controller of a Tree, with the clients and workers of a Network."""

    def __init__(self, tree: Tree, name: str, **settings: Any) -> None:
        self.tree = tree
        self.name = name
        self.children: dict[bytes, Wire] = {}
        super().__init__(**settings)
        self.broker.controller_id = self.broker.members.controller_id = name

    def _send_worker(self, identity: bytes, head: bytes, payload: bytes) -> int:
        wire = self.children.get(identity)
        if wire is None:
            return super()._send_worker(identity, head, payload)
        if identity in self.gone:
            return GONE
        self.tree.deliveries.append(lambda: wire.down(identity, head, payload))
        return SENT

    def _most_slots(self, worker: Worker) -> int:
        if worker.identity in self.children:
            return MOST_SLOTS
        return super()._most_slots(worker)

    def join(self, parent: Node) -> Wire:
        """Become a worker of `parent`."""
        return Wire(self, parent)

    def says(self, event: str) -> list[dict[str, Any]]:
        """The lines that it logged of one kind."""
        return [report for report in self.reports if report["event"] == event]


class Wire:
    """A connection from a child to a parent. `stuck`: it takes nothing, as a full pipe. `kinds`: of what the child sent."""

    def __init__(self, child: Node, parent: Node) -> None:
        self.child, self.parent = child, parent
        self.stuck = False
        self.identity = b""
        self.kinds: list[int] = []
        now = child.tree.now
        self.uplink = Uplink(child.broker, child.name, report=lambda event, **f: child.reports.append({"event": event, **f}), now=now)
        random = Random(f"{child.name}>{parent.name}")  # two that refuse each other must not try again at the same times for ever
        self.link = ControllerLink(f"tcp://{parent.name}:1", self.uplink, self._send, ttl_s=3.0, random=random, now=now)
        self.uplink.attach(self.link, renew=self.reconnect)
        child.broker.uplinks.append(self.uplink)
        self.connect()

    @property
    def seen(self) -> Any:
        """What the parent holds of the child; None when it is not registered."""
        return self.parent.broker.registry.workers.get(self.identity)

    def connect(self) -> None:
        self.identity = b"\0%s>%s%d" % (self.child.name.encode(), self.parent.name.encode(), len(self.parent.children))
        self.parent.children[self.identity] = self

    def cut(self) -> None:
        """The connection breaks: the parent finds out when it sends, the child at once."""
        self.parent.gone.add(self.identity)
        self.identity = b""
        self.link.disconnected(self.child.now)

    def reconnect(self) -> None:
        """A new connection in place of this one: the parent takes it for a stranger's."""
        self.parent.gone.add(self.identity)
        self.stuck = False
        self.connect()

    def _send(self, head: bytes, payload: bytes) -> bool:
        identity = self.identity
        if self.stuck or not identity:
            return False
        self.kinds.append(_head.decode(head).kind)
        self.child.tree.deliveries.append(lambda: self.up(identity, head, payload))
        return True

    def up(self, identity: bytes, head: bytes, payload: bytes) -> None:
        if identity not in self.parent.gone and self.parent.name not in self.parent.tree.dead:
            self.parent.broker.from_worker(self.parent.now, identity, head, payload)

    def down(self, identity: bytes, head: bytes, payload: bytes) -> None:
        if identity == self.identity and self.child.name not in self.child.tree.dead:
            self.uplink.now = self.child.now
            self.link.received(self.child.now, head, payload)


class Tree:
    """Nodes by name, one clock, and what is on its way between them. Names in `dead` neither hear nor tick."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.nodes: dict[str, Node] = {}
        self.dead: set[str] = set()
        self.deliveries: deque[Callable[[], None]] = deque()
        self._beat_s = self.now

    def node(self, name: str, parent: Node | None = None, **settings: Any) -> Node:
        """A controller, registered with its parent."""
        node = self.nodes[name] = Node(self, name, **settings)
        node.now = self.now
        if parent is not None:
            node.join(parent)
            self.run()
        return node

    def chain(self, depth: int, **settings: Any) -> list[Node]:
        """Controllers a, b, c, ..., each the parent of the next."""
        nodes: list[Node] = []
        for name in "abcdef"[:depth]:
            nodes.append(self.node(name, nodes[-1] if nodes else None, **settings))
        return nodes

    def pump(self) -> None:
        """Deliver what is on its way."""
        while self.deliveries:
            self.deliveries.popleft()()

    def run(self, seconds: float = 0.1) -> None:
        """Let time pass; the default is enough for an announcement through three levels."""
        until_s = self.now + seconds
        while self.now < until_s:
            self.pump()
            self.now += STEP_S
            beat = self.now >= self._beat_s
            if beat:
                self._beat_s = self.now + BEAT_S
            for node in self.nodes.values():
                if node.name in self.dead:
                    continue
                node.now = self.now
                node.tick()
                for worker in node.workers.values() if beat else ():
                    if worker.is_registered() and worker.identity not in node.gone:
                        worker.load()
        self.pump()

    def kill(self, node: Node) -> None:
        """SIGKILL: its connections break, which its workers and parents find out when they send."""
        self.dead.add(node.name)
        for wire in self.wires():
            if wire.child is node:
                wire.parent.gone.add(wire.identity)
                wire.identity = b""

    def wires(self) -> list[Wire]:
        """All connections between controllers, alive or not."""
        return list(dict.fromkeys(wire for node in self.nodes.values() for wire in node.children.values()))

    def assert_clean(self) -> None:
        """Nothing is in progress anywhere, and each request ended once."""
        self.run()
        for node in self.nodes.values():
            if node.name not in self.dead:
                node.assert_clean()
        assert all(not wire.link.outbox_bytes for wire in self.wires())


def ready(node: Node) -> list[m.Ready]:
    """What the node's uplinks offer now."""
    return [uplink.ready() for uplink in node.broker.uplinks]
