"""A Broker with keys and rules, and what its clients and workers were told, for tests of both."""

from __future__ import annotations

from typing import Any

import msgspec

from zmqserve import messages as m

from .keys import access
from .network import Network
from .scripted import ScriptedClient, ScriptedWorker


def network_of(rules: str = "", **settings: Any) -> Network:
    return Network(access=access(rules), **settings)


def asked(client: ScriptedClient, request: Any) -> Any:
    """What ended it at once."""
    client.request(request)
    return client.end(request.rid)


def refusal(worker: ScriptedWorker) -> m.Refused:
    head, payload = worker.got[-1]
    assert head.kind == m.REFUSED
    return msgspec.msgpack.decode(payload, type=m.Refused)


def models_of(client: ScriptedClient, rid: int = 900) -> list[str]:
    reply = asked(client, m.ListModels(rid))
    assert isinstance(reply, m.Models), reply
    return [model.card.name for model in reply.models]
