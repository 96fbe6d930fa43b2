"""Which zmqserve this is, as it is told to peers."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def installed_version() -> str:
    """The installed package's version; empty where the source runs uninstalled."""
    try:
        return version("zmqserve")
    except PackageNotFoundError:
        return ""
