"""A controller's state as it is told to people and dashboards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
    return ControllerStatus(
        controller=broker.controller_id,
        version=broker.version,
        protocol=PROTOCOL,
        dispatch=broker.config.dispatch,
        up_s=round(now - broker.started_s, 3),
        client_endpoints=broker.endpoints[0],
        worker_endpoints=[],
        workers=[_as_seen(worker, now, pools) for worker in workers],
        models=[model_status(pool, account) for pool in pools.values()],
        clients=sum(client.account is account for client in broker.flights.clients.values()),
        running=account.in_flight - account.waiting,
        waiting=account.waiting,
        key=account.name,
    )


def _as_seen(worker: Worker, now: float, pools: Mapping[str, Pool]) -> WorkerStatus:
    """One worker, as somebody is told who may use these models only."""
    whole = worker_status(worker, now)
    seen = msgspec.structs.replace(whole, models=sorted(pools.keys() & worker.cards.keys()))
    if worker.shares.keys() <= pools.keys():
        return seen
    # What it says of itself, and what has ended on it, is of all its models together.
    running = sum(share.running for model, share in worker.shares.items() if model in pools)
    free = max(0, worker.slots - running) if worker.usable else 0
    return msgspec.structs.replace(seen, running=running, others=0, free=free, waiting=0, step_age_ms=0.0, finished=0)


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


def model_status(pool: Pool, account: Account | None = None) -> ModelStatus:
    """One model. An account that is no admin's is not told how large its queue is: that of a single request is the length of a prompt."""
    whole = account is None or account.admin
    return ModelStatus(
        card=pool.card,
        state=pool.state,
        workers=[worker.name for worker in pool.workers.values()],
        running=pool.running,
        waiting=len(pool.waiting),
        waiting_bytes=pool.waiting.bytes if whole else 0,
        slots=pool.slots,
    )
