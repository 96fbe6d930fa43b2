"""Peers from the future in today's network: what they say more is ignored, refused by name, or asks for another protocol."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import msgspec
import pytest
import zmq

from zmqserve import Client
from zmqserve import messages as m

from .fakes.first_version import RID, SHAPES, FirstClient, FirstWorker, changed, golden, read
from .processes import PATIENCE_S, Served, ServedController, network


@pytest.fixture(scope="module")
def served() -> Iterator[ServedController]:
    """Today's controller with today's echo worker, of the name that the vectors speak of."""
    with network("echo-1") as (controller, _):
        yield controller


@pytest.fixture
def client(served: ServedController) -> Iterator[FirstClient]:
    with FirstClient(served.clients) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For what today's client asks while the test plays the other side."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def controller() -> Iterator[ServedController]:
    """Today's controller, with no worker yet."""
    with ServedController() as controller:
        yield controller


def longer(data: bytes, *known: Any) -> bytes:
    """A message with fields that nobody knows yet; before them those that were `known` meanwhile."""
    return msgspec.msgpack.encode([*msgspec.msgpack.decode(data), *known, {"new": [1]}, "newer"])


@pytest.mark.parametrize(
    "name", ["hello-full", "generate-not-streamed", "model-details-minimal", "list-models", "status", "ping-full", "drain-minimal"]
)
def test_new_fields_of_a_client_are_not_looked_at(name: str, client: FirstClient) -> None:
    data = golden(name) if name != "drain-minimal" else changed(name, worker="nobody")
    assert client.ask(longer(data)).kind == client.ask(data).kind


def test_a_new_message_of_a_client_is_refused_with_its_tag(client: FirstClient) -> None:
    error = client.ask(msgspec.msgpack.encode([11, 77, "m"]))
    assert (error.kind, error.fields["code"], error.fields["retryable"]) == ("Error", 40001, False)
    assert "unknown message tag 11" in error.fields["message"]
    assert client.ask(golden("list-models")).kind == "Models"


def test_a_new_parameter_is_refused_by_name(client: FirstClient) -> None:
    error = client.ask(changed("generate-prompt", params={"max_tokens": 5, "mirostat": 2})).fields
    assert (error["rid"], error["code"], error["data"]) == (RID, 40302, {"parameter": "mirostat"})


def test_another_protocol_is_refused_in_the_handshake(client: FirstClient, controller: ServedController) -> None:
    assert client.ask(changed("hello-full", protocol=2)).fields["code"] == 40003
    with FirstWorker(controller.workers) as worker:
        worker.socket.send_multipart([golden("head-ready-first"), changed("ready-minimal", protocol=2)])
        head, payload = worker.hear(98)
        refused = read(payload, "Refused").fields
        assert (head["epoch"], refused["code"], refused["retry_after_ms"]) == (0, 40003, None)


def test_a_worker_of_the_future_serves_what_is_known(controller: ServedController, threads: ThreadPoolExecutor) -> None:
    """Longer heads and payloads, verbs, features and names that nobody knows yet."""
    card = {"name": "m", "verbs": ["generate", "dream"], "features": ["telepathy"], "mood": {"good": True}}
    ready = changed("ready-full", models=[card], controllers=[])
    with FirstWorker(controller.workers) as worker, Client(controller.clients) as client:
        worker.socket.send_multipart([longer(golden("head-ready-first")), longer(ready)])
        worker.welcomed()
        asked = threads.submit(lambda: client.generate("m", "a b c").text())
        rid, _ = worker.take()
        ids = {"epoch": worker.epoch, "client": worker.client}
        for head, message in (
            (golden("head-first", rid=rid, **ids), longer(changed("chunk-text", rid=rid, seq=0, text="a"), "fingerprint")),
            (golden("head-more-not-canonical", **ids), longer(changed("chunk-text", rid=rid, seq=1, text=" b"), None)),
            (golden("head-done", rid=rid, **ids), longer(changed("done-full", rid=rid, seq=2, finish_reasons=["stop"], last=None))),
        ):
            worker.socket.send_multipart([longer(head), message])
        assert asked.result(PATIENCE_S) == "a b"
        models = client.models()
        assert [(model.card.name, model.card.verbs) for model in models] == [("m", ["generate", "dream"])]

        worker.socket.send_multipart([changed("head-load", kind=74, epoch=worker.epoch), b"news"])
        assert worker.hear(102)[1] == b""


class NewController:
    """A controller of the future, played by the test: what it says is longer than anybody knows."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.RCVTIMEO, 10_000)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.context.destroy(linger=0)


def test_a_worker_of_today_serves_a_controller_of_the_future() -> None:
    welcome = longer(changed("head-welcome", epoch=5)), longer(golden("worker-welcome-full"), 67_108_864)
    news = changed("head-beat", kind=104, epoch=5), b"news"
    request = longer(golden("head-request-full", epoch=5)), longer(golden("generate-not-streamed"))
    with NewController() as controller, Served("worker", "echo", "--model", "m", "--controller", controller.endpoint):
        while True:
            peer, head, payload = controller.socket.recv_multipart()
            kind = msgspec.msgpack.decode(head)[0]
            if kind == m.DONE:
                break
            if kind == m.READY:
                controller.socket.send_multipart([peer, *welcome])
                if read(payload, "Ready").fields["state"] == "ready":
                    controller.socket.send_multipart([peer, *news])
                    controller.socket.send_multipart([peer, *request])
        assert read(payload).fields["choices"][0]["text"] == "a b c a b"


def test_a_client_of_today_is_served_by_a_controller_of_the_future(threads: ThreadPoolExecutor) -> None:
    limits = {**SHAPES["Limits"], "moons": 3}
    with NewController() as controller, Client(controller.endpoint) as client:
        asked = threads.submit(lambda: client.generate("m", "a b c").text())
        while True:
            peer, payload = controller.socket.recv_multipart()
            message = read(payload)
            if message.kind == "Generate":
                break
            answer = changed("welcome-full", limits=limits) if message.kind == "Hello" else golden("pong-minimal")
            controller.socket.send_multipart([peer, longer(answer)])
        rid = message.fields["rid"]
        for answer in (
            msgspec.msgpack.encode([47, "a message of the future"]),
            longer(changed("chunk-text", rid=rid, seq=0, text="a"), "fingerprint"),
            longer(changed("done-full", rid=rid, seq=1, finish_reasons=["tired"], last=None)),
        ):
            controller.socket.send_multipart([peer, answer])
        assert asked.result(PATIENCE_S) == "a"
