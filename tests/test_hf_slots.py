"""Hosted models with slots of their own through a real network: an upstream never gets more, and one that is full holds no other up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest

from zmqserve import Client, Controller, WorkerConfig
from zmqserve.backends.hf_registry import HostedModel
from zmqserve.backends.huggingface_api_worker import HuggingfaceApiWorker

from .fakes.hosted import HELLO, READY_S, hosted, serving
from .fakes.upstream import Exchange, FakeUpstream, Handler, words
from .processes import PATIENCE_S, eventually

pytest.importorskip("huggingface_hub")

SLOTS = 2


class Gate:
    """A handler that answers nobody until it is opened. `most`: so many requests were there at one time."""

    def __init__(self, answer: Handler) -> None:
        self.opened = threading.Event()
        self.most = 0
        self._there = 0
        self._answer = answer

    async def __call__(self, exchange: Exchange) -> None:
        self._there += 1
        self.most = max(self.most, self._there)
        await asyncio.to_thread(self.opened.wait, READY_S)
        self._there -= 1
        await self._answer(exchange)


def models(slow: FakeUpstream, quick: FakeUpstream) -> list[HostedModel]:
    return [hosted(slow.url, name="slow", slots=SLOTS, aliases=["snail"]), hosted(quick.url, name="quick", slots=8)]


def test_a_flooded_model_holds_no_other_up() -> None:
    gate = Gate(words("slow"))
    with FakeUpstream(gate) as slow, FakeUpstream(words("at once")) as quick, serving(*models(slow, quick)) as client:
        streams = [client.chat("snail" if k % 2 else "slow", HELLO) for k in range(20)]
        assert [client.chat("quick", HELLO, stream=False).text for _ in range(3)] == ["at once"] * 3
        listed = {model.name: model for model in client.models()}
        assert {name: (model.slots, model.running, model.waiting) for name, model in listed.items()} == {
            "slow": (SLOTS, SLOTS, 20 - SLOTS),
            "quick": (8, 0, 0),
        }
        assert (listed["slow"].card.slots, client.status().workers[0].slots) == (SLOTS, SLOTS + 8)
        gate.opened.set()
        assert [stream.text() for stream in streams] == ["slow"] * 20
    assert gate.most == SLOTS


async def vector(exchange: Exchange) -> None:
    await exchange.respond(200, [[1.0, 2.0]])


def test_vectors_take_the_slots_of_their_model() -> None:
    pytest.importorskip("numpy")
    gate = Gate(vector)
    with FakeUpstream(gate) as slow, FakeUpstream(words("at once")) as quick, ThreadPoolExecutor(6) as threads:
        vectors = HostedModel(name="vectors", base_url=slow.url, api="feature_extraction", slots=1)
        with serving(vectors, hosted(quick.url, name="quick", slots=3)) as client:
            asked = [threads.submit(client.embed, "vectors", ["a"]) for _ in range(6)]
            eventually(lambda: {model.name: model.waiting for model in client.models()}["vectors"] == 5, PATIENCE_S, "five wait")
            assert client.chat("quick", HELLO, stream=False).text == "at once"
            gate.opened.set()
            assert [future.result().tolist() for future in asked] == [[[1.0, 2.0]]] * 6
    assert gate.most == 1


@contextmanager
def shared(served: list[HostedModel]) -> Iterator[list[Client]]:
    """Clients of two controllers that share one worker."""
    with ExitStack() as stack:
        controllers = [stack.enter_context(Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"])) for _ in range(2)]
        config = WorkerConfig(controllers=tuple(each.worker_endpoints[0] for each in controllers), name="hosted", ttl_s=1.5)
        worker = stack.enter_context(HuggingfaceApiWorker(config, served))
        clients = [stack.enter_context(Client(each.client_endpoints[0], timeout_s=READY_S)) for each in controllers]
        worker.wait_ready(READY_S)
        for client in clients:
            eventually(lambda c=client: [w.state for w in c.status().workers] == ["ready"], PATIENCE_S, "it is taken")  # type: ignore[misc]
        yield clients


def test_two_controllers_never_give_a_model_more_than_its_slots() -> None:
    gate = Gate(words("slow"))
    with FakeUpstream(gate) as slow, FakeUpstream(words("at once")) as quick, shared(models(slow, quick)) as clients:
        streams = [client.chat("slow", HELLO) for _ in range(10) for client in clients]
        for client in clients:
            assert client.chat("quick", HELLO, stream=False).text == "at once"
        gate.opened.set()
        assert [stream.text() for stream in streams] == ["slow"] * 20
        assert sum(client.status().counters.get("busy", 0) for client in clients) > 0
        for client in clients:
            eventually(lambda c=client: c.status().workers[0].free == SLOTS + 8, PATIENCE_S, "all slots are free")  # type: ignore[misc]
    assert gate.most == SLOTS
