"""A server that others wrote: vLLM's own, with OpenAI's API."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from bench.ports import free_port
from tests.processes import eventually

START_S = 240.0
END_S = 20.0


@contextmanager
def openai_server(directory: str, name: str, *arguments: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Serve the model in `directory` under `name`; gives the URL to ask. Its output is shown if it ends before its time."""
    with tempfile.NamedTemporaryFile(suffix=".log") as output:
        port = str(free_port())
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", directory, "--served-model-name", name]
        command += ["--host", "127.0.0.1", "--port", port, *arguments]
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            eventually(lambda: _up(process, f"http://127.0.0.1:{port}/health", Path(output.name)), START_S, "vLLM's server is up")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            _end(process)


def _up(process: subprocess.Popen[bytes], url: str, output: Path) -> bool:
    assert process.poll() is None, f"vLLM's server ended:\n{output.read_text()[-5000:]}"
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and its engine, which is a process of its own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.terminate()
    _, alive = psutil.wait_procs(family, timeout=END_S)
    for each in alive:
        each.kill()
    psutil.wait_procs(alive, timeout=END_S)
    process.wait(END_S)
