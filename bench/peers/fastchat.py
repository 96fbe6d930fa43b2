"""FastChat's real controller and worker: a client asks the controller for a worker's address, then that worker for the answer.

The controller is started as it comes, with its log line for each request; the worker's app logs none.
"""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import msgspec

from bench.ports import free_port

from .http_client import Connection, HttpClient, checked
from .loads import BATCH, MODEL, TEXT, Work
from .running import Running, listens, said_by, until


def absent(python: str | None) -> str | None:
    """Why it cannot be started."""
    if python is None:
        return "--fastchat-python names no Python that has fschat"
    return None if said_by(python, "import fastchat.serve.controller") is not None else f"{python} cannot import fastchat.serve.controller"


def start(running: Running, python: str) -> None:
    """Controller, worker and client."""
    controller, worker = free_port(), free_port()
    address = f"http://127.0.0.1:{controller}"
    command = [python, "-m", "fastchat.serve.controller", "--host", "127.0.0.1", "--port", str(controller)]
    check = running.popen("broker", command)
    until(lambda: listens(controller), check)
    check = running.popen("worker", [python, "-I", str(Path(__file__).with_name("fastchat_worker.py")), address, str(worker)])
    until(lambda: listens(worker) and _address(controller) != "", check)
    running.open_client(Client, worker, controller)


def _address(controller: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", controller, timeout=5)
    connection.request("POST", "/get_worker_address", json.dumps({"model": MODEL}), {"Content-Type": "application/json"})
    address: str = json.load(connection.getresponse())["address"]
    connection.close()
    return address


class Client(HttpClient):
    """Its requests. Each begins with a question to the controller."""

    separator = b"\0"

    def __init__(self, worker: int, controller: int) -> None:
        super().__init__(worker)
        self._controller = controller
        self._askers: dict[Connection, Connection] = {}

    def request(self, work: Work) -> tuple[str, bytes]:
        return "/worker_generate_stream", msgspec.json.encode({"prompt": work.text, "model": MODEL})

    async def one(self, connection: Connection) -> None:
        await self._ask(connection)
        connection.send(*self.request(Work("one")))
        pieces: list[bytes] = []
        await connection.objects(self.separator, pieces.append)
        self.decode(pieces[0])

    async def prepare(self, connection: Connection) -> None:
        await self._ask(connection)

    async def embed(self, connection: Connection, fast: bool) -> int:
        import numpy as np

        await self._ask(connection)
        connection.send("/worker_get_embeddings", msgspec.json.encode({"input": [TEXT] * BATCH, "model": MODEL}))
        body = await connection.body()
        answer = msgspec.json.decode(body) if fast else json.loads(body)
        return checked(np.array(answer["embedding"], dtype=np.float32))

    async def opened(self, connection: Connection) -> None:
        self._askers[connection] = await Connection(self._controller).open()

    async def _ask(self, connection: Connection) -> None:
        asker = self._askers[connection]
        asker.send("/get_worker_address", b'{"model":"bench"}')
        assert b"http://" in await asker.body()
