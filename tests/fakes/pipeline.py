"""A pipeline around a bridge: who pushes the jobs, and who pulls the results."""

from __future__ import annotations

import json
import threading
from types import TracebackType
from typing import Any, Self

import msgpack
import zmq

PATIENCE_MS = 20_000
"""What may pass before a test gives up."""


class Pipeline:
    """Binds both ends, where a bridge connects. inproc with a given context, tcp otherwise. `hwm`: of both its sockets."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]] | None = None, *, hwm: int = 1000) -> None:
        self._context = context or zmq.Context()
        self._owns_context = context is None
        self.source, self.sink = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        self.source.setsockopt(zmq.SNDHWM, hwm)
        self.sink.setsockopt(zmq.RCVHWM, hwm)
        for socket, name in ((self.source, "jobs"), (self.sink, "results")):
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind("tcp://127.0.0.1:*" if context is None else f"inproc://{name}")
        self.jobs, self.results = (str(socket.getsockopt_string(zmq.LAST_ENDPOINT)) for socket in (self.source, self.sink))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.source.close()
        self.sink.close()
        if self._owns_context:
            self._context.term()

    def push(self, *jobs: Any) -> None:
        """Jobs as JSON, or bytes as they are."""
        for job in jobs:
            assert self.source.poll(PATIENCE_MS, zmq.POLLOUT), "nobody takes jobs"
            self.source.send(job if isinstance(job, bytes) else json.dumps(job).encode())

    def pull(self, count: int = 1) -> list[Any]:
        """The next results, read as what they are."""
        return [decoded(self.raw()) for _ in range(count)]

    def raw(self) -> bytes:
        """The next result as it came."""
        assert self.sink.poll(PATIENCE_MS), "no result came"
        return self.sink.recv()

    def run(self, jobs: list[Any]) -> list[Any]:
        """Push all while results are pulled in a thread; as many as there are jobs."""
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.extend(self.pull(len(jobs))))
        thread.start()
        self.push(*jobs)
        thread.join()
        assert len(results) == len(jobs)
        return results

    def silent(self) -> bool:
        """Whether no more results lie there."""
        return not self.sink.poll(0)


def decoded(message: bytes) -> Any:
    """A result, from either encoding."""
    return json.loads(message) if message[:1] == b"{" else msgpack.unpackb(message)


def job(number: int, tokens: int | None = None) -> dict[str, Any]:
    """A job for an echo worker; its answer is `text` of it."""
    return {
        "id": number,
        "metadata": {"row": [number]},
        "prompt": f"a{number} b{number}",
        "params": {"max_tokens": tokens or number % 7 + 1},
    }


def text(number: int, tokens: int | None = None) -> str:
    """What an echo worker answers to `job`."""
    return " ".join(f"{'ab'[k % 2]}{number}" for k in range(tokens or number % 7 + 1))


def checked(results: list[Any], tokens: int | None = None) -> list[int]:
    """The ids of results that are all as they must be, in the order in which they came."""
    for result in results:
        number = result["id"]
        assert result["metadata"] == {"row": [number]}, result
        assert result.get("text") == text(number, tokens), result
    return [result["id"] for result in results]
