"""LoRA adapters on the command line: which directory is served under which name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from zmqserve.errors import InvalidParameter

from .model_errors import unavailable


def parse_adapters(options: Iterable[str]) -> dict[str, str]:
    """``NAME=PATH`` options as a map. Raises InvalidParameter."""
    adapters: dict[str, str] = {}
    for option in options:
        name, equals, path = option.partition("=")
        if not (name and equals and path):
            raise InvalidParameter(f"lora must be NAME=PATH, got {option!r}", data={"parameter": "lora"})
        if name in adapters:
            raise InvalidParameter(f"lora names {name!r} twice: every adapter is a model of its own", data={"parameter": "lora"})
        adapters[name] = path
    return adapters


def check_adapters(adapters: Mapping[str, str], base_name: str) -> None:
    """Raise InvalidParameter for a name that is the base model's, ModelUnavailable for a path that holds no adapter."""
    for name, path in adapters.items():
        if name == base_name:
            raise InvalidParameter(f"lora {name!r} is the model's own name: give the adapter another", data={"parameter": "lora"})
        directory = Path(path).expanduser()
        if not directory.is_dir():
            raise unavailable(f"lora {name!r}: {path}", "is no directory: give one that peft has saved")
        if not (directory / "adapter_config.json").is_file():
            raise unavailable(f"lora {name!r}: {path}", "is no LoRA adapter: it has no adapter_config.json")
