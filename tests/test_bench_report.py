"""`bench report`: JSON files in, a Markdown table and plots out; and the baseline of ratios."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import baseline, report
from bench.baseline import Baseline
from bench.report_results import read
from bench.result import Spread, machine, print_last_line, table, to_json

pytest.importorskip("matplotlib")

PNG = b"\x89PNG\r\n\x1a\n"


def serving(label: str | None = "a", **changes: Any) -> dict[str, Any]:
    """A result of `bench serve`, without details."""
    result: dict[str, Any] = {
        "benchmark": "serve",
        "backend": "zmqserve",
        "label": label,
        "model_id": "m",
        "request_rate": "inf",
        "max_concurrency": 4,
        "completed": 10,
        "failed": 1,
        "total_input_tokens": 1280,
        "total_output_tokens": 640,
        "request_throughput": 5.0,
        "output_throughput": 320.0,
        "median_ttft_ms": 20.0,
        "p99_ttft_ms": 50.0,
        "client_lag": {"limits": []},
        "machine": {"cpu": "Z80", "cores": 1},
    }
    return result | changes


def detailed(**changes: Any) -> dict[str, Any]:
    return serving(**changes) | {"ttfts": [0.01, 0.02, 0.0], "latencies": [0.1, 0.3, 0.0], "errors": ["", "", "lost"]}


def reported(folder: Path, *results: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> tuple[str, dict[str, Any]]:
    """report.md, and the last line."""
    paths = []
    for number, result in enumerate(results):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(result))
    assert ran(*map(str, paths), "--out", str(folder / "out")) == 0
    return (folder / "out" / "report.md").read_text(), json.loads(capsys.readouterr().out.splitlines()[-1])


def ran(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser.add_subparsers())
    args = parser.parse_args(["report", *arguments])
    code: int = args.run(args)
    return code


def rows(text: str) -> list[list[str]]:
    """Cells of the first table, its rule left out."""
    block = text.split("\n\n", maxsplit=1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block if "---" not in line]


def test_a_row_for_each_system_and_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, last = reported(
        tmp_path,
        serving(),
        serving("b", max_concurrency=8),
        serving("b"),
        serving("b", request_rate=2.5, max_concurrency=None),
        capsys=capsys,
    )
    header, *found = rows(text)
    assert [row[header.index("load")] for row in found] == ["4 at once", "4 at once", "8 at once", "2.5/s"]
    first = dict(zip(header, found[0], strict=True))
    assert (first["system"], first["answered"], first["failed"], first["tokens in + out"]) == ("a", "10", "1", "128 + 64")
    assert (first["requests/s"], first["output tokens/s"], first["TTFT p50 ms"], first["TTFT p99 ms"]) == ("5.00", "320", "20.0", "50.0")
    assert first["client late"] == "no"
    assert "E2EL p99 ms" not in header, "nobody has it"
    assert "cpu Z80, cores 1" in text
    assert [row["request_throughput"] for row in last["rows"]] == [5.0] * 4


def test_runs_of_one_load_are_one_row_with_their_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [serving(median_ttft_ms=ttft, client_lag={"limits": ["late"] if ttft > 25 else []}) for ttft in (30.0, 10.0, 20.0)]
    header, row = rows(reported(tmp_path, *runs, capsys=capsys)[0])
    assert row[header.index("runs")] == "3"
    assert row[header.index("TTFT p50 ms")] == "20.0 (10.0..30.0)"
    assert row[header.index("client late")] == "in 1 of 3"


def test_plots_are_made_of_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    closed = [serving(max_concurrency=n, median_ttft_ms=10.0 * n) for n in (1, 4)]
    for name, results, plots in (
        ("closed", closed, {"ttft_concurrency", "throughput_concurrency"}),
        ("open", [serving(request_rate=2.0, max_concurrency=None)], {"ttft_rate", "throughput_rate"}),
        ("detailed", [detailed()], {"ttft_concurrency", "throughput_concurrency", "latency_cdf"}),
        ("none", [serving(max_concurrency=None)], set()),
    ):
        folder = tmp_path / name
        folder.mkdir()
        text, last = reported(folder, *results, capsys=capsys)
        found = {path.stem: path for path in (folder / "out").glob("*.png")}
        assert set(found) == plots
        assert all(path.read_bytes().startswith(PNG) for path in found.values())
        assert all(f"({name}.png)" in text for name in plots)
        assert len(last["files"]) == 1 + len(plots)


def test_failed_requests_are_left_out_of_distributions(tmp_path: Path) -> None:
    from bench.report_results import points

    path = tmp_path / "r.json"
    path.write_text(json.dumps(detailed()))
    (point,) = points(read([str(path)]))
    assert point.pooled("latencies") == [0.1, 0.3]


def test_results_are_read_from_json_from_lines_and_from_what_was_printed(tmp_path: Path) -> None:
    one, lines, printed = tmp_path / "one.json", tmp_path / "lines.json", tmp_path / "printed"
    one.write_text(json.dumps(serving(None), indent=2))
    lines.write_text(json.dumps(serving("x")) + "\n" + json.dumps(serving("y")))
    printed.write_text("a table\n{no json}\n" + json.dumps({"benchmark": "transport", "ratios": {"r": 1.5}}) + "\n")
    assert [each.label for each in read([str(one), str(lines), str(printed), f"mine={one}"])] == ["zmqserve", "x", "y", "printed", "mine"]


@pytest.mark.parametrize(("text", "why"), [("{}", "holds no result"), ("", "holds no result"), (None, "cannot read")])
def test_a_file_without_a_result_is_told(tmp_path: Path, text: str | None, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f"
    if text is not None:
        path.write_text(text)
    assert ran(str(path), "--out", str(tmp_path / "out")) == 2
    assert why in capsys.readouterr().err


def test_ratios_and_sweeps_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"request_rate": 12.5, "above": 13, "goodput_share": 0.99, "trials": []}
    text, _ = reported(
        tmp_path,
        serving(sweep=found, goodput={"ttft": 200}),
        {"benchmark": "transport", "label": "now", "ratios": {"r": 1.5}},
        {"benchmark": "transport", "label": "then", "ratios": {"r": 1.25, "s": 2}},
        capsys=capsys,
    )
    assert "| a | 99.0% within ttft 200 ms | 12.5 | 13 |" in text
    assert "| transport: ratio | now | then |" in text
    assert "| r | 1.500 | 1.250 |" in text
    assert "| s | - | 2.000 |" in text


def test_arms_of_front_ends_are_systems_with_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"model": "m", "input_len": 16, "output_len": 10}
    figures = {"own": {"2": {"tokens_per_s": 100.0, "ttft_p50_ms": 5.0, "ttft_p99_ms": 9.0}}, "offline": {"2": {"tokens_per_s": 120.0}}}
    runs = {"own": {"2": [{"tokens": 20, "wall_s": 0.2, "ttfts_ms": [4.0, 6.0]}, {"tokens": 20, "wall_s": 0.1, "ttfts_ms": [5.0, 9.0]}]}}
    only = {"benchmark": "frontends", "label": "run", "settings": settings, "figures": figures, "ratios": {"r": 0.5}}
    text, last = reported(tmp_path, only, only | {"runs": runs}, capsys=capsys)
    own, offline = last["rows"]
    assert (own["label"], own["max_concurrency"], own["runs"]) == ("own", 2, 3)
    assert (own["output_throughput"], own["request_throughput"], own["median_ttft_ms"]) == (100.0, 10.0, 5.0)
    assert (offline["label"], offline["output_throughput"], offline["median_ttft_ms"]) == ("offline", 120.0, None)
    assert "| frontends: ratio | run |" in text


# --- the baseline ------------------------------------------------------------------------------


@pytest.fixture
def bounds(tmp_path: Path) -> Path:
    path = tmp_path / "baseline.json"
    ratios = {
        "low": {"ratio": 1.0, "better": "lower", "tolerance": 0.25, "why": "it swings"},
        "high": {"ratio": 0.8, "better": "higher", "tolerance": 0.25, "why": "it swings"},
    }
    path.write_text(json.dumps({"transport": {"measured": "by hand", "ratios": ratios}}))
    return path


@pytest.mark.parametrize(
    ("low", "high", "worse"), [(1.25, 0.6, []), (0.1, 9.0, []), (1.26, 0.6, ["low"]), (1.0, 0.59, ["high"]), (2.0, 0.1, ["low", "high"])]
)
def test_a_ratio_may_be_worse_by_its_tolerance(
    bounds: Path, low: float, high: float, worse: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert baseline.check("transport", {"low": low, "high": high}, bounds) is not bool(worse)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("WORSE")] == worse


@pytest.mark.parametrize("ratios", [{"low": 1.0}, {"low": 1.0, "high": 0.8, "new": 1.0}])
def test_a_ratio_that_one_side_lacks_is_not_kept(bounds: Path, ratios: dict[str, float]) -> None:
    assert not baseline.check("transport", ratios, bounds)


def test_a_baseline_is_renewed_with_medians(bounds: Path, tmp_path: Path) -> None:
    facts = machine()
    path = tmp_path / "runs"
    runs = [{"benchmark": "transport", "machine": facts, "ratios": {"low": low, "high": 0.7, "else": 1}} for low in (1.3, 1.1, 1.2)]
    path.write_text("\n".join(map(json.dumps, runs)))
    baseline.renew(read([str(path)]), bounds)
    renewed = msgspec.json.decode(bounds.read_bytes(), type=dict[str, Baseline])["transport"]
    assert {name: (bound.ratio, bound.tolerance) for name, bound in renewed.ratios.items()} == {"low": (1.2, 0.25), "high": (0.7, 0.25)}
    assert "3 runs" in renewed.measured
    path.write_text(json.dumps({"benchmark": "transport", "machine": facts, "ratios": {"low": 1.0}}))
    with pytest.raises(ValueError, match="no result of transport has high"):
        baseline.renew(read([str(path)]), bounds)


def test_the_baseline_that_is_kept_states_a_tolerance_and_a_reason_for_each_ratio() -> None:
    kept = msgspec.json.decode(baseline.PATH.read_bytes(), type=dict[str, Baseline])
    assert set(kept["transport"].ratios) == {"rtt_tcp_vs_proxy", "rtt_ipc_vs_proxy", "relay_token_vs_proxy", "relay_step_vs_proxy"}
    for bound in kept["transport"].ratios.values():
        assert 0 < bound.tolerance < 1
        assert len(bound.why) > 20


# --- what all benchmarks share -----------------------------------------------------------------


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table(("name", "n"), [("a", "1,000"), ("longer", "2")]) == "name        n\na       1,000\nlonger      2"


def test_a_spread_is_the_median_and_its_limits() -> None:
    assert Spread.of([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert Spread.of([3000.0, 1.0, 2.0]).cells(1) == ("2.0", "1.0..3,000.0")


def test_json_has_texts_for_what_it_has_no_number_for() -> None:
    assert json.loads(to_json({"a": [math.inf, (1, Path("x"))], "b": {"c": math.nan}})) == {"a": ["inf", [1, "x"]], "b": {"c": "nan"}}


def test_the_last_line_is_the_result_and_can_be_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_last_line("x", {"n": 1}, tmp_path / "new", ratios={"r": 2.0})
    line = json.loads(capsys.readouterr().out)
    assert (line["benchmark"], line["settings"], line["ratios"], line["machine"]) == ("x", {"n": 1}, {"r": 2.0}, machine())
    (path,) = (tmp_path / "new").iterdir()
    assert json.loads(path.read_text()) == line
    (result,) = read([f"now={path}"])
    assert (result.label, result.serving) == ("now", False)
