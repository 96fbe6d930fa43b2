"""Folders of keys for tests: a controller's, and those of its clients and workers beside it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from zmqserve import certificate
from zmqserve.keyring import CLIENTS_PORT, FOLDERS, WORKERS_PORT


def usual(folder: Path) -> Keys:
    """A controller's folder that allows alice (a client), boss (an admin) and gpu (a worker), and not mallory."""
    made = Keys(folder)
    for name, role in (("alice", "client"), ("boss", "admin"), ("gpu", "worker"), ("mallory", None)):
        made.new(name, role)
    return made


class Keys:
    """`folder` is what a controller takes as its curve_dir; `own` is where the pairs of its peers lie."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "keys"
        self.own = folder / "own"
        for path in (self.folder, *(self.folder / place for place in FOLDERS.values()), self.own):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.renew_ports()

    def __str__(self) -> str:
        return str(self.folder)

    def renew_ports(self) -> None:
        """New keys for the controller, to be given to its peers anew."""
        for name in (CLIENTS_PORT, WORKERS_PORT):
            for suffix in (certificate.PUBLIC_SUFFIX, certificate.SECRET_SUFFIX):
                (self.folder / (name + suffix)).unlink(missing_ok=True)
            certificate.write_pair(self.folder, name)

    def new(self, name: str, role: str | None = None) -> str:
        """A new pair, allowed under a role; returns its secret file."""
        certificate.write_pair(self.own, name)
        if role is not None:
            self.allow(name, role)
        return self.secret(name)

    def secret(self, name: str) -> str:
        return str(self.own / f"{name}.key_secret")

    def allow(self, name: str, role: str) -> None:
        key = certificate.read_public(self.own / f"{name}.key")
        certificate.write_public(self.folder / FOLDERS[role] / f"{name}.key", name, key)

    def revoke(self, name: str) -> None:
        for place in FOLDERS.values():
            (self.folder / place / f"{name}.key").unlink(missing_ok=True)

    def replace(self, name: str, by: str) -> None:
        """Put another pair into a file that somebody has open for use, as a rotation does."""
        for suffix in (certificate.PUBLIC_SUFFIX, certificate.SECRET_SUFFIX):
            os.replace(self.own / (by + suffix), self.own / (name + suffix))

    @property
    def clients_port(self) -> str:
        return str(self.folder / f"{CLIENTS_PORT}.key")

    @property
    def workers_port(self) -> str:
        return str(self.folder / f"{WORKERS_PORT}.key")

    def as_client(self, name: str) -> dict[str, Any]:
        """Options of a client with this key."""
        return {"key": self.secret(name), "controller_key": self.clients_port}

    def as_worker(self, name: str) -> dict[str, Any]:
        """The same for a worker's config."""
        return {"key": self.secret(name), "controller_key": self.workers_port}

    def client_arguments(self, name: str) -> tuple[str, ...]:
        """The same on a command line."""
        return "--key", self.secret(name), "--controller-key", self.clients_port

    def worker_arguments(self, name: str) -> tuple[str, ...]:
        """The same on a worker's command line."""
        return "--key", self.secret(name), "--controller-key", self.workers_port
