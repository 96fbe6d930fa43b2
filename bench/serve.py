"""What a running network gives its users: throughput, and the latencies that they see.

    python -m bench serve --controller tcp://127.0.0.1:5570 --max-concurrency 32 --num-prompts 200
    python -m bench serve --request-rate 20 --goodput ttft:200 tpot:50
    python -m bench serve --sweep --goodput ttft:200 tpot:50 --num-prompts 100

Closed loop (--max-concurrency: who is answered asks again) or open loop (--request-rate: requests come when they come). Options,
definitions and JSON keys are those of `vllm bench serve`, so that what reads its results reads these. The clients are processes of
their own; how late they were themselves stands beside the results. docs/benchmarks.md explains how to read them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from zmqserve.errors import ZmqserveError
from zmqserve.messages import ModelCard

from . import metrics, serve_lag, serve_load, serve_options, serve_output
from .metrics import Record
from .result import machine
from .serve_arrivals import arrivals
from .serve_client import Ask
from .serve_network import Network, NetworkFacts, first_kind
from .serve_options import Checked
from .serve_samples import MIN_TOKENS, Sample, conversations, random_samples, sharegpt_samples
from .serve_sweep import Sweep, Trial, sweep

BACKEND = "zmqserve"
OPTIONAL = frozenset({"ignore_eos", "token_ids"})


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("serve", help="throughput and latencies of any running network, as `vllm bench serve` measures them")
    serve_options.add(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark. Exit code 1 where nothing was answered, and where no rate keeps the goodput; 2 for wrong options."""
    try:
        checked = serve_options.check(args)
        found = conversations(args.dataset_path, args.seed, shuffle=not args.disable_shuffle) if args.dataset_path else []
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        network = Network(args.controller)
    except ZmqserveError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        target = Target.of(network, args, checked, found)
        return _swept(target) if args.sweep else _measured(target)
    except (ZmqserveError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: there is no result", file=sys.stderr)
        return 130
    finally:
        network.close()


@dataclass(frozen=True)
class Target:
    """What is measured, and how. `left_out`: what the model's backend does not take and the benchmark does without."""

    network: Network
    args: argparse.Namespace
    checked: Checked
    card: ModelCard
    ask: Ask
    left_out: list[str]
    conversations: Sequence[tuple[str, str]]

    @classmethod
    def of(cls, network: Network, args: argparse.Namespace, checked: Checked, found: Sequence[tuple[str, str]]) -> Target:
        """Find the model, and learn how it can be asked. Raises what keeps all requests from being answered."""
        card = network.model(args.model, args.ready_check_timeout_sec)
        kind = args.prompts
        if kind == "auto":
            kind = first_kind(card)
            kind = "text" if kind == "ids" and found else kind
        ask = Ask(network.endpoints, args.model or card.name, kind, checked.sampling, args.timeout_s)
        optional = OPTIONAL - ({"token_ids"} if args.prompts == "ids" else set()) - ({"ignore_eos"} if args.ignore_eos else set())
        probe = Sample("", MIN_TOKENS, 1) if found else random_samples(1, checked.lengths, checked.ids, kind, args.seed + 1)[0]
        ask, left_out = network.settled(ask, probe, optional)
        target = cls(network, args, checked, card, ask, left_out, found)
        print(f"model {ask.model} at {', '.join(ask.endpoints)}; prompts as {ask.kind}; left out: {', '.join(left_out) or 'nothing'}")
        return target

    def samples(self, count: int, seed: int) -> list[Sample]:
        """So many requests."""
        if not self.conversations:
            return random_samples(count, self.checked.lengths, self.checked.ids, self.ask.kind, seed)
        args = self.args
        length = args.output_len if args.sharegpt_output_len is None else args.sharegpt_output_len

        def count_tokens(texts: Sequence[str]) -> list[int]:
            return self.network.count_tokens(self.card, texts)

        return sharegpt_samples(self.conversations, count, length, count_tokens, seed, oversample=not args.no_oversample)

    def measure(self, request_rate: float, count: int, seed: int) -> tuple[dict[str, Any], list[Record]]:
        """Send so many requests at this rate; the result, without details, and what became of each request."""
        args = self.args
        samples = self.samples(count, seed)
        # Not one of those that are measured: its beginning would be in the model's cache.
        warmup = samples[0] if self.conversations else random_samples(1, self.checked.lengths, self.checked.ids, self.ask.kind, seed + 1)[0]
        shares = serve_load.shares(
            self.ask,
            samples,
            arrivals(len(samples), request_rate, args.burstiness, seed),
            processes=args.client_processes,
            concurrency=args.max_concurrency,
            warmup=warmup,
            warmups=args.num_warmups,
        )
        before = self.network.status()
        load = serve_load.run(shares, progress=not args.disable_tqdm)
        facts = NetworkFacts(before, self.network.status(), self.card)
        planned = not math.isinf(request_rate)
        times = metrics.latencies(load.records, queued=args.max_concurrency is not None, planned=planned)
        result = self._head(request_rate, len(samples)) | metrics.summary(load.records, load.duration_s, self.checked.goodput)
        for name in self.checked.metrics:
            if name in times:
                result |= metrics.statistics_of(name, times[name], self.checked.percentiles)
        median_ttft_ms = statistics.median(times["ttft"]) if times["ttft"] else None
        result |= {
            "client_lag": serve_lag.summary(load.lags, planned=planned, median_ttft_ms=median_ttft_ms),
            "client_processes": len(load.lags),
            "prompts": self.ask.kind,
            "left_out": self.left_out,
            "lengths_counted": "count_tokens" in self.card.verbs if self.conversations else None,
            "goodput": self.checked.goodput or None,
            "benchmark": "serve",
            "settings": {name: value for name, value in vars(args).items() if name != "run"},
            "machine": machine(),
            "network": facts.plain(),
        }
        return result, list(load.records)

    def _head(self, request_rate: float, count: int) -> dict[str, Any]:
        args = self.args
        return {
            "date": datetime.now().astimezone().strftime("%Y%m%d-%H%M%S"),
            "endpoint_type": BACKEND,
            "backend": BACKEND,
            "label": args.label,
            "model_id": self.ask.model,
            "tokenizer_id": None,
            "num_prompts": count,
            **self.checked.metadata,
            "request_rate": request_rate,
            "burstiness": args.burstiness,
            "max_concurrency": args.max_concurrency,
        }


def _measured(target: Target) -> int:
    args = target.args
    result, records = target.measure(args.request_rate, args.num_prompts, args.seed)
    serve_output.print_result(result, target.checked.metrics)
    serve_output.save(result, records, args)
    serve_output.print_line(result)
    if not result["completed"]:
        print(f"error: none of {len(records)} requests was answered: {serve_output.what_failed(result, records)}", file=sys.stderr)
        return 1
    return 0


def _swept(target: Target) -> int:
    args, wanted = target.args, target.args.sweep_goodput
    runs: dict[float, tuple[dict[str, Any], list[Record]]] = {}

    def measure(request_rate: float) -> Trial:
        count = max(args.num_prompts, math.ceil(request_rate * args.sweep_seconds))
        runs[request_rate] = result, records = target.measure(request_rate, count, args.seed + len(runs))
        serve_output.save(result, records, args)
        open_ = sum(record.latency_s for record in records) / result["duration"]
        trial = Trial(request_rate, result["good_requests"] / len(records), open_, result)
        print(serve_output.trial_line(trial, wanted), flush=True)
        return trial

    start = args.sweep_start
    if start is None:
        at_once, _ = target.measure(math.inf, args.num_prompts, args.seed)
        start = at_once["request_throughput"] / 2
        print(f"{args.num_prompts} requests at once: {at_once['request_throughput']:.2f} requests/s, so the first rate is {start:.2f}")
        if not start:
            print(f"error: none of {args.num_prompts} requests was answered: {at_once['errors_by_type']}", file=sys.stderr)
            return 1
    found = sweep(measure, start, wanted, args.sweep_tolerance, args.request_rate)
    result, records = runs[found.request_rate] if found.request_rate else runs[found.trials[-1].request_rate]
    result = result | {"sweep": _facts(found, args)}
    serve_output.print_result(result, target.checked.metrics)
    serve_output.print_sweep(found, wanted, args.sweep_tolerance)
    serve_output.save(result, records, args, name="sweep")
    serve_output.print_line(result)
    if not found.request_rate:
        print(f"error: no rate that was tried keeps {' '.join(args.goodput)} for {wanted:.1%} of the requests", file=sys.stderr)
        return 1
    return 0


def _facts(found: Sweep, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "request_rate": found.request_rate,
        "above": found.above,
        "goodput_share": args.sweep_goodput,
        "tolerance": args.sweep_tolerance,
        "method": "bisection of the geometric mean, after doubling or halving from the first rate; one trial a rate",
        "trials": [
            {
                "request_rate": trial.request_rate,
                "share": trial.share,
                "num_prompts": trial.result["num_prompts"],
                "request_throughput": trial.result["request_throughput"],
                "client_limits": trial.result["client_lag"]["limits"],
            }
            for trial in found.trials
        ],
    }
