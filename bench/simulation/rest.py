"""Whether a node is at rest: nothing in use, nothing kept, everybody known, the books of both sides in agreement."""

from __future__ import annotations

from .clients import ClientNode
from .controllers import ControllerNode
from .node import Node
from .workers import WorkerNode


def not_at_rest(node: Node) -> list[str]:
    """What still is in use, or not as it should be; empty when all is well."""
    if not node.alive or node.paused:
        return [f"{node.name} does not run"]
    match node:
        case ControllerNode():
            found = _controller(node)
        case WorkerNode():
            found = _worker(node)
        case ClientNode():
            found = _client(node)
        case _:
            found = {}
    return [f"{node.name} has {value!r} {what}" for what, value in found.items() if value]


def _controller(node: ControllerNode) -> dict[str, object]:
    broker, relay = node.broker, node.relay
    flights, workers = broker.flights, list(broker.registry)
    return {
        "clients": list(flights.clients.values()),
        "routes": list(flights.routes.values()),
        "running": flights.running,
        "flights on workers": [flight for worker in workers for flight in worker.flights.values()],
        "slots in use": {worker.name: (worker.running, worker.others) for worker in workers if worker.running or worker.others},
        "shares in use": [share for worker in workers for share in worker.shares.values() if share.running or share.others],
        "unusable workers": [worker for worker in workers if not worker.usable],
        "workers not heard lately": [worker for worker in workers if worker.quiet(node.clock_s)],
        "waiting requests": sum(len(pool.waiting) for pool in broker.registry.pools.values()),
        "waiting bytes": sum(pool.waiting.bytes for pool in broker.registry.pools.values()),
        "running by model": {name: pool.running for name, pool in broker.registry.pools.items() if pool.running},
        "outbox bytes": relay.clients.waiting_bytes + relay.workers.waiting_bytes,
        "parents that do not know it": [uplink for uplink in node.uplinks if not uplink.link.known or uplink.link.silent],
        "outbox bytes to parents": sum(uplink.link.outbox_bytes for uplink in node.uplinks),
        "unread messages": node.clients.waiting + node.workers.waiting,
    }


def _worker(node: WorkerNode) -> dict[str, object]:
    workload = node.workload
    lanes = [lane for lane in workload.links.values() if lane is not None]
    return {
        "requests running": workload.running,
        "slots held by models": [model for model, held in workload.held.items() if held],
        "requests open": workload._open,
        "jobs": list(node.jobs),
        "answers": [answer for lane in lanes for answer in lane.answers.values()],
        "outbox bytes": sum(link.outbox_bytes for link in workload.links),
        "controllers that do not know it": [link for link in workload.links if not link.known or link.silent],
        "frames to pass on": len(node._frames),
        "state": workload.state if workload.state != "ready" else "",
    }


def _client(node: ClientNode) -> dict[str, object]:
    return {"open requests": list(node.open), "calls": list(node.session.calls.values())}
