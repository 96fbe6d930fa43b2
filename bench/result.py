"""What every benchmark has: facts of the machine, medians with their spread, tables, and the last line of JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import zmq

from zmqserve import __version__

GPU_FACTS = ("name", "driver_version", "memory.total")
GPU_PATIENCE_S = 10.0


class Spread(NamedTuple):
    """The median of some values, and the least and greatest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def cells(self, digits: int = 0) -> tuple[str, str]:
        """Two cells of a table: the median, and `min..max`."""
        return f"{self.median:,.{digits}f}", f"{self.low:,.{digits}f}..{self.high:,.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of text, in columns as wide as they must be: the first one to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(line)).rstrip() for line in lines
    )


def add_out(parser: argparse.ArgumentParser) -> None:
    """The option ``--out``."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep the result there, too")


def print_last_line(benchmark: str, settings: Mapping[str, Any], out: Path | None = None, /, **figures: Any) -> None:
    """The last line of standard output: one JSON object with the benchmark's name, its settings, the machine and these figures.

    out: a directory where it is kept as well.
    """
    line = to_json({"benchmark": benchmark, "settings": dict(settings), "machine": machine(), **figures})
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{benchmark}-{datetime.now().astimezone():%Y%m%d-%H%M%S}.json").write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


def progress(count: int, what: str) -> Iterable[int]:
    """0 to `count` - 1, shown on standard error while it is a terminal."""
    from tqdm import tqdm

    found: Iterable[int] = tqdm(range(count), what, leave=False, disable=None)
    return found


def to_json(value: Any) -> str:
    """As JSON; what JSON has no number for is a text, as in vLLM's results: ``"inf"``."""
    return json.dumps(_plain(value), ensure_ascii=False)


def rounded(values: Mapping[str, float], digits: int = 4) -> dict[str, float]:
    """With so many digits after the point."""
    return {name: round(value, digits) for name, value in values.items()}


@cache
def machine() -> dict[str, Any]:
    """Where and with what a benchmark runs. `load` is the load average (1 min) when it was first asked, `gpus` are those of nvidia-smi."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    return {
        "zmqserve": __version__,
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "pyzmq": zmq.__version__,
        "msgspec": msgspec.__version__,
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() if affinity is None else len(affinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load": round(os.getloadavg()[0], 2),
        "gpus": _gpus(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def _gpus() -> list[dict[str, str]]:
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=GPU_PATIENCE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [dict(zip(GPU_FACTS, (cell.strip() for cell in line.split(",")), strict=False)) for line in said.splitlines()]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value
