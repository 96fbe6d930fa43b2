"""A controller's state as it is told to people and dashboards."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from .messages import PROTOCOL, ControllerStatus, ModelStatus, WorkerStatus

if TYPE_CHECKING:
    from .access import Account
    from .broker import Broker
    from .pool import Pool
    from .registry import Worker


def snapshot(broker: Broker, now: float, account: Account | None = None) -> ControllerStatus:
    """What a controller knows, at `now`: everything, or what an account may know that is no admin's."""
    if account is not None and not account.admin:
        return _of_account(broker, now, account)
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
        key=account.name if account is not None else "",
    )


def _of_account(broker: Broker, now: float, account: Account) -> ControllerStatus:
    pools = {pool.model: pool for pool in broker.intake.models(account)}
    workers = [worker for worker in broker.registry if any(model in pools for model in worker.cards)]
    shown = [msgspec.structs.replace(worker_status(each, now), models=sorted(pools.keys() & each.cards.keys())) for each in workers]
    return ControllerStatus(
        controller=broker.controller_id,
        version=broker.version,
        protocol=PROTOCOL,
        dispatch=broker.config.dispatch,
        up_s=round(now - broker.started_s, 3),
        client_endpoints=broker.endpoints[0],
        worker_endpoints=[],
        workers=shown,
        models=[model_status(pool) for pool in pools.values()],
        clients=sum(client.account is account for client in broker.flights.clients.values()),
        running=account.in_flight - account.waiting,
        waiting=account.waiting,
        key=account.name,
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
        key=worker.key,
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
