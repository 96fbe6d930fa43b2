"""The keys that one side connects with: its own, and those of the controllers that it is to reach."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from .certificate import Unreadable, read_pair, read_public
from .curve import Curve
from .errors import InvalidParameter

KEY_VARIABLE, CONTROLLER_KEY_VARIABLE = "ZMQSERVE_KEY", "ZMQSERVE_CONTROLLER_KEY"
"""Environment variables for clients and workers that are given no files; several of the second are separated by commas."""

KeyFile: TypeAlias = str | os.PathLike[str]
KeyFiles: TypeAlias = KeyFile | Sequence[KeyFile]


class Credentials:
    """Files of keys, for connections to these endpoints. None for both files: connections without CURVE.

    key: the own pair. controller_key: the public key of the port at each endpoint, in the endpoints' order, or one for all.
    Files are read at each connection, so that keys can be replaced under a running program; one that cannot be read then is used as before.
    Raises InvalidParameter that names `key` or `controller_key`, after `prefix`.
    """

    def __init__(self, key: KeyFile | None, controller_key: KeyFiles | None, endpoints: Sequence[str], *, prefix: str = "") -> None:
        self._names = f"{prefix}key", f"{prefix}controller_key"
        own = self._paths(key, 0)
        theirs = self._paths(controller_key, 1)
        if bool(own) != bool(theirs):
            given, lacks = self._names if own else self._names[::-1]
            raise self._wrong(
                lacks, f"{given} is given without {lacks}: CURVE needs both, the own pair and the public key of the controller"
            )
        if len(own) > 1:
            raise self._wrong(self._names[0], f"{self._names[0]} must be one file, got {len(own)}")
        if len(theirs) not in (0, 1, len(endpoints)):
            what = f"{self._names[1]} must be one file for all endpoints, or one for each of the {len(endpoints)}, got {len(theirs)}"
            raise self._wrong(self._names[1], what)
        self._key = own[0] if own else None
        self._theirs = dict(zip(endpoints, theirs * len(endpoints) if len(theirs) == 1 else theirs, strict=False))
        self._known: dict[str, Curve] = {}
        for endpoint in self._theirs:
            self._known[endpoint] = self._read(endpoint)

    def __repr__(self) -> str:
        return f"Credentials({self._key}, {sorted(set(map(str, self._theirs.values())))})"

    def __bool__(self) -> bool:
        return self._key is not None

    def curve(self, endpoint: str) -> Curve | None:
        """What a socket needs to connect there; None: no CURVE."""
        if self._key is None:
            return None
        try:
            self._known[endpoint] = self._read(endpoint)
        except InvalidParameter:
            pass  # it may be just being replaced
        return self._known[endpoint]

    def _read(self, endpoint: str) -> Curve:
        name = self._names[0]
        try:
            own = read_pair(Path(self._key or ""))
            name = self._names[1]
            return Curve(own, read_public(self._theirs[endpoint]))
        except Unreadable as error:
            raise self._wrong(name, f"{name}: {error}") from None

    def _paths(self, files: KeyFiles | None, which: int) -> list[Path]:
        if files is None:
            return []
        several = files if isinstance(files, Sequence) and not isinstance(files, str) else [files]
        if not several or not all(isinstance(file, str | os.PathLike) and os.fspath(file) for file in several):
            kinds = ("the path of a file that ends in .key_secret", "the path of a file that ends in .key, or one for each endpoint")
            raise self._wrong(self._names[which], f"{self._names[which]} must be {kinds[which]}, got {files!r:.100}")
        return [Path(os.path.abspath(file)) for file in several]

    @staticmethod
    def _wrong(name: str, text: str) -> InvalidParameter:
        return InvalidParameter(text, data={"parameter": name})


def credentials(key: KeyFile | None, controller_key: KeyFiles | None, endpoints: Sequence[str]) -> Credentials:
    """Those that are given, or else those of the environment: ``ZMQSERVE_KEY`` and ``ZMQSERVE_CONTROLLER_KEY``."""
    if key is None and controller_key is None:
        key = os.environ.get(KEY_VARIABLE) or None
        theirs = os.environ.get(CONTROLLER_KEY_VARIABLE)
        controller_key = [file.strip() for file in theirs.split(",")] if theirs else None
    return Credentials(key, controller_key, endpoints)
