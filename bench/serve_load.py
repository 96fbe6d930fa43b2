"""The client processes of `bench serve`: what each has to do, their common start, and what they bring back together."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from .metrics import Record
from .serve_client import Ask, Part, Share, main
from .serve_lag import TICK_S, Lag
from .serve_samples import Sample

START_S = 0.05
"""From the word to the start, so that it reaches all processes before."""
READY_S = 600.0
"""What the slowest of them may take to be warm."""

_spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Load:
    """What was measured. `records`: in the order of the plan; `duration_s`: from the start to the last end; `lags`: of each process."""

    records: Sequence[Record]
    duration_s: float
    lags: Sequence[Lag]


def shares(
    ask: Ask,
    samples: Sequence[Sample],
    due_s: Sequence[float],
    *,
    processes: int,
    concurrency: int | None,
    warmup: Sample,
    warmups: int,
) -> list[Share]:
    """The requests dealt out in turn, concurrency and warm-ups as evenly as they go; fewer processes where there is too little for all."""
    processes = min(processes, len(samples), concurrency or processes)

    def part(whole: int, number: int) -> int:
        return whole // processes + (number < whole % processes)

    return [
        Share(
            ask,
            samples[number::processes],
            range(number, len(samples), processes),
            due_s[number::processes],
            part(concurrency, number) if concurrency else None,
            warmup,
            part(warmups, number),
        )
        for number in range(processes)
    ]


def run(work: Sequence[Share], *, progress: bool) -> Load:
    """Start a process for each share, let all begin at one moment, and wait for them. RuntimeError when one of them dies."""
    from tqdm import tqdm

    with _processes(work) as (pipes, counts):
        for pipe in pipes:
            _received(pipe, READY_S)
        start_s = time.perf_counter() + START_S
        for pipe in pipes:
            pipe.send(start_s)
        with tqdm(total=sum(len(share.samples) for share in work), unit="req", disable=not progress) as bar:
            parts = _parts(pipes, counts, bar)
    records = sorted((record for part in parts for record in part.records), key=lambda record: record.index)
    return Load(records, max(part.ended_s for part in parts) - start_s, [part.lag for part in parts])


def _parts(pipes: Sequence[Connection], counts: Sequence[Any], bar: Any) -> list[Part]:
    """Tell each process the time until it brings its part."""
    parts: dict[Connection, Part] = {}
    while len(parts) < len(pipes):
        open_ = [pipe for pipe in pipes if pipe not in parts]
        for pipe in wait(open_, TICK_S):
            assert isinstance(pipe, Connection)
            parts[pipe] = _received(pipe, 0)
        for pipe in open_:
            # One that has just ended does not read any more: its part, or its death, is found in the next turn.
            with suppress(ConnectionError):
                pipe.send(time.perf_counter())
        bar.update(sum(count.value for count in counts) - bar.n)
    return [parts[pipe] for pipe in pipes]


@contextmanager
def _processes(work: Sequence[Share]) -> Iterator[tuple[list[Connection], list[Any]]]:
    pipes: list[Connection] = []
    counts: list[Any] = []
    processes: list[Any] = []
    try:
        for share in work:
            mine, theirs = _spawn.Pipe()
            counts.append(_spawn.RawValue("Q"))
            processes.append(_spawn.Process(target=main, args=(theirs, share, counts[-1]), daemon=True))
            processes[-1].start()
            # It is the child's alone now, so that the end of the child is the end of the pipe.
            theirs.close()
            pipes.append(mine)
        yield pipes, counts
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _received(pipe: Connection, patience_s: float) -> Any:
    try:
        if not pipe.poll(patience_s):
            raise RuntimeError(f"a client process was not ready within {patience_s:g} s")
        return pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError("a client process died; what it said stands above") from None
