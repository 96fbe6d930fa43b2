"""A controller's settings, with their defaults and reasons. Every field may stand in the TOML file given by `--config`."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .dispatch import POLICIES
from .errors import InvalidParameter
from .messages import MAX_NAME

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
    default_deadline_s: for requests without a deadline of clients that never Ping; nothing else would bound those.
    max_attempts: a request that has lost so many workers is not sent to another: it may be what kills them.
    cancel_timeout_s: a worker that has not ended a cancelled request by then gets no new work.
    stall_s: nor does one whose engine has not stepped for so long; after as long again it is given up.
    orphan_grace_s: how long requests wait for a model whose last worker has gone (a restart) before they end as NoWorker.
    drain_grace_s: what a drained worker gets to finish when `drain` names no time.
    pipe_messages: what libzmq itself holds for each peer, each way, before an outbox is used. It counts messages, not bytes.
    seed: makes the draws of dispatch repeatable, for tests.

    What clients that do not read can cost in memory is `outbox_total_bytes`, and for each of them `pipe_messages` of its messages (one
    message is what one step of a worker made for that client), until it is silent for its ttl and its connection for 6 s.
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
    pipe_messages: Annotated[int, Meta(ge=1, le=1_000_000)] = 512
    default_deadline_s: Seconds = 600.0
    max_attempts: Annotated[int, Meta(ge=1, le=100)] = 2
    cancel_timeout_s: Seconds = 5.0
    stall_s: Seconds = 60.0
    orphan_grace_s: Seconds = 10.0
    drain_grace_s: Seconds = 30.0
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
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidParameter(f"{path} is not TOML: {error}", data={"parameter": "config"}) from None
    settings |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return msgspec.convert(settings, ControllerConfig)
    except msgspec.ValidationError as error:
        where = f"{path}: " if path is not None else ""
        raise InvalidParameter(f"{where}{error}", data={"parameter": "config"}) from None
