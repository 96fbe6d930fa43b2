"""A network whose worker serves hosted models: controller, HuggingfaceApiWorker and client, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from zmqserve import Client, Controller, WorkerConfig
from zmqserve.backends.hf_registry import HostedModel
from zmqserve.backends.huggingface_api_worker import HuggingfaceApiWorker

READY_S = 20.0
HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def serving(*models: HostedModel, **settings: Any) -> Iterator[Client]:
    """A client of a network that serves these models."""
    with Controller(clients=["tcp://127.0.0.1:*"], workers=["tcp://127.0.0.1:*"]) as controller:
        config = WorkerConfig(controllers=(controller.worker_endpoints[0],), name="hosted", **settings)
        with HuggingfaceApiWorker(config, models) as worker, Client(controller.client_endpoints[0], timeout_s=READY_S) as client:
            worker.wait_ready(READY_S)
            yield client


def hosted(url: str, **settings: Any) -> HostedModel:
    """A model ``m`` at that URL."""
    return HostedModel(**{"name": "m", "base_url": url, **settings})
