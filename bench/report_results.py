"""Results of benchmarks as a report takes them: read from files, and runs of the same thing put together."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .result import Spread


@dataclass(frozen=True)
class Result:
    """One run. `data` is its JSON, `label` the system or arm that it belongs to."""

    label: str
    data: Mapping[str, Any]
    path: Path

    @property
    def serving(self) -> bool:
        """Whether it is of `bench serve`, or of `vllm bench serve`, which has the same keys."""
        return "request_throughput" in self.data

    def number(self, key: str) -> float | None:
        """A value of it; None where there is none that is a number."""
        value = self.data.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@dataclass(frozen=True)
class Point:
    """One load on one system: all the runs of it. `rate`: None for a closed loop; `concurrency`: None where it had no bound."""

    label: str
    model: str
    concurrency: int | None
    rate: float | None
    runs: Sequence[Result]

    @property
    def load(self) -> str:
        """What was asked of it, in words."""
        bound = "" if self.concurrency is None else f"{self.concurrency} at once"
        rate = "" if self.rate is None else f"{self.rate:g}/s"
        return ", ".join(part for part in (rate, bound) if part) or "all at once"

    def spread(self, key: str) -> Spread | None:
        """Of a value over the runs that have it; None where none has."""
        values = [value for run in self.runs if (value := run.number(key)) is not None]
        return Spread.of(values) if values else None

    def pooled(self, key: str) -> list[float]:
        """What detailed results have of each request that was answered, of all runs together: seconds."""
        return [
            float(value)
            for run in self.runs
            for value, error in zip(run.data.get(key, ()), run.data.get("errors", ()), strict=False)
            if not error
        ]


def read(given: Sequence[str]) -> list[Result]:
    """The results in files, each given as FILE or LABEL=FILE: one JSON object, or lines of which some are (what a bench printed).

    Without a label it is the result's own, else its backend, else the file's name. ValueError, which names the file, where there is none.
    """
    return [result for each in given for result in _read(each)]


def points(results: Iterable[Result]) -> list[Point]:
    """Serving results by system and load, in the order of the systems in `results`, and of their loads."""
    groups: dict[tuple[str, str, int | None, float | None], list[Result]] = defaultdict(list)
    for result in results:
        if result.serving:
            concurrency = result.number("max_concurrency")
            key = (
                result.label,
                str(result.data.get("model_id", "")),
                None if concurrency is None else int(concurrency),
                result.number("request_rate"),
            )
            groups[key].append(result)
    labels = list(dict.fromkeys(label for label, *_ in groups))
    found = [Point(*key, runs) for key, runs in groups.items()]
    return sorted(found, key=lambda point: (labels.index(point.label), point.model, point.rate or 0, point.concurrency or math.inf))


def _read(given: str) -> list[Result]:
    label, found, name = given.partition("=")
    if not found or Path(given).exists():
        label, name = "", given
    path = Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    objects = [each for each in _objects(text) if "request_throughput" in each or "ratios" in each]
    if not objects:
        raise ValueError(f"{path} holds no result of a benchmark: no JSON object with request_throughput or ratios")
    results = [Result(label or str(data.get("label") or data.get("backend") or path.stem), data, path) for data in objects]
    return results + [arm for result in results if result.data.get("benchmark") == "frontends" for arm in _arms(result, label)]


def _arms(result: Result, label: str) -> list[Result]:
    """What `bench frontends` measured of each arm, run by run where it says so, by the names that `bench serve` has for it. `label`:
    what stands before the arm's name, where one was given."""
    settings, medians = result.data["settings"], result.data["figures"]
    figures = {arm: {streams: [each] for streams, each in some.items()} for arm, some in medians.items()}
    arms = []
    for arm, some in result.data.get("runs", figures).items():
        for streams, runs in some.items():
            for each in runs:
                rate = each["tokens"] / each["wall_s"] if "wall_s" in each else each["tokens_per_s"]
                data = {"model_id": settings["model"], "max_concurrency": int(streams), "completed": int(streams), "failed": 0}
                data |= {
                    "total_input_tokens": int(streams) * settings["input_len"],
                    "total_output_tokens": int(streams) * settings["output_len"],
                }
                data |= {"request_throughput": rate / settings["output_len"], "output_throughput": rate}
                if times := sorted(each.get("ttfts_ms", ())):
                    data |= {"median_ttft_ms": statistics.median(times), "p99_ttft_ms": times[int(0.99 * (len(times) - 1))]}
                elif "ttft_p50_ms" in each:
                    data |= {"median_ttft_ms": each["ttft_p50_ms"], "p99_ttft_ms": each["ttft_p99_ms"]}
                arms.append(Result(f"{label} {arm}".lstrip(), data, result.path))
    return arms


def _objects(text: str) -> list[dict[str, Any]]:
    parts = (text,) if _is_json(text) else text.splitlines()
    return [json.loads(part) for part in parts if part.lstrip().startswith("{") and _is_json(part)]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
