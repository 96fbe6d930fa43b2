"""How much memory a controller's process holds, and how much it may. libzmq cannot bound a message that is never finished."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import MemoryExceeded

LOOK_S = 0.25
"""Between two looks, as often as an idle controller wakes: a flood may bring hundreds of megabytes a second."""
SHARE = 0.8
"""Of what there is, where no limit is given: the rest is for the last words, and for others."""
TRIM_BYTES, TRIM_S, TRIM_REST, MOST_TRIM_S = 64 * 2**20, 10.0, 1000, 600.0
"""How far the process is above the least that it ever held when freed memory is given back before it has to be, and how often: at most so,
with so many times as long in between as it took (about 0.3 ms for each MiB that goes; threads that want memory may wait for it), and twice
as long as before where there was nothing to give back, up to the last."""
GIVEN_BYTES = 2**20
"""Less is nothing."""

_STATM = "/proc/self/statm"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Says when the process holds more than `limit_bytes`; 0: never. Close it: it keeps a file open.

    What was freed does not count: glibc keeps it, where a few bytes in use lie above, and is told to give it back before anything is said.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._next_s = self._trim_s = 0.0
        self._pause_s = TRIM_S
        self._least_bytes = sys.maxsize
        self._trim = _malloc_trim() if limit_bytes else None
        self._statm = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC) if limit_bytes and os.path.exists(_STATM) else -1

    def __repr__(self) -> str:
        return f"MemoryWatch(limit_bytes={self.limit_bytes})"

    def look(self, now: float) -> int:
        """The bytes held, where that is too much; else 0, also when the last look was a moment ago."""
        if not self.limit_bytes or now < self._next_s:
            return 0
        self._next_s = now + LOOK_S
        held = self.held_bytes()
        self._least_bytes = min(self._least_bytes, held)
        grown = held - self._least_bytes > TRIM_BYTES
        if self._trim is not None and (held > self.limit_bytes or (grown and now >= self._trim_s)):
            began_s = time.perf_counter()
            self._trim(0)
            took_s = time.perf_counter() - began_s
            before, held = held, self.held_bytes()
            self._pause_s = TRIM_S if before - held > GIVEN_BYTES else min(MOST_TRIM_S, 2 * self._pause_s)
            self._trim_s = now + max(self._pause_s, TRIM_REST * took_s)
        return held if held > self.limit_bytes else 0

    def held_bytes(self) -> int:
        """Resident bytes of this process. Where the system does not tell (no /proc), the most that they ever were."""
        if self._statm >= 0:
            return int(os.pread(self._statm, 256, 0).split()[1]) * _PAGE_BYTES
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def close(self) -> None:
        """Close the file."""
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1


def _malloc_trim() -> Any:
    """glibc's function; None in a process without it, as with musl or on macOS."""
    import ctypes

    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def memory_exceeded(held_bytes: int, limit_bytes: int) -> MemoryExceeded:
    """Why the controller ends."""
    text = f"the process holds {held_bytes >> 20} MiB, over its limit of {limit_bytes >> 20} MiB (memory_bytes): the controller ended"
    return MemoryExceeded(text, data={"held_bytes": held_bytes, "limit_bytes": limit_bytes})


def default_limit_bytes(root: Path = Path("/")) -> int:
    """SHARE of what this process may have: the least of the machine's memory and the bounds of its control groups."""
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    return int(SHARE * min([machine, *_group_bounds(root)]))


def _group_bounds(root: Path) -> Iterator[int]:
    """The bounds of this process's control group and of those above it (version 2, or version 1's memory controller)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.lstrip("/")
        while True:
            try:
                yield int((group / name).read_text())
            except (OSError, ValueError):  # no such file in the topmost group or in a container's view; "max" is no bound
                pass
            if group == mount or mount not in group.parents:
                break
            group = group.parent
