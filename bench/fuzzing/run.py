"""Runs one target for so many inputs, in rounds that each begin anew, and keeps what it found."""

from __future__ import annotations

import gc
import os
import time
import traceback
from pathlib import Path
from random import Random

from msgspec import Struct

from .target import Input, NewTarget

ROUND = 20_000
"""Inputs of one life of a target."""
CHECK = 500
"""Inputs between two checks."""
MOST_CRASHES = 5
"""Of one target that are kept; with the last of them its run ends."""


class Crash(Struct):
    """Something that must not happen: in which round, at which of its inputs, and what was fed last. `where`: the traceback's end."""

    target: str
    round: int
    number: int
    given: str
    error: str
    where: str


class Result(Struct):
    """Of one target. Times in s; `grown_mb`: of this process's memory, over the second half of the inputs."""

    target: str
    inputs: int = 0
    took_s: float = 0.0
    longest_s: float = 0.0
    longest_given: str = ""
    grown_mb: float = 0.0
    crashes: list[Crash] = []


def fuzz(name: str, new: NewTarget, *, inputs: int, seed: int, first_round: int = 0) -> Result:
    """Feed so many inputs. Round r of a target and a seed is always the same."""
    result = Result(name, crashes=[])
    began_s, half_mb = time.perf_counter(), 0.0
    number = first_round
    while result.inputs < inputs and len(result.crashes) < MOST_CRASHES:
        _round(result, new, min(ROUND, inputs - result.inputs), seed, number)
        number += 1
        if not half_mb and 2 * result.inputs >= inputs:
            half_mb = resident_mb()
    result.took_s = time.perf_counter() - began_s
    result.grown_mb = resident_mb() - half_mb
    return result


def _round(result: Result, new: NewTarget, inputs: int, seed: int, number: int) -> None:
    clock = time.thread_time  # of this thread only: what else the machine does is not the input's
    given: Input = ()
    at = 0
    try:
        target = new(Random(f"{seed}/{result.target}/{number}"))
        for at in range(inputs):
            result.inputs += 1
            given = target.draw()
            before_s = clock()
            target.feed(given)
            took_s = clock() - before_s
            if took_s > result.longest_s:
                result.longest_s, result.longest_given = took_s, shown(given)
            if at % CHECK == CHECK - 1:
                target.check()
        target.finish()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what was looked for
        place = "".join(traceback.format_tb(error.__traceback__)[-2:])
        result.crashes.append(Crash(result.target, number, at, shown(given), f"{type(error).__name__}: {error}"[:1000], place))


def shown(given: Input) -> str:
    """An input as Python writes it; what is long is told by its beginning and its length."""
    return ", ".join(text if len(text := repr(each)) <= 2000 else f"{text[:500]}... ({len(each)} bytes)" for each in given)


def resident_mb() -> float:
    """Of this process, after what nobody needs was let go."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
