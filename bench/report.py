"""Results side by side: a Markdown table of the JSON that benchmarks leave, and plots of it.

    python -m bench report results/*.json --out report
    python -m bench report here=a.json vllm=b.json --out report

Takes files of `bench serve`, `vllm bench serve` and `bench frontends`, and of any benchmark here that ends with `ratios`. Runs with the
same label, model and load are one row: their medians, and from the least to the greatest where there are several.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report_plots
from .report_results import Point, Result, points, read
from .result import Spread, to_json

COLUMNS = (
    ("requests/s", "request_throughput", 2),
    ("output tokens/s", "output_throughput", 0),
    ("TTFT p50 ms", "median_ttft_ms", 1),
    ("TTFT p99 ms", "p99_ttft_ms", 1),
    ("TPOT p50 ms", "median_tpot_ms", 2),
    ("TPOT p99 ms", "p99_tpot_ms", 2),
    ("E2EL p50 ms", "median_e2el_ms", 0),
    ("E2EL p99 ms", "p99_e2el_ms", 0),
    ("goodput, requests/s", "request_goodput", 2),
)


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("report", help="JSON of benchmarks as a Markdown table and plots")
    parser.add_argument("files", nargs="+", metavar="[LABEL=]FILE", help="JSON results, or what a benchmark printed")
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR", help="for report.md and the plots (default report)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The report; exit code 2 for a file that holds no result."""
    try:
        results = read(args.files)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = points(results)
    args.out.mkdir(parents=True, exist_ok=True)
    plots = report_plots.draw(found, args.out)
    parts = [_serving(found), _sweeps(results), _ratios(results), _machines(results), *(f"![{plot.stem}]({plot.name})" for plot in plots)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(text)
    rows = [_row(point) for point in found]
    files = [str(path) for path in (args.out / "report.md", *plots)]
    print(to_json({"benchmark": "report", "settings": {"files": args.files, "out": args.out}, "rows": rows, "files": files}))
    return 0


def _serving(found: Sequence[Point]) -> str:
    if not found:
        return ""
    some = [column for column in COLUMNS if any(point.spread(column[1]) is not None for point in found)]
    header = ["system", "model", "load", "runs", "answered", "failed", "tokens in + out", *(title for title, _, _ in some), "client late"]
    rows = []
    for point in found:
        completed, failed = _total(point, "completed"), _total(point, "failed")
        taken, given = (_total(point, key) / max(1, completed) for key in ("total_input_tokens", "total_output_tokens"))
        late = [run for run in point.runs if run.data.get("client_lag", {}).get("limits")]
        cells = [_cell(point.spread(key), digits) for _, key, digits in some]
        known = any("client_lag" in run.data for run in point.runs)
        whether = f"in {len(late)} of {len(point.runs)}" if late else "no" if known else "not told"
        rows.append(
            [
                point.label,
                point.model,
                point.load,
                str(len(point.runs)),
                str(completed),
                str(failed),
                f"{taken:.0f} + {given:.0f}",
                *cells,
                whether,
            ]
        )
    return _markdown(header, rows)


def _sweeps(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        if (sweep := result.data.get("sweep")) is not None:
            bounds = ", ".join(f"{name} {bound:g} ms" for name, bound in (result.data.get("goodput") or {}).items())
            above = "-" if sweep["above"] is None else f"{sweep['above']:g}"
            rows.append([result.label, f"{sweep['goodput_share']:.1%} within {bounds}", f"{sweep['request_rate']:g}", above])
    return _markdown(["system", "goodput", "highest rate that keeps it, requests/s", "lowest above that does not"], rows) if rows else ""


def _ratios(results: Sequence[Result]) -> str:
    """One table for each benchmark: a row for each ratio, a column for each label."""
    parts = []
    for name in dict.fromkeys(str(result.data.get("benchmark")) for result in results if "ratios" in result.data):
        some = [result for result in results if "ratios" in result.data and str(result.data.get("benchmark")) == name]
        labels = list(dict.fromkeys(result.label for result in some))
        rows = []
        for ratio in dict.fromkeys(ratio for result in some for ratio in result.data["ratios"]):
            values = [
                [each.data["ratios"][ratio] for each in some if each.label == label and ratio in each.data["ratios"]] for label in labels
            ]
            rows.append([ratio, *(_cell(Spread.of(of) if of else None, 3) for of in values)])
        parts.append(_markdown([f"{name}: ratio", *labels], rows))
    return "\n\n".join(parts)


def _machines(results: Sequence[Result]) -> str:
    told: dict[str, list[str]] = {}
    for result in results:
        facts = result.data.get("machine")
        if facts:
            gpus = ", ".join(gpu.get("name", "") for gpu in facts.get("gpus", []))
            names = ("cpu", "cores", "memory_gib", "system", "python", "zmqserve", "libzmq")
            words = ", ".join(f"{name} {facts[name]}" for name in names if name in facts) + (f", {gpus}" if gpus else "")
            told.setdefault(words, []).append(result.label)
    return "\n".join(f"- {', '.join(dict.fromkeys(labels))}: {words}" for words, labels in told.items())


def _row(point: Point) -> dict[str, Any]:
    spreads = {key: point.spread(key) for _, key, _ in COLUMNS}
    return {
        "label": point.label,
        "model": point.model,
        "max_concurrency": point.concurrency,
        "request_rate": point.rate,
        "runs": len(point.runs),
        **{key: None if spread is None else round(spread.median, 4) for key, spread in spreads.items()},
    }


def _total(point: Point, key: str) -> int:
    return sum(int(run.number(key) or 0) for run in point.runs)


def _cell(spread: Spread | None, digits: int) -> str:
    if spread is None:
        return "-"
    median, limits = spread.cells(digits)
    return median if spread.low == spread.high else f"{median} ({limits})"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows))
