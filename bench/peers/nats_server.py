"""nats-server, for both kinds of ends."""

from __future__ import annotations

import shutil
import subprocess

from bench.ports import free_port

from .running import Running, listens, until

WORK, INBOX = "work", "inbox"


def absent() -> str | None:
    """Why it cannot be started."""
    return None if shutil.which("nats-server") else "nats-server is not on PATH (Debian: apt install nats-server)"


def start_server(running: Running) -> int:
    """Start it; returns its port."""
    port = free_port()
    check = running.popen("broker", [shutil.which("nats-server") or "", "-a", "127.0.0.1", "-p", str(port)])
    until(lambda: listens(port), check)
    return port


def versions() -> dict[str, str]:
    """Its own; empty where there is none."""
    path = shutil.which("nats-server")
    if path is None:
        return {}
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return {"nats-server": said.rpartition(":")[2].strip()}
