"""The options of `bench serve`: those that `vllm bench serve` has, too, are named and meant as there."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .metrics import OBJECTIVES, TITLES
from .serve_samples import KINDS, RandomLengths, range_ratio

SAMPLING = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "frequency_penalty": float,
    "presence_penalty": float,
    "repetition_penalty": float,
}
DATASETS = ("random", "sharegpt")
LOW_ID, HIGH_ID = 1000, 32_000
"""Token ids that nearly every vocabulary has, and none of which is a special one."""

LEAST_TOLERANCE = 0.01


def add(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    network = parser.add_argument_group("the network")
    network.add_argument("--controller", action="append", metavar="ENDPOINT", help="its client side; may be repeated (default: as Client)")
    network.add_argument("--model", help="default: the first that is served")
    network.add_argument(
        "--ready-check-timeout-sec", type=int, default=0, metavar="S", help="what the model may take to be ready (default 0)"
    )
    network.add_argument("--timeout-s", type=float, default=600.0, metavar="S", help="deadline of each request (default 600)")

    load = parser.add_argument_group("the load")
    load.add_argument("--num-prompts", type=int, default=1000, metavar="N", help="requests to send (default 1000)")
    load.add_argument("--max-concurrency", type=int, metavar="N", help="closed loop: at most so many open at once (default: no bound)")
    load.add_argument("--request-rate", type=float, default=math.inf, metavar="R", help="open loop: requests/s (default inf: all at once)")
    load.add_argument("--burstiness", type=float, default=1.0, metavar="B", help="shape of the gaps: 1 Poisson, below 1 burstier, inf even")
    load.add_argument("--num-warmups", type=int, default=0, metavar="N", help="requests before the first one that counts (default 0)")
    load.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default 0)")
    load.add_argument("--client-processes", type=int, default=1, metavar="N", help="that share the requests (default 1)")
    load.add_argument("--disable-tqdm", action="store_true", help="show no progress")

    data = parser.add_argument_group("prompts")
    data.add_argument("--dataset-name", choices=DATASETS, default="random", help="default: random")
    data.add_argument("--dataset-path", type=Path, metavar="FILE", help="ShareGPT conversations: a JSON array, or JSON Lines")
    data.add_argument("--input-len", type=int, metavar="N", help="the same as --random-input-len")
    data.add_argument("--output-len", type=int, metavar="N", help="the same as --random-output-len and --sharegpt-output-len")
    data.add_argument("--random-input-len", type=int, default=1024, metavar="N", help="tokens (default 1024)")
    data.add_argument("--random-output-len", type=int, default=128, metavar="N", help="tokens (default 128)")
    ratio = 'lengths are even in mean x (1 - R) to mean x (1 + R); or {"input": R, "output": R} (default 0)'
    data.add_argument("--random-range-ratio", default="0.0", metavar="R", help=ratio)
    data.add_argument("--random-prefix-len", type=int, default=0, metavar="N", help="tokens that all prompts begin with (default 0)")
    ids = f"token ids to draw from, LOW to below HIGH (default {LOW_ID} {HIGH_ID})"
    data.add_argument("--random-ids", type=int, nargs=2, default=(LOW_ID, HIGH_ID), metavar=("LOW", "HIGH"), help=ids)
    data.add_argument("--sharegpt-output-len", type=int, metavar="N", help="tokens (default: those of the conversation's own answer)")
    data.add_argument("--disable-shuffle", action="store_true", help="take the conversations in the file's order")
    data.add_argument("--no-oversample", action="store_true", help="send fewer requests where the file has fewer conversations")
    data.add_argument(
        "--prompts", choices=("auto", *KINDS), default="auto", help="how they are sent (default: token ids where they are taken)"
    )

    sampling = parser.add_argument_group("sampling")
    for name, kind in SAMPLING.items():
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind)
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on past the model's end (always so for random prompts, where it can)"
    )

    metrics = parser.add_argument_group("metrics")
    slo = f"a request is good within these ms: NAME:MS of {', '.join(OBJECTIVES)}"
    metrics.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=slo)
    metrics.add_argument("--percentile-metrics", default="ttft,tpot,itl,e2el", metavar="NAMES", help=f"of {', '.join(TITLES)}")
    metrics.add_argument("--metric-percentiles", default="99", metavar="P", help="separated by commas (default 99)")

    sweep = parser.add_argument_group("sweep: the highest request rate that keeps the goodput, by bisection")
    sweep.add_argument("--sweep", action="store_true", help="find it; needs --goodput, and --request-rate is then the highest to try")
    sweep.add_argument("--sweep-goodput", type=float, default=0.99, metavar="S", help="share of requests that must be good (default 0.99)")
    sweep.add_argument("--sweep-tolerance", type=float, default=0.05, metavar="T", help="end when the rate is known so well (default 0.05)")
    sweep.add_argument("--sweep-seconds", type=float, default=20.0, metavar="S", help="of each trial; --num-prompts at least (default 20)")
    sweep.add_argument("--sweep-start", type=float, metavar="R", help="first rate (default: half of what --num-prompts at once reach)")

    results = parser.add_argument_group("results")
    results.add_argument("--label", help="what the result is called, in its file's name and in reports (default zmqserve)")
    results.add_argument("--metadata", nargs="*", default=[], metavar="KEY=VALUE", help="put into the result")
    results.add_argument("--save-result", action="store_true", help="write the result to a file")
    results.add_argument("--save-detailed", action="store_true", help="with what became of each request")
    results.add_argument("--append-result", action="store_true", help="write it to the end of the file")
    results.add_argument("--result-dir", type=Path, metavar="DIR", help="default: here")
    results.add_argument("--result-filename", metavar="NAME", help="default: of label, rate, concurrency, model and time")
    results.add_argument("--out", type=Path, metavar="DIR", help="keep everything there: detailed results, and one line per request")


@dataclass(frozen=True)
class Checked:
    """Options that had to be read: see `add`. `goodput`: ms by name."""

    lengths: RandomLengths
    ids: range
    goodput: dict[str, float]
    metrics: list[str]
    percentiles: list[float]
    metadata: dict[str, str]
    sampling: dict[str, Any]


def check(args: argparse.Namespace) -> Checked:
    """What the options say together. ValueError, which names the option, for what cannot be meant."""
    for name in ("num_prompts", "client_processes", "random_output_len", "output_len", "sharegpt_output_len", "max_concurrency"):
        _need(name, getattr(args, name), 1)
    for name in ("num_warmups", "seed", "random_prefix_len", "random_input_len", "input_len", "ready_check_timeout_sec"):
        _need(name, getattr(args, name), 0)
    for name in ("request_rate", "burstiness", "timeout_s", "sweep_tolerance", "sweep_seconds", "sweep_start"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    if args.sweep_tolerance < LEAST_TOLERANCE:
        raise ValueError(f"--sweep-tolerance must be {LEAST_TOLERANCE:g} or more: no trial tells closer rates apart")
    if not 0 < args.sweep_goodput <= 1:
        raise ValueError(f"--sweep-goodput must be above 0 and at most 1, got {args.sweep_goodput:g}")
    if args.sweep and not args.goodput:
        raise ValueError(
            "--sweep looks for the rate that keeps the goodput: say what that is with --goodput, like --goodput ttft:200 tpot:50"
        )
    if (args.dataset_name == "sharegpt") != (args.dataset_path is not None):
        raise ValueError("--dataset-name sharegpt needs --dataset-path, and random has none")
    low, high = args.random_ids
    if not 0 <= low < high:
        raise ValueError(f"--random-ids must be from 0 on and rise, got {low} {high}")
    try:
        ratios = range_ratio(args.random_range_ratio)
        percentiles = [float(each) for each in args.metric_percentiles.split(",")]
    except ValueError as error:
        raise ValueError(f"--random-range-ratio or --metric-percentiles: {error}") from None
    if not all(0 <= each <= 100 for each in percentiles):
        raise ValueError(f"--metric-percentiles must be from 0 to 100, got {args.metric_percentiles}")
    metrics = args.percentile_metrics.split(",")
    if unknown := [name for name in metrics if name not in TITLES]:
        raise ValueError(f"--percentile-metrics knows no {', '.join(unknown)}, only {', '.join(TITLES)}")
    input_len = args.random_input_len if args.input_len is None else args.input_len
    output_len = args.random_output_len if args.output_len is None else args.output_len
    lengths = RandomLengths(input_len, output_len, *ratios, args.random_prefix_len)
    if args.dataset_name == "random" and math.floor(input_len * (1 - ratios[0])) + args.random_prefix_len < 1:
        raise ValueError("--random-input-len is too small: a prompt could have no token")
    sampling = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    if args.ignore_eos or args.dataset_name == "random":
        sampling["ignore_eos"] = True
    goodput = {name: _bound(name, value) for name, value in _pairs("--goodput", args.goodput, ":")}
    return Checked(lengths, range(low, high), goodput, metrics, percentiles, dict(_pairs("--metadata", args.metadata, "=")), sampling)


def _need(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"--{name.replace('_', '-')} must be {least} or more, got {value}")


def _pairs(option: str, given: list[str], sign: str) -> list[tuple[str, str]]:
    pairs = []
    for each in given:
        name, found, value = each.partition(sign)
        if not found:
            raise ValueError(f"{option} takes NAME{sign}VALUE, got {each!r}")
        pairs.append((name.strip(), value.strip()))
    return pairs


def _bound(name: str, value: str) -> float:
    if name not in OBJECTIVES:
        raise ValueError(f"--goodput knows no {name!r}, only {', '.join(OBJECTIVES)}")
    try:
        bound_ms = float(value)
    except ValueError:
        bound_ms = -1.0
    if not bound_ms >= 0:
        raise ValueError(f"--goodput {name} must be a number of ms, got {value!r}")
    return bound_ms
