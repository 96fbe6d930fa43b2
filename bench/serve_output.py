"""How `bench serve` tells its results: printed, in files, and as the last line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from . import metrics
from .metrics import Record
from .result import to_json
from .serve_sweep import Sweep, Trial

WIDTH = 50

ROWS = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Maximum request concurrency:", "max_concurrency"),
    ("Request rate configured (RPS):", "request_rate"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Request goodput (req/s):", "request_goodput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)


def print_result(result: dict[str, Any], names: Sequence[str]) -> None:
    """For people: the rows of `vllm bench serve`, then what it does not tell."""
    print(" Serving Benchmark Result ".center(WIDTH, "="))
    for title, key in ROWS:
        if result[key] is not None and result[key] != float("inf"):
            print(f"{title:<40} {_number(result[key]):<10}")
    for name in names:
        if f"mean_{name}_ms" not in result:
            continue
        short, title = metrics.TITLES[name]
        print(title.center(WIDTH, "-"))
        for key, value in result.items():
            kind, _, rest = key.partition("_")
            if rest == f"{name}_ms" and kind != "std":
                print(f"{f'{kind.capitalize()} {short} (ms):':<40} {value:<10.2f}")
    lag = result["client_lag"]
    print("The client itself".center(WIDTH, "-"))
    for kind in ("timers", "reads", "arrivals"):
        if (late := lag[f"{kind}_ms"]) is not None:
            print(f"{f'Late {kind} (ms), p50 / p99 / max:':<40} {late['p50']:.2f} / {late['p99']:.2f} / {late['max']:.2f}")
    print(f"{'Share of a core, each process:':<40} {' '.join(f'{share:.2f}' for share in lag['cpu_share'])}")
    for name, count in result["errors_by_type"].items():
        print(f"{f'Failed with {name}:':<40} {count}")
    print("=" * WIDTH)
    for why in lag["limits"]:
        print(f"warning: the results show the client, too: {why}", file=sys.stderr)
    if lag["limits"]:
        print("warning: try --client-processes, another machine for the client, or a quieter one", file=sys.stderr)


def trial_line(trial: Trial, wanted: float) -> str:
    """One rate of a sweep."""
    limits = "; the client was late itself" if trial.result["client_lag"]["limits"] else ""
    verdict = "kept" if trial.kept(wanted) else "not kept"
    return f"{trial.request_rate:10.2f} requests/s: {trial.share:7.2%} of {trial.result['num_prompts']} are good, {verdict}{limits}"


def print_sweep(found: Sweep, wanted: float, tolerance: float) -> None:
    """What a sweep found."""
    above = "nothing above it failed" if found.above is None else f"{found.above:.2f} does not"
    how = f"{len(found.trials)} trials, bisected to {tolerance:.0%}"
    print(f"{found.request_rate:.2f} requests/s keep the goodput for {wanted:.1%} of the requests; {above} ({how})")


def print_line(result: dict[str, Any]) -> None:
    """The last line."""
    print(to_json(result), flush=True)


def what_failed(result: dict[str, Any], records: Sequence[Record]) -> str:
    """The errors by type, and the first one's words."""
    counts = ", ".join(f"{name} x {count}" for name, count in result["errors_by_type"].items())
    return f"{counts}; the first: {next((record.error for record in records if record.error), 'no words')}"


def save(result: dict[str, Any], records: Sequence[Record], args: argparse.Namespace, name: str = "") -> None:
    """Write what the options ask for: a result as vLLM's, and into ``--out`` it with all details, and the requests as JSON Lines.

    name: put into the names of the files in ``--out``.
    """
    stem = "-".join(part for part in (_stem(result), name) if part)
    detailed = result | metrics.details(records)
    if (args.save_result or args.append_result) and bool(name) == args.sweep:
        folder = args.result_dir or Path()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / (args.result_filename or f"{stem}.json")
        before = args.append_result and path.exists() and path.stat().st_size > 0
        with path.open("a" if args.append_result else "w", encoding="utf-8") as file:
            file.write(("\n" if before else "") + to_json(detailed if args.save_detailed else result))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / f"{stem}.json").write_text(to_json(detailed) + "\n", encoding="utf-8")
        lines = b"".join(msgspec.json.encode(record) + b"\n" for record in records)
        (args.out / f"{stem}.requests.jsonl").write_bytes(lines)


def _stem(result: dict[str, Any]) -> str:
    """As `vllm bench serve` names its files."""
    concurrency = f"-concurrency{result['max_concurrency']}" if result["max_concurrency"] is not None else ""
    model = result["model_id"].split("/")[-1]
    return f"{result['label'] or result['backend']}-{result['request_rate']}qps{concurrency}-{model}-{result['date']}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
