"""Backends by name, from the entry points of the group ``zmqserve.backends``: other packages add theirs the same way."""

from __future__ import annotations

from importlib.metadata import entry_points

from .errors import InvalidParameter
from .worker import BaseModelWorker

GROUP = "zmqserve.backends"


def names() -> list[str]:
    """The backends that are installed; none is imported."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load(name: str) -> type[BaseModelWorker]:
    """The worker class of a backend. InvalidParameter when there is none of that name, or what is there is no worker."""
    found = list(entry_points(group=GROUP, name=name))
    if not found:
        raise InvalidParameter(f"no backend is named {name!r}; installed: {', '.join(names())}", data={"parameter": "backend"})
    entry = found[0]
    try:
        cls = entry.load()
    except (ImportError, AttributeError) as error:
        raise InvalidParameter(f"backend {name!r} ({entry.value}) cannot be loaded: {error}", data={"parameter": "backend"}) from error
    if not (isinstance(cls, type) and issubclass(cls, BaseModelWorker)):
        raise InvalidParameter(f"backend {name!r} ({entry.value}) is no BaseModelWorker", data={"parameter": "backend"})
    return cls
