"""What stands for a model's files, so that workers on different machines know whether they serve the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
_OTHERS = frozenset({".json", ".model", ".txt", ".jinja", ".py", ".tiktoken"})
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_MOST_HEADER_BYTES = 2**27
_MOST_WHOLE_BYTES = 2**24


def fingerprint(directories: Iterable[Path], facts: Iterable[str]) -> str:
    """32 hex digits, equal for equal files and equal `facts` (as the dtype), wherever they lie.

    Configuration, tokenizer, template and small weights (adapters) count whole; of large ones the size, the safetensors header, which
    names every tensor, and samples over all of the file: hashing 100 GB would take minutes at each start.
    """
    digest = hashlib.sha256()
    for fact in facts:
        _add(digest, fact.encode())
    for directory in directories:
        for path in sorted(directory.iterdir()):
            kind = path.suffix.lower()
            if not path.is_file() or kind not in _WEIGHTS | _OTHERS:
                continue
            _add(digest, path.name.encode())
            if kind in _WEIGHTS and path.stat().st_size > _MOST_WHOLE_BYTES:
                _sample(digest, path)
            else:
                _add(digest, path.read_bytes())
    return digest.hexdigest()[:32]


def directory_of(model: str, revision: str | None) -> Path | None:
    """Where the files of a model lie: `model` itself, or its snapshot in the cache of the Hugging Face Hub. None if neither is there."""
    if os.path.isdir(model):
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _add(digest: hashlib._Hash, part: bytes) -> None:
    digest.update(len(part).to_bytes(8, "little") + part)


def _sample(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    _add(digest, str(size).encode())
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            length = int.from_bytes(file.read(8), "little")
            _add(digest, file.read(min(length, _MOST_HEADER_BYTES)))
        for sample in range(_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            _add(digest, file.read(_SAMPLE_BYTES))
