"""A controller's state as it is told to people and dashboards."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from .messages import PROTOCOL, ControllerStatus, ModelStatus, WorkerStatus

if TYPE_CHECKING:
    from .broker import Broker
    from .registry import Pool, Worker


def snapshot(broker: Broker, now: float) -> ControllerStatus:
    """Everything that a controller knows, at `now`."""
    registry, flights = broker.registry, broker.flights
    clients, workers = broker.endpoints
    return ControllerStatus(
        controller=broker.controller_id,
        version=broker.version,
        protocol=PROTOCOL,
        dispatch=broker.config.dispatch,
        up_s=round(now - broker.started_s, 3),
        client_endpoints=clients,
        worker_endpoints=workers,
        workers=[worker_status(worker, now) for worker in registry],
        models=[model_status(pool) for pool in registry.pools.values()],
        clients=len(flights.clients),
        running=flights.running,
        waiting=sum(len(pool.waiting) for pool in registry.pools.values()),
        outbox_bytes=broker.outbox_bytes(),
        counters=dict(sorted((flights.counters | Counter({"dropped: outbox full": broker.outbox_drops()})).items())),
    )


def worker_status(worker: Worker, now: float) -> WorkerStatus:
    """One worker."""
    return WorkerStatus(
        name=worker.name,
        backend=worker.backend,
        state=worker.state,
        models=sorted(worker.cards),
        slots=worker.slots,
        running=worker.running,
        others=worker.others,
        free=worker.free,
        speed=worker.speed,
        waiting=worker.waiting,
        step_age_ms=worker.step_age_ms,
        heard_ms=round((now - worker.lease.heard_s) * 1000, 1),
        up_s=round(now - worker.registered_s, 3),
        finished=worker.finished,
        version=worker.version,
        controllers=worker.controllers,
    )


def model_status(pool: Pool) -> ModelStatus:
    """One model."""
    return ModelStatus(
        card=pool.card,
        state=pool.state,
        workers=[worker.name for worker in pool.workers.values()],
        running=pool.running,
        waiting=len(pool.waiting),
        waiting_bytes=pool.waiting.bytes,
        slots=pool.slots,
    )
