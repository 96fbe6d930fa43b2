"""A client process of `bench frontends`: python -m bench.frontend_clients zmqserve|http WHERE MODEL. It speaks as frontend_arms.py does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from .frontend_arms import KEEP_ALIVE_S, prompts, read

Stream = Callable[[list[int], int], AsyncIterator[int]]
"""From a prompt's ids and a number of tokens to how many came each time."""


async def main() -> None:
    kind, where = sys.argv[1:3]
    async with (_zmqserve if kind == "zmqserve" else _http)(where) as stream:
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            asked = json.loads(line)
            made = await read([stream(ids, asked["output_len"]) for ids in prompts(asked)])
            if made["tokens"] != asked["streams"] * asked["output_len"]:
                raise SystemExit(f"{made['tokens']} tokens came of {asked['streams']} answers of {asked['output_len']}")
            print(json.dumps(made), flush=True)


@asynccontextmanager
async def _zmqserve(endpoint: str) -> AsyncIterator[Stream]:
    from zmqserve import AsyncClient

    async with AsyncClient(endpoint) as client:

        async def stream(ids: list[int], tokens: int) -> AsyncIterator[int]:
            async for chunk in client.generate("m", ids, max_tokens=tokens, ignore_eos=True, temperature=0):
                yield len(chunk.token_ids)

        yield stream


@asynccontextmanager
async def _http(url: str) -> AsyncIterator[Stream]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None)
    # Connections stay open between runs, as the server is told to leave them.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def stream(ids: list[int], tokens: int) -> AsyncIterator[int]:
            body: dict[str, Any] = {"model": "m", "prompt": ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0, "stream": True}
            body["stream_options"] = {"include_usage": True}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                answer.raise_for_status()
                begun = False
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if event["choices"] and not begun:
                        begun = True
                        yield 0
                    if event.get("usage"):
                        yield event["usage"]["completion_tokens"]

        yield stream


if __name__ == "__main__":
    asyncio.run(main())
