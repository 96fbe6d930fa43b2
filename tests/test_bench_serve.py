"""`bench serve` against real networks of echo workers: what it measures is what they did, and what goes wrong is told."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from bench import serve, serve_load
from bench.metrics import DETAIL_KEYS, Record
from bench.serve_arrivals import arrivals
from bench.serve_client import Ask
from bench.serve_samples import Kind, Sample
from zmqserve.requests import Prompt

from .processes import PATIENCE_S, ServedController, network

DELAY_FIRST_S, DELAY_PER_TOKEN_S = 0.1, 0.02
SMALL = ("--random-input-len", "6", "--random-output-len", "4", "--disable-tqdm")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """Of a network whose worker takes its time."""
    delays = ("--delay-first", str(DELAY_FIRST_S), "--delay-per-token", str(DELAY_PER_TOKEN_S))
    with network("w", worker_arguments=delays) as (controller, _):
        yield controller.clients


@pytest.fixture(scope="module")
def faulty() -> Iterator[str]:
    """Of a network whose worker fails on requests with the word !raise."""
    with network("w", worker_arguments=("--faults",)) as (controller, _):
        yield controller.clients


@dataclass(frozen=True)
class Ran:
    """One run of the benchmark."""

    code: int
    result: dict[str, Any]
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def ran(endpoint: str, *arguments: str) -> Ran:
        parser = argparse.ArgumentParser()
        serve.add_arguments(parser.add_subparsers())
        args = parser.parse_args(["serve", "--controller", endpoint, *SMALL, *arguments])
        code: int = args.run(args)
        out, err = capsys.readouterr()
        last = out.splitlines()[-1] if out else ""
        return Ran(code, json.loads(last) if last.startswith("{") else {}, out, err)

    return ran


def requests(folder: Path) -> list[dict[str, Any]]:
    """The records that a run left."""
    (path,) = folder.glob("*.requests.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def most_at_once(records: list[dict[str, Any]]) -> int:
    """At any moment, of their times on the wire."""
    starts = [(each["start_s"], 1) for each in records]
    ends = [(each["start_s"] + each["latency_s"], -1) for each in records]
    return max(accumulate(change for _, change in sorted(starts + ends)))


# --- what is measured --------------------------------------------------------------------------


def test_latencies_are_those_that_the_worker_made(run: Any, endpoint: str, tmp_path: Path) -> None:
    ran = run(endpoint, "--num-prompts", "12", "--max-concurrency", "4", "--out", str(tmp_path), "--metric-percentiles", "50,99")
    assert ran.code == 0
    records = requests(tmp_path)
    for each in records:
        assert each["ttft_s"] * 1000 >= each["first_ms"] >= DELAY_FIRST_S * 999, "the client sees nothing before the worker makes it"
        assert each["latency_s"] >= DELAY_FIRST_S + 3 * DELAY_PER_TOKEN_S * 0.999
        assert len(each["itls_s"]) == 3
    result = ran.result
    # From above a loaded machine knows no bound: so wide that only a wrong unit or a wrong begin is beyond.
    assert DELAY_FIRST_S * 999 <= result["median_ttft_ms"] <= 5000 * DELAY_FIRST_S
    assert DELAY_PER_TOKEN_S * 500 <= result["median_tpot_ms"] <= 10_000 * DELAY_PER_TOKEN_S
    assert result["p99_e2el_ms"] >= result["median_e2el_ms"] >= result["median_ttft_ms"]


def test_lengths_are_exact_by_the_usage(run: Any, endpoint: str) -> None:
    result = run(endpoint, "--num-prompts", "10", "--random-range-ratio", "0.5", "--seed", "3").result
    lengths = [sum(each) for each in zip(*drawn(10, 3), strict=True)]
    assert (result["completed"], result["failed"]) == (10, 0)
    assert [result["total_input_tokens"], result["total_output_tokens"]] == lengths
    assert result["prompts"] == "ids"
    assert result["left_out"] == ["ignore_eos"], "an echo cannot"


def drawn(count: int, seed: int) -> list[tuple[int, int]]:
    from bench.serve_samples import RandomLengths, random_samples

    samples = random_samples(count, RandomLengths(6, 4, 0.5, 0.5, 0), range(1000, 32_000), "ids", seed)
    return [(each.input_tokens, each.output_tokens) for each in samples]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_closed_loop_has_no_more_open_than_it_may(run: Any, endpoint: str, tmp_path: Path, processes: int) -> None:
    ran = run(
        endpoint,
        "--num-prompts",
        "14",
        "--max-concurrency",
        "3",
        "--client-processes",
        str(processes),
        "--out",
        str(tmp_path),
        "--num-warmups",
        "3",
    )
    records = requests(tmp_path)
    assert [each["index"] for each in records] == list(range(14)), "warm-ups are not recorded, and all processes' requests are in order"
    assert 2 <= most_at_once(records) <= 3
    assert ran.result["network"]["counters"]["requests"] == 14 + 3, "they were sent, though"
    assert ran.result["client_processes"] == processes == len(ran.result["client_lag"]["cpu_share"])
    assert ran.result["client_lag"]["arrivals_ms"] is None


def test_an_open_loop_sends_by_its_plan_and_never_before(run: Any, endpoint: str, tmp_path: Path) -> None:
    ran = run(endpoint, "--num-prompts", "20", "--request-rate", "40", "--client-processes", "2", "--seed", "5", "--out", str(tmp_path))
    records = requests(tmp_path)
    plan = arrivals(20, 40.0, 1.0, 5)
    began_s = records[0]["due_s"] - plan[0]
    assert [each["due_s"] - began_s for each in records] == pytest.approx(plan, abs=1e-6)
    assert all(each["arrival_s"] >= each["due_s"] - 0.001 for each in records), "a clock's resolution early at most"
    assert all(each["start_s"] >= each["arrival_s"] for each in records)
    assert ran.result["request_rate"] == 40
    assert ran.result["client_lag"]["arrivals_ms"]["max"] >= 0


def test_a_bounded_open_loop_tells_the_wait_in_the_client(run: Any, endpoint: str) -> None:
    names = "e2el,client_queue_time,e2el_including_client_queue"
    result = run(endpoint, "--num-prompts", "8", "--request-rate", "200", "--max-concurrency", "1", "--percentile-metrics", names).result
    # Eight answers, one after another, were due at once.
    assert result["p99_client_queue_time_ms"] >= 5 * DELAY_FIRST_S * 1000
    assert result["mean_e2el_including_client_queue_ms"] == pytest.approx(result["mean_e2el_ms"] + result["mean_client_queue_time_ms"])
    assert "mean_ttft_ms" not in result


def test_goodput_of_bounds_that_all_keep_and_that_none_keeps(run: Any, endpoint: str) -> None:
    kept = run(endpoint, "--num-prompts", "4", "--goodput", "ttft:60000", "e2el:60000").result
    assert kept["good_requests"] == 4
    assert kept["request_goodput"] == kept["request_throughput"]
    assert run(endpoint, "--num-prompts", "4", "--goodput", f"ttft:{DELAY_FIRST_S * 500}").result["request_goodput"] == 0


def test_a_result_says_what_it_was_measured_with(run: Any, endpoint: str) -> None:
    result = run(endpoint, "--num-prompts", "2", "--metadata", "tp=2", "--label", "here").result
    assert (result["backend"], result["model_id"], result["label"], result["tp"]) == ("zmqserve", "m", "here", "2")
    assert result["request_rate"] == "inf"
    assert result["settings"]["random_output_len"] == 4
    assert {"cpu", "cores", "python", "libzmq", "gpus", "load"} <= set(result["machine"])
    (worker,) = result["network"]["workers"]
    assert (worker["name"], worker["backend"], worker["slots"]) == ("w", "echo", 256)
    assert result["network"]["counters"]["ended: length"] == 2
    assert not DETAIL_KEYS & set(result), "the last line is one that can be read"


@pytest.mark.heavy
def test_the_sweep_of_a_network_that_keeps_all_ends_at_the_highest_rate(run: Any, endpoint: str) -> None:
    ran = run(
        endpoint,
        *(
            "--sweep",
            "--goodput",
            "e2el:60000",
            "--num-prompts",
            "4",
            "--sweep-start",
            "20",
            "--request-rate",
            "50",
            "--sweep-seconds",
            "0.2",
        ),
    )
    assert ran.code == 0
    found = ran.result["sweep"]
    assert (found["request_rate"], found["above"]) == (50, None)
    assert [trial["request_rate"] for trial in found["trials"]] == [20, 40, 50]
    assert [trial["num_prompts"] for trial in found["trials"]] == [4, 8, 10]


@pytest.mark.heavy
def test_the_sweep_of_a_network_that_keeps_nothing_says_so(run: Any, faulty: str) -> None:
    ran = run(faulty, "--sweep", "--goodput", "e2el:0", "--num-prompts", "2", "--sweep-start", "1000", "--sweep-seconds", "0.001")
    assert ran.code == 1
    assert ran.result["sweep"]["request_rate"] == 0
    assert "no rate that was tried keeps e2el:0" in ran.err


# --- what is kept ------------------------------------------------------------------------------


@pytest.mark.heavy
def test_results_are_saved_as_vllm_saves_them(run: Any, endpoint: str, tmp_path: Path) -> None:
    saving = ("--num-prompts", "2", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json")
    result = run(endpoint, *saving).result
    assert json.loads((tmp_path / "r.json").read_text()) == result
    run(endpoint, *saving, "--append-result", "--save-detailed")
    first, second = map(json.loads, (tmp_path / "r.json").read_text().splitlines())
    assert set(second) - set(first) == DETAIL_KEYS
    assert all(len(second[key]) == 2 for key in DETAIL_KEYS)
    assert len(second["itls"][0]) == 3
    run(endpoint, "--num-prompts", "2", "--max-concurrency", "1", "--save-result", "--result-dir", str(tmp_path / "new"))
    (path,) = (tmp_path / "new").iterdir()
    assert path.name.startswith("zmqserve-infqps-concurrency1-m-")


# --- conversations, and errors -----------------------------------------------------------------


def conversation_file(folder: Path, *prompts: str) -> tuple[str, ...]:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps({"conversations": [{"value": text}, {"value": "a b c d e"}]}) for text in prompts))
    return ("--dataset-name", "sharegpt", "--dataset-path", str(path), "--num-prompts", str(len(prompts)))


def test_conversations_are_counted_by_the_model(run: Any, faulty: str, tmp_path: Path) -> None:
    result = run(faulty, *conversation_file(tmp_path, "one two three four five six", "one two three four")).result
    assert (result["completed"], result["total_input_tokens"], result["total_output_tokens"]) == (2, 10, 10)
    assert result["prompts"] == "text"
    assert result["lengths_counted"] is True


def test_errors_are_counted_by_type_and_do_not_end_the_run(run: Any, faulty: str, tmp_path: Path) -> None:
    ran = run(faulty, *conversation_file(tmp_path, "a b c !raise", "a b c d", "!raise b c d", "e f g h"), "--out", str(tmp_path))
    assert ran.code == 0
    assert (ran.result["completed"], ran.result["failed"]) == (2, 2)
    assert ran.result["errors_by_type"] == {"BackendError": 2}
    assert "Failed with BackendError:" in ran.out
    assert sum("!raise" in each["error"] for each in requests(tmp_path)) == 2


def test_nothing_answered_is_exit_code_1_and_a_sentence(run: Any, faulty: str, tmp_path: Path) -> None:
    ran = run(faulty, *conversation_file(tmp_path, "!raise b c d", "!raise f g h"))
    assert ran.code == 1
    assert "none of 2 requests was answered: BackendError x 2; the first: " in ran.err
    assert ran.result["completed"] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--model", "nope"), 1, "no model 'nope' is served; there is: m"),
        (("--ignore-eos",), 1, "ignore_eos is not supported"),
        (("--min-p", "7"), 1, "min_p must be a number from 0 to 1"),
        (("--max-concurrency", "0"), 2, "--max-concurrency must be 1 or more, got 0"),
        (("--request-rate", "0"), 2, "--request-rate must be above 0"),
        (("--sweep",), 2, "--sweep looks for the rate that keeps the goodput"),
        (("--goodput", "ttfx:1"), 2, "--goodput knows no 'ttfx'"),
        (("--goodput", "ttft"), 2, "--goodput takes NAME:VALUE"),
        (("--dataset-name", "sharegpt"), 2, "needs --dataset-path"),
        (("--percentile-metrics", "ttft,x"), 2, "--percentile-metrics knows no x"),
        (("--random-range-ratio", "2"), 2, "'2' is not from 0 to below 1"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(run: Any, faulty: str, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    ran = run(faulty, *arguments)
    assert (ran.code, ran.result) == (code, {})
    assert sentence in ran.err


class Deadly(Sample):
    """Ends the process that sends it."""

    def as_prompt(self, kind: Kind) -> Prompt:
        os._exit(3)


def test_a_client_process_that_dies_ends_the_run_with_an_error(endpoint: str) -> None:
    ask = Ask([endpoint], "m", "ids", {}, 10.0)
    samples = [Sample([1], 1, 1), Deadly([1], 1, 1)]
    work = serve_load.shares(ask, samples, [0.0, 0.0], processes=2, concurrency=None, warmup=samples[0], warmups=0)
    with pytest.raises(RuntimeError, match="a client process died"):
        serve_load.run(work, progress=False)


def test_shares_are_whole_and_even() -> None:
    ask = Ask(["tcp://127.0.0.1:1"], "m", "ids", {}, None)
    samples = [Sample([n], 1, 1) for n in range(11)]
    due_s = arrivals(11, 3.0, 1.0, 0)
    found = serve_load.shares(ask, samples, due_s, processes=3, concurrency=8, warmup=samples[0], warmups=4)
    assert sorted(
        (index, sample.prompt, due) for each in found for index, sample, due in zip(each.indices, each.samples, each.due_s, strict=True)
    ) == [(n, [n], due_s[n]) for n in range(11)]
    assert [each.concurrency for each in found] == [3, 3, 2]
    assert [each.warmups for each in found] == [2, 1, 1]
    assert len(serve_load.shares(ask, samples, due_s, processes=9, concurrency=2, warmup=samples[0], warmups=0)) == 2


def test_the_command_ends_with_one_line_of_json(endpoint: str) -> None:
    command = [sys.executable, "-m", "bench", "serve", "--controller", endpoint, "--num-prompts", "2", *SMALL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=6 * PATIENCE_S, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["benchmark"], result["completed"]) == ("serve", 2)
    assert not math.isinf(result["duration"])


def test_a_record_without_an_error_was_answered() -> None:
    assert Record(0, 1).keeps({})
    assert not Record(0, 1, error_type="WorkerLost").keeps({})


def test_a_controller_without_workers_has_no_model(run: Any) -> None:
    with ServedController() as controller:
        ran = run(controller.clients)
    assert ran.code == 1
    assert "no model is served" in ran.err
