"""One arm of `bench frontends`: python -m bench.frontend_arms ARM MODEL CLIENTS [NAME=VALUE ...]

Says ``{"ready": true}`` in a line, then answers each line ``{"streams": .., "seed": .., "input_len": .., "output_len": ..}`` with
``{"wall_s": .., "tokens": .., "ttfts_ms": [..], "firsts_ms": [..]}``, until its input ends. `ttfts_ms`: from each stream's own begin to
its first token; `firsts_ms`: from the begin of the run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from .frontends import PATIENCE_S
from .ports import free_port

IDS = range(100, 30_000)
"""Ids of the prompts: any model has these."""
KEEP_ALIVE_S = 3600
SAY = os.fdopen(os.dup(1), "w", buffering=1)
"""What is said to the benchmark: libraries print to standard output."""

Run = Callable[[dict[str, Any]], dict[str, Any]]


def prompts(asked: dict[str, Any]) -> list[list[int]]:
    """The prompts of one run."""
    draw = random.Random(asked["seed"])
    return [draw.choices(IDS, k=asked["input_len"]) for _ in range(asked["streams"])]


def main() -> None:
    os.dup2(2, 1)
    name, model, clients, *given = sys.argv[1:]
    arguments = dict(text.split("=", 1) for text in given)
    kind, _, processes = name.partition("_")
    if kind == "offline":
        serve(_offline(model, arguments))
    elif kind == "async":
        asyncio.run(_async_llm(model, arguments))
    elif kind == "zmqserve":
        with _zmqserve(model, arguments) as endpoint, _Clients("zmqserve", endpoint, model, int(clients)) as asking:
            serve(asking.run)
    else:
        with _openai_server(model, arguments, processes) as url, _Clients("http", url, model, int(clients)) as asking:
            serve(asking.run)


async def read(streams: Sequence[AsyncIterator[int]]) -> dict[str, Any]:
    """Read all of `streams`, which yield how many tokens have come, at once."""
    began_s = time.monotonic()

    async def one(stream: AsyncIterator[int]) -> tuple[float, float, int]:
        own_s, first_s, made = time.monotonic(), 0.0, 0
        async for count in stream:
            first_s = first_s or time.monotonic()
            made += count
        return 1000 * (first_s - own_s), 1000 * (first_s - began_s), made

    ttfts_ms, firsts_ms, tokens = zip(*await asyncio.gather(*map(one, streams)), strict=True)
    return {"began_s": began_s, "ended_s": time.monotonic(), "tokens": sum(tokens), "ttfts_ms": ttfts_ms, "firsts_ms": firsts_ms}


def serve(run: Run) -> None:
    """Answer the benchmark."""
    print(json.dumps({"ready": True}), file=SAY)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=SAY)


# --- in this process ---------------------------------------------------------------------------


def _arguments(model: str, arguments: dict[str, str], kind: Any) -> Any:
    from zmqserve.backends.vllm_engine import parsed

    return parsed(kind, model, arguments, {})


def _offline(model: str, arguments: dict[str, str]) -> Run:
    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    read = _arguments(model, arguments, EngineArgs)
    llm = LLM(model, **{name: getattr(read, name) for name in arguments})

    def run(asked: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(max_tokens=asked["output_len"], ignore_eos=True, temperature=0, detokenize=False)
        inputs: Any = [{"prompt_token_ids": ids} for ids in prompts(asked)]
        began_s = time.perf_counter()
        outputs = llm.generate(inputs, params, use_tqdm=False)
        wall_s = time.perf_counter() - began_s
        return {"wall_s": wall_s, "tokens": sum(len(output.outputs[0].token_ids) for output in outputs), "ttfts_ms": [], "firsts_ms": []}

    return run


async def _async_llm(model: str, arguments: dict[str, str]) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    # With the defaults of a server, as the other arms have them.
    engine = AsyncLLM.from_engine_args(_arguments(model, arguments, AsyncEngineArgs), usage_context=UsageContext.OPENAI_API_SERVER)

    async def one(name: str, ids: list[int], tokens: int) -> AsyncIterator[int]:
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.DELTA)
        async for output in engine.generate({"prompt_token_ids": ids}, params, name):
            yield len(output.outputs[0].token_ids)

    print(json.dumps({"ready": True}), file=SAY)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        streams = [one(f"{asked['seed']}-{number}", ids, asked["output_len"]) for number, ids in enumerate(prompts(asked))]
        made = await read(streams)
        print(json.dumps({"wall_s": made["ended_s"] - made["began_s"], **made}), file=SAY)
    engine.shutdown()


# --- servers and clients in processes of their own ---------------------------------------------


class _Clients:
    """Client processes that share the streams of a run; see frontend_clients.py."""

    def __init__(self, kind: str, where: str, model: str, count: int) -> None:
        command = [sys.executable, "-m", "bench.frontend_clients", kind, where, model]
        self._processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)]

    def __enter__(self) -> Self:
        for process in self._processes:
            self._told(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def run(self, asked: dict[str, Any]) -> dict[str, Any]:
        shares = [
            asked["streams"] // len(self._processes) + (number < asked["streams"] % len(self._processes))
            for number in range(len(self._processes))
        ]
        at_work = [process for process, share in zip(self._processes, shares, strict=True) if share]
        for number, (process, share) in enumerate(zip(at_work, shares, strict=False)):
            told = {**asked, "streams": share, "seed": 100 * asked["seed"] + number}
            assert process.stdin is not None
            process.stdin.write(json.dumps(told) + "\n")
            process.stdin.flush()
        made = [self._told(process) for process in at_work]
        return {
            # One clock for all processes of a machine.
            "wall_s": max(each["ended_s"] for each in made) - min(each["began_s"] for each in made),
            "tokens": sum(each["tokens"] for each in made),
            **{name: [first for each in made for first in each[name]] for name in ("ttfts_ms", "firsts_ms")},
        }

    @staticmethod
    def _told(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit("a client process has ended; what it says is above")
        said: dict[str, Any] = json.loads(line)
        return said


@contextmanager
def _zmqserve(model: str, arguments: dict[str, str]) -> Iterator[str]:
    from zmqserve import Client

    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        clients, workers = f"ipc://{folder}/clients", f"ipc://{folder}/workers"
        engine = [part for name, value in arguments.items() for part in ("--engine-arg", f"{name}={value}")]
        commands = (
            ("controller", "--clients", clients, "--workers", workers),
            ("worker", "vllm", "--model", model, "--name", "m", "--controller", workers, "--slots", "1024", *engine),
        )
        processes = [subprocess.Popen([sys.executable, "-m", "zmqserve", *command, "--log-json"], stdout=2) for command in commands]
        try:
            with Client(clients, connect_timeout_s=PATIENCE_S) as client:
                _until(lambda: any(worker.state == "ready" for worker in client.status().workers), processes)
            yield clients
        finally:
            for process in reversed(processes):
                process.terminate()
                process.wait()


@contextmanager
def _openai_server(model: str, arguments: dict[str, str], processes: str) -> Iterator[str]:
    port = free_port()
    options: list[str] = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        options += [option] if value == "true" else [option, value]
    command = [sys.executable, "-m"]
    if processes == "1":
        command += ["vllm.entrypoints.openai.api_server", "--model", model]
    else:
        command += ["vllm.entrypoints.cli.main", "serve", model, "--api-server-count", processes]
    command += ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log", *options]
    # Or it ends idle connections after 5 s, just as a client is about to use one.
    process = subprocess.Popen(command, stdout=2, env=os.environ | {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S)})
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):  # noqa: S310 - it is ours
                return True
        except OSError:
            return False

    try:
        _until(answers, [process])
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _until(check: Callable[[], bool], processes: list[subprocess.Popen[bytes]]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not check():
        if time.monotonic() > until_s or any(process.poll() is not None for process in processes):
            raise SystemExit("it did not come up; what it says is above")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
