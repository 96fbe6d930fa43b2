"""A controller's settings, with their defaults and reasons. Every field may stand in the TOML file given by `--config`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .dispatch import POLICIES
from .errors import InvalidParameter
from .messages import MAX_MODELS, MAX_NAME, MAX_SLOTS

CLIENT_ENDPOINT = "tcp://127.0.0.1:5570"
WORKER_ENDPOINT = "tcp://127.0.0.1:5571"

Seconds = Annotated[float, Meta(ge=0.01, le=1e7)]
Size = Annotated[int, Meta(ge=1, le=2**50)]


class ControllerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Settings of a controller.

    clients, workers: endpoints to bind (tcp, ipc, inproc), any number of each.
    parents: worker sides of other controllers, to which this one offers all that its workers can do, as if it were a worker itself.
    name: what parents know it by, unique at each; empty: controller, host and a random suffix.
    dispatch: ``shortest_queue`` or ``lottery``.
    ttl_s: workers give this controller up after so much silence; it sends a heartbeat every third of it.
    queue_requests, queue_bytes: what may wait for one model while all its workers are full; beyond it, Overloaded.
    client_requests, client_bytes: what may wait of one client, for all models together: nobody fills a queue alone.
    outbox_bytes: what may wait for a peer that does not read; beyond it a client's requests end as SlowConsumer.
    outbox_total_bytes: the same for all clients together; beyond it the one with the most is treated so.
    message_bytes: a larger message drops its sender's connection.
    request_bytes: a larger request is refused.
    total_requests, total_bytes: open requests of all clients together, and what those hold that have not begun; beyond it, Overloaded.
    max_clients: clients with open requests; beyond it, Overloaded.
    max_workers: registered workers; beyond it they are told to come later, and so beyond max_models: names and aliases of all models.
    worker_models, worker_slots: what one worker may offer: names and aliases of models, and slots.
    ready_bytes, readies_per_s: a worker's offer (READY) that is larger is refused; of one key (or connection, without keys) so many are
    taken, large ones count as several: beyond it new workers are told to come later, and changes of an offer wait, the last one only.
    memory_bytes: a controller whose process holds more ends itself, as MemoryExceeded, before the machine suffers. 0: never. None: 80 %
    of the machine's memory, or of its control group's.
    default_deadline_s: for requests without a deadline of clients that never Ping; nothing else would bound those.
    max_attempts: a request that has lost so many workers is not sent to another: it may be what kills them.
    cancel_timeout_s: a worker that has not ended a cancelled request by then gets no new work.
    stall_s: nor does one whose engine has not stepped for so long; after as long again it is given up.
    orphan_grace_s: how long requests wait for a model whose last worker has gone (a restart) before they end as NoWorker.
    drain_grace_s: what a drained worker gets to finish when `drain` names no time.
    curve_dir: a folder of keys, as `zmqserve keys init` makes it: clients and workers must prove with CURVE that theirs are among them;
    only those in the same process (inproc) need none. None: who reaches an endpoint is served.
    handshakes_per_s: of one key, ten times as many at once; beyond it connections are not answered, and tried again by who makes them.
    insecure: without `curve_dir`, an endpoint that other machines may reach is bound only if this is set, and said at every start.
    parent_key, parent_controller_key: files of keys for CURVE with parents: the pair that they know this controller by, and the public key
    of a parent's port for workers, one for all parents or one for each.
    pipe_messages: what libzmq itself holds for each peer, each way, before an outbox is used. It counts messages, not bytes. With 512
        a relay of one token a message is twice as slow: libzmq's own thread empties them in less time than it takes to be called upon.
    busy_poll_us: after each message the controller looks for the next one without sleeping, for so many microseconds. To wake a core that
        sleeps is most of what a round trip costs: with 500 one takes less time than through a C proxy that sleeps, and a core is never
        idle where messages come more often than that (docs/benchmarks.md). 0: it always sleeps.
    seed: makes the draws of dispatch repeatable, for tests.

    What clients that do not read can cost in memory is `outbox_total_bytes`, and for each of them `pipe_messages` of its messages (one
    message is what one step of a worker made for that client), until its connection ends: one that takes nothing for 6 s is ended.
    """

    clients: list[str] = msgspec.field(default_factory=lambda: [CLIENT_ENDPOINT])
    workers: list[str] = msgspec.field(default_factory=lambda: [WORKER_ENDPOINT])
    parents: list[str] = []
    name: Annotated[str, Meta(max_length=MAX_NAME)] = ""
    dispatch: str = "shortest_queue"
    ttl_s: Seconds = 3.0
    queue_requests: Size = 4000
    queue_bytes: Size = 256 * 2**20
    client_requests: Size = 1000
    client_bytes: Size = 64 * 2**20
    outbox_bytes: Size = 16 * 2**20
    outbox_total_bytes: Size = 32 * 2**20
    message_bytes: Size = 64 * 2**20
    request_bytes: Size = 16 * 2**20
    total_requests: Size = 100_000
    total_bytes: Size = 2**30
    max_clients: Size = 50_000
    max_workers: Size = 10_000
    max_models: Size = 10_000
    worker_models: Annotated[int, Meta(ge=1, le=MAX_MODELS)] = MAX_MODELS
    worker_slots: Annotated[int, Meta(ge=1, le=MAX_SLOTS)] = MAX_SLOTS
    ready_bytes: Size = 2**20
    readies_per_s: Annotated[float, Meta(gt=0, le=1e6)] = 200.0
    memory_bytes: Annotated[int, Meta(ge=0, le=2**50)] | None = None
    pipe_messages: Annotated[int, Meta(ge=1, le=1_000_000)] = 2048
    default_deadline_s: Seconds = 600.0
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 2
    cancel_timeout_s: Seconds = 5.0
    stall_s: Seconds = 60.0
    orphan_grace_s: Seconds = 10.0
    drain_grace_s: Seconds = 30.0
    curve_dir: str | None = None
    handshakes_per_s: Annotated[float, Meta(gt=0, le=1e6)] = 1000.0
    insecure: bool = False
    parent_key: str | None = None
    parent_controller_key: str | list[str] | None = None
    busy_poll_us: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.dispatch not in POLICIES:
            known = ", ".join(sorted(POLICIES))
            raise InvalidParameter(f"dispatch must be one of {known}; got {self.dispatch!r}", data={"parameter": "dispatch"})
        if len(set(self.parents)) < len(self.parents):
            raise InvalidParameter("a parent is named twice", data={"parameter": "parents"})
        for name in ("clients", "workers"):
            if not getattr(self, name):
                raise InvalidParameter(f"{name} needs at least one endpoint to bind", data={"parameter": name})
        for endpoint in self.clients:
            if endpoint in self.workers and not endpoint.endswith((":0", ":*")):
                text = f"clients and workers need different endpoints, both have {endpoint}"
                raise InvalidParameter(text, data={"parameter": "workers"})


def load_config(path: Path | None, **overrides: object) -> ControllerConfig:
    """The file's settings (none without a path), with those of `overrides` that are not None put over them.

    Raises InvalidParameter that names the file and the setting.
    """
    settings: dict[str, object] = {}
    if path is not None:
        try:
            settings = tomllib.loads(path.read_text())
        except OSError as error:
            raise InvalidParameter(f"cannot read {path}: {error.strerror}", data={"parameter": "config"}) from None
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a ValueError only
            raise InvalidParameter(f"{path} is not TOML: {error}", data={"parameter": "config"}) from None
    settings |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return msgspec.convert(settings, ControllerConfig)
    except msgspec.ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise InvalidParameter(f"{where}{error}", data={"parameter": "config"}) from None
