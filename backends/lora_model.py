"""A model with a LoRA adapter: another model of the same base, without a copy of its weights."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, explained
from .model_errors import unavailable

_ONE = "served"
"""peft's name of the only adapter in a model."""


def with_adapter(base: Checkpoint, name: str, path: str) -> Checkpoint:
    """The base with the adapter of that directory. The weights of both are the same tensors, so that both can run at one time.

    Raises ModelUnavailable if it does not fit the base.
    """
    directory = Path(path).expanduser()
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
    model = copy.deepcopy(base.model, shared)
    with explained(f"lora {name!r}: {path}", local=True):
        settings = json.loads((directory / "adapter_config.json").read_text())
        if settings.get("peft_type") != "LORA":
            raise unavailable(f"lora {name!r}: {path}", f"is a {settings.get('peft_type')} adapter: only LORA is served")
        before = set(model.state_dict())
        # Sizes that do not match are in the report too: the library's error says only that there are some.
        report = model.load_adapter(str(directory), adapter_name=_ONE, ignore_mismatched_sizes=True)
        _check_complete(name, path, model, before, report)
    model = model.to(device=base.device).eval().requires_grad_(False)
    # Parameters only: the frequencies of rotary positions are buffers, and float32 whatever the model's dtype.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(base.model.dtype)
    # Its rank and its strength are in no weight.
    return replace(base, model=model, adapter=json.dumps(settings, sort_keys=True))


def _check_complete(name: str, path: str, model: Any, before: set[str], report: Any) -> None:
    """peft leaves an adapter's weights that the model has no place for out, and makes up those that are missing."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key if isinstance(key, str) else key[0] for key in getattr(report, what, None) or ()]
        wrong = sorted(key for key in keys if key not in before)
        if wrong:
            kind = what.removesuffix("_keys")
            raise unavailable(f"lora {name!r}: {path}", f"does not fit {type(model).__name__}: {kind} {wrong[0]} ({len(wrong)} in all)")
