"""LoRA adapters as vLLM is told of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .model_errors import unavailable

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``max_lora_rank`` may be."""


@dataclass(frozen=True)
class Adapter:
    """`name` is the model's, `path` a directory in peft's layout, `rank` the width of its matrices."""

    name: str
    path: Path
    rank: int


def adapters_of(paths: Mapping[str, str]) -> list[Adapter]:
    """The adapters in these directories, which `check_adapters` has looked at, by name. ModelUnavailable for one without a rank."""
    return [_adapter(name, Path(path).expanduser()) for name, path in paths.items()]


def allowed_rank(rank: int) -> int:
    """The least rank that vLLM can be told of that has room for `rank`."""
    return next((allowed for allowed in RANKS if allowed >= rank), RANKS[-1])


def _adapter(name: str, path: Path) -> Adapter:
    file = path / "adapter_config.json"
    try:
        rank = json.loads(file.read_bytes())["r"]
    except (OSError, ValueError, KeyError, TypeError):
        raise unavailable(f"lora {name!r}: {file}", "is not what peft writes: it has no rank r") from None
    if type(rank) is not int or not 1 <= rank <= RANKS[-1]:
        raise unavailable(f"lora {name!r}: {file}", f"says rank {rank!r}: vLLM takes 1 to {RANKS[-1]}")
    return Adapter(name, path.resolve(), rank)
