"""FastAPI on uvicorn, without a broker: server-sent events for streams, JSON for the rest."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

import msgspec

from bench.ports import free_port

from .http_client import Connection, HttpClient, checked
from .loads import BATCH, FLOATS, TEXT, Work, stamp
from .running import Running, listens, until

EMBEDDINGS = "/v1/embeddings"


def absent() -> str | None:
    """Why it cannot be started."""
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed: pip install fastapi uvicorn httptools uvloop" if missing else None


def start(running: Running) -> None:
    """The server and its client."""
    port = free_port()
    running.spawn("broker", serve, port)
    until(lambda: listens(port), lambda: None)
    running.open_client(Client, port)


class Client(HttpClient):
    """Its requests."""

    def request(self, work: Work) -> tuple[str, bytes]:
        return ("/one" if work.kind == "one" else "/stream"), msgspec.json.encode({"prompt": work.text, "model": "bench"})

    async def embed(self, connection: Connection, fast: bool) -> int:
        import numpy as np

        connection.send(EMBEDDINGS, msgspec.json.encode({"input": [TEXT] * BATCH, "model": "fast" if fast else "bench"}))
        body = await connection.body()
        answer = msgspec.json.decode(body) if fast else json.loads(body)
        return checked(np.array([row["embedding"] for row in answer["data"]], dtype=np.float32))


def serve(ready: Pipe, port: int) -> None:
    """The server, until it is killed."""
    import numpy as np
    import uvicorn
    from fastapi import FastAPI, Request, Response
    from fastapi.responses import StreamingResponse

    app: Any = FastAPI()
    vectors = np.random.default_rng(0).random((BATCH, FLOATS), dtype=np.float32)
    event = _event(TEXT)

    async def events(work: Work) -> AsyncIterator[bytes]:
        began_s = time.monotonic()
        for k in range(work.tokens):
            if work.rate and k:
                await asyncio.sleep(began_s + k / work.rate - time.monotonic())
                yield _event(stamp())
            else:
                yield event
        yield b"data: [DONE]\n\n"

    async def stream(request: Request) -> StreamingResponse:
        asked = msgspec.json.decode(await request.body())
        return StreamingResponse(events(Work.parse(asked["prompt"])), media_type="text/event-stream")

    async def one(request: Request) -> Response:
        msgspec.json.decode(await request.body())
        return Response(msgspec.json.encode({"text": TEXT, "token_ids": [1]}), media_type="application/json")

    async def embed(request: Request) -> Response:
        asked = msgspec.json.decode(await request.body())
        data = [{"object": "embedding", "index": k, "embedding": row} for k, row in enumerate(vectors.tolist())]
        answer = {"object": "list", "data": data, "model": asked["model"]}
        content = msgspec.json.encode(answer) if asked["model"] == "fast" else json.dumps(answer).encode()
        return Response(content, media_type="application/json")

    for path, endpoint in (("/stream", stream), ("/one", one), (EMBEDDINGS, embed)):
        # The annotations are names, as this module has them, that FastAPI cannot look up: these are of this function.
        endpoint.__annotations__ = {"request": Request}
        app.add_api_route(path, endpoint, methods=["POST"], response_model=None)
    ready.send("starting")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False)


def _event(text: str) -> bytes:
    return b"data: " + msgspec.json.encode({"text": text, "token_ids": [1]}) + b"\n\n"
