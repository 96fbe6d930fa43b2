"""Tokens a second of ModelWorker's batch, beside transformers' generate and beside its batching called directly.

    python -m bench batching [--quick]

SmolLM2-135M in float32 on a CPU, greedy. Three arms take turns, so that the machine's noise meets all alike: `generate` answers one
prompt after another in this process; the library's continuous batching manager gets 1, 4 or 16 at once in this process, without
text; a controller and a ModelWorker, processes of their own, stream the same to a client here. `ratios` in the last line, higher is
better: `gain_N` is N streams through the network over `generate`, `share_N` is N streams through the network over the manager (1: the
worker costs nothing).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from zmqserve import Client

from .model_network import PATIENCE_S, model_network
from .result import Spread, add_out, print_last_line, progress, rounded, table

MODEL = "smollm2-135m"
CONCURRENCY = (1, 4, 16)
GENERATE = "generate, one at a time"
ONE_AT_A_TIME = 2
"""Prompts that `generate` answers in one go: its rate does not depend on their number."""

Arm = Callable[[], int]


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("batching", help="tokens a second of a model's batch beside generate and the library's own manager")
    parser.add_argument("--quick", action="store_true", help="about two minutes, with shorter answers and fewer repetitions")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of either model (default 1)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    tokens, repeats = (24, 3) if args.quick else (64, 7)
    prompts = [f"Some facts about the number {n}:" for n in range(max(CONCURRENCY))]
    import torch

    from zmqserve.backends import checkpoint, smollm2
    from zmqserve.backends.load_options import LoadOptions

    torch.set_num_threads(args.threads)
    loaded = checkpoint.load(str(smollm2.MODEL.fetch(say=print)), LoadOptions(device="cpu", dtype="float32"))
    manager = _manager(loaded)
    options = ("--device", "cpu", "--dtype", "float32", "--threads", str(args.threads), "--slots", str(max(CONCURRENCY)))
    rates: dict[str, list[float]] = {}
    try:
        with model_network(MODEL, *options) as endpoint, Client(endpoint) as client, ThreadPoolExecutor(max(CONCURRENCY)) as pool:
            arms: dict[str, Arm] = {GENERATE: lambda: _generate(loaded, prompts[:ONE_AT_A_TIME], tokens)}
            for n in CONCURRENCY:
                arms[f"manager, {n} at once"] = lambda n=n: _manage(manager, loaded, prompts[:n], tokens)  # type: ignore[misc]
                arms[f"network, {n} at once"] = lambda n=n: _stream(client, pool, prompts[:n], tokens)  # type: ignore[misc]
            for arm in arms.values():
                arm()
            rates = {name: [] for name in arms}
            for _ in progress(repeats, "batching"):
                for name, arm in arms.items():
                    began_s = time.perf_counter()
                    made = arm()
                    rates[name].append(made / (time.perf_counter() - began_s))
    finally:
        manager.stop(hard_stop=True)
    spreads = {name: Spread.of(each) for name, each in rates.items()}
    print(table(("tokens/s", "median", "min..max"), [(name, *spread.cells(1)) for name, spread in spreads.items()]))
    medians = {name: spread.median for name, spread in spreads.items()}
    ratios = {f"gain_{n}": medians[f"network, {n} at once"] / medians[GENERATE] for n in CONCURRENCY}
    ratios |= {f"share_{n}": medians[f"network, {n} at once"] / medians[f"manager, {n} at once"] for n in CONCURRENCY}
    print(table(("ratio", ""), [(name, f"{ratio:.2f}") for name, ratio in ratios.items()]))
    settings = {"model": MODEL, "threads": args.threads, "tokens": tokens, "repeats": repeats}
    print_last_line("batching", settings, args.out, tokens_per_s=rounded(medians, 2), ratios=rounded(ratios))
    return 0


def _manager(loaded: Any) -> Any:
    """The library's, with the sizes that ModelWorker chooses."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from zmqserve.backends.batch_cache import cache_size

    slots = max(CONCURRENCY)
    size = cache_size(loaded, slots, slots, None, 1)
    settings: Any = GenerationConfig
    config = ContinuousBatchingConfig(
        page_size=size.page_tokens,
        num_blocks=size.pages,
        max_batch_tokens=size.step_tokens,
        max_requests_per_batch=slots,
        auto_switch_to_flash=False,
    )
    manager = loaded.model.init_continuous_batching(settings(do_sample=False, eos_token_id=-1, pad_token_id=0), config)
    manager.start()
    return manager


def _generate(loaded: Any, prompts: list[str], tokens: int) -> int:
    import torch

    for prompt in prompts:
        ids = torch.tensor([loaded.encode(prompt)])
        out = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert out.shape[1] == ids.shape[1] + tokens
    return tokens * len(prompts)


def _manage(manager: Any, loaded: Any, prompts: list[str], tokens: int) -> int:
    for prompt in prompts:
        manager.add_request(loaded.encode(prompt), max_new_tokens=tokens)
    results = [manager.get_result(timeout=PATIENCE_S) for _ in prompts]
    return sum(len(result.generated_tokens) for result in results)


def _stream(client: Client, pool: ThreadPoolExecutor, prompts: list[str], tokens: int) -> int:
    def ask(prompt: str) -> int:
        with client.generate(MODEL, prompt, max_tokens=tokens, temperature=0, ignore_eos=True) as stream:
            return sum(len(chunk.token_ids) for chunk in stream)

    return sum(pool.map(ask, prompts))
