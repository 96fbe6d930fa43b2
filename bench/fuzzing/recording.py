"""What a client and a worker really say, taken down on the way by relays that pass everything on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import zmq
from msgspec import Struct

from zmqserve import Client, Controller, WorkerConfig
from zmqserve.backends.echo import EchoWorker

MODEL = "fuzz"
"""What the recorded worker serves; nobody honest asks for it."""
WORKER = "recorded"
PINGS_S = 1.2
"""By then a client with an open request has sent some Pings, and the worker some heartbeats."""
PATIENCE_S = 20.0
LOOK_MS = 50


class Recording(Struct):
    """Messages of one client and of one worker, and what came back, as frames, each in the order sent."""

    from_client: list[list[bytes]]
    to_client: list[list[bytes]]
    from_worker: list[list[bytes]]
    to_worker: list[list[bytes]]


def record() -> Recording:
    """A session with every verb, of an SDK's client and an echo worker, in this process."""
    recording = Recording([], [], [], [])
    any_port = ["tcp://127.0.0.1:*"]
    with Controller(clients=any_port, workers=any_port, report=lambda *_a, **_k: None) as controller:
        clients = _Tap(controller.client_endpoints[0], recording.from_client.append, recording.to_client.append)
        workers = _Tap(controller.worker_endpoints[0], recording.from_worker.append, recording.to_worker.append)
        with clients, workers:
            config = WorkerConfig(controllers=(workers.endpoint,), model=MODEL, name=WORKER)
            with EchoWorker(config, delay_per_token_s=0.01) as worker:
                worker.wait_ready(PATIENCE_S)
                with Client(clients.endpoint, timeout_s=PATIENCE_S) as client:
                    _use(client)
    return recording


def _use(client: Client) -> None:
    client.models()
    client.status()
    client.model_details(MODEL)
    client.count_tokens(MODEL, "one two three")
    client.embed(MODEL, ["one", "two"])
    client.generate(MODEL, "one two three", max_tokens=10, stream=False)
    client.chat(MODEL, [{"role": "user", "content": "hello there"}], n=2, stop=["z"], seed=7, stream=False)
    with client.generate(MODEL, "to be cancelled", max_tokens=10_000, priority=1, affinity="a", timeout_s=PATIENCE_S) as stream:
        until_s = time.monotonic() + PINGS_S
        for _ in stream:
            if time.monotonic() > until_s:
                break
    client.drain_worker(WORKER)


class _Tap:
    """Between one peer and a controller's socket, at `endpoint`: `out` is given what the peer says, `back` what it is told."""

    def __init__(self, controller: str, out: Callable[[list[bytes]], None], back: Callable[[list[bytes]], None]) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front, self._behind = self._context.socket(zmq.ROUTER), self._context.socket(zmq.DEALER)
        self.endpoint = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._behind.connect(controller)
        self._out, self._back = out, back
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tap")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
        self._front.close(0)
        self._behind.close(0)
        self._context.term()

    def _run(self) -> None:
        peer = b""
        poller = zmq.Poller()
        for socket in (self._front, self._behind):
            poller.register(socket, zmq.POLLIN)
        while not self._over.is_set():
            ready = dict(poller.poll(LOOK_MS))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                self._out(frames)
                self._behind.send_multipart(frames)
            if self._behind in ready:
                frames = self._behind.recv_multipart()
                self._back(frames)
                self._front.send_multipart([peer, *frames])
