"""vLLM's OpenAI server. No relay: its engine computes a model, though one of a single small layer, so that little but the server is left.

Its events may carry several tokens when the client is slow: what is counted are the tokens that were asked for.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from bench.ports import free_port

from .http_client import HttpClient
from .loads import MODEL, Scale, Work, streamed
from .running import Running, listens, said_by, until

MOST_TOKENS = 128
"""Of one stream: it is slow beside the others."""
START_S = 240.0


class Choice(msgspec.Struct):
    """One choice of a completion."""

    text: str
    finish_reason: str | None = None


class Completion(msgspec.Struct):
    """A completion, or an event of one."""

    choices: list[Choice]

    @property
    def text(self) -> str:
        """Why it ended, if this is the end."""
        return self.choices[0].finish_reason or ""


def absent(python: str | None) -> str | None:
    """Why it cannot be started."""
    if python is None:
        return "--vllm-python names no Python that has vllm"
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return None if said_by(python, found) is not None else f"{python} has no vllm"


def start(running: Running, python: str) -> None:
    """Model folder, server and client."""
    folder = running.folder / "model"
    subprocess.run([python, "-I", str(Path(__file__).with_name("vllm_model.py")), str(folder)], capture_output=True, check=True)
    port = free_port()
    options = {
        "model": folder,
        "served-model-name": MODEL,
        "port": port,
        "host": "127.0.0.1",
        "load-format": "dummy",
        "max-model-len": 1024,
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", "--disable-uvicorn-access-log"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    check = running.popen("broker", command, {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"})
    until(lambda: listens(port), check, START_S)
    running.open_client(Client, port)


class Client(HttpClient):
    """Its requests."""

    decode: Callable[[bytes], Any] = msgspec.json.Decoder(Completion).decode

    def request(self, work: Work) -> tuple[str, bytes]:
        asked = {"model": MODEL, "prompt": "x", "max_tokens": work.tokens, "ignore_eos": True, "stream": work.kind != "one"}
        return "/v1/completions", json.dumps(asked).encode()

    def tokens(self, scale: Scale, _step: bool, _decode: bool) -> tuple[int, float]:
        work = streamed(dataclasses.replace(scale, tokens=min(scale.tokens, MOST_TOKENS)), step=False)
        came, spent_s = self._runner.run(self._streamed(work))
        whole = sum(finish == "length" for _, finish in came)
        assert whole == work.streams, whole
        return work.streams * work.tokens, spent_s
