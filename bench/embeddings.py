"""Texts a second through the network beside SentenceTransformer.encode, with the same model on the same CPU threads.

    python -m bench embeddings [--quick]

A controller and a worker are processes of their own; `encode` runs in this one. The arms take turns, so that the machine's noise
meets all alike. Each request has one text. `encode` gets the texts one by one, and all at once (it sorts them by length and makes
batches of 32). `ratios` in the last line are texts/s of the network over those of `encode`, higher is better: one request at a time
over texts one by one, many at a time over all at once. What comes back is compared: see `largest difference`.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from zmqserve import Client

from .model_network import model_network
from .result import Spread, add_out, print_last_line, progress, rounded, table

MODEL = "all-minilm-l6-v2"
CONCURRENCY = (1, 8, 64)
PATIENCE_S = 120.0
WORDS = ["the", "of", "a", "model", "river", "small", "answer", "quick", "brown", "fox", "network", "message", "token", "vector"]
KINDS = {"short": (3, 15), "long": (60, 180)}
"""Texts of so many words, drawn evenly between the two."""

Matrix = Any


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("embeddings", help="texts a second through the network beside SentenceTransformer.encode")
    parser.add_argument("--quick", action="store_true", help="about two minutes, with fewer texts and repetitions")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads of either model (default 1)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    counts, repeats = ({"short": 128, "long": 64}, 3) if args.quick else ({"short": 512, "long": 128}, 7)
    encode = _reference(args.threads)
    figures: dict[str, dict[str, list[float]]] = {}
    largest = 0.0
    least = 1.0
    options = ("--device", "cpu", "--threads", str(args.threads))
    with model_network(MODEL, *options) as endpoint, Client(endpoint) as client, ThreadPoolExecutor(max(CONCURRENCY)) as pool:
        for kind, count in counts.items():
            texts = _texts(kind, count)
            expected = encode(texts)
            arms = _arms(encode, client, pool)
            for arm in arms.values():
                arm(texts[:8])
            figures[kind] = {name: [] for name in arms}
            for _ in progress(repeats, f"{kind} texts"):
                for name, arm in arms.items():
                    began_s = time.perf_counter()
                    found = arm(texts)
                    figures[kind][name].append(count / (time.perf_counter() - began_s))
                    largest = max(largest, float(np.abs(found - expected).max()))
                    least = min(least, float((found * expected).sum(axis=1).min()))
    header = ["texts/s", *(cell for kind, (low, high) in KINDS.items() for cell in (f"{kind}, {low}-{high} words", "min..max"))]
    rows = [[name, *(cell for kind in KINDS for cell in Spread.of(figures[kind][name]).cells(1))] for name in figures["short"]]
    print(table(header, rows))
    ratios = {f"{kind}_{n}": _ratio(figures[kind], n) for kind in KINDS for n in CONCURRENCY}
    print(f"largest difference of a number of a vector {largest:.1e}, least cosine {least:.7f}")
    print_last_line(
        "embeddings",
        {"model": MODEL, "threads": args.threads, "texts": counts, "repeats": repeats},
        args.out,
        texts_per_s={kind: rounded({name: statistics.median(each) for name, each in figures[kind].items()}, 2) for kind in KINDS},
        largest_difference=largest,
        ratios=rounded(ratios),
    )
    return 0


def _ratio(figures: dict[str, list[float]], concurrency: int) -> float:
    direct = "encode, one by one" if concurrency == 1 else "encode, all at once"
    return statistics.median(figures[f"network, {concurrency} at a time"]) / statistics.median(figures[direct])


def _arms(
    encode: Callable[[Sequence[str]], Matrix], client: Client, pool: ThreadPoolExecutor
) -> dict[str, Callable[[Sequence[str]], Matrix]]:
    def through(concurrency: int) -> Callable[[Sequence[str]], Matrix]:
        def ask(shares: Sequence[str]) -> list[Matrix]:
            return [client.embed(MODEL, [text], timeout_s=PATIENCE_S)[0] for text in shares]

        def arm(texts: Sequence[str]) -> Matrix:
            # Each asker has every so-manieth text, and asks for the next when it has one.
            found = list(pool.map(ask, [texts[start::concurrency] for start in range(concurrency)]))
            return np.stack([found[i % concurrency][i // concurrency] for i in range(len(texts))])

        return arm

    return {
        "encode, one by one": lambda texts: np.stack([encode([text])[0] for text in texts]),
        "encode, all at once": encode,
        **{f"network, {n} at a time": through(n) for n in CONCURRENCY},
    }


def _texts(kind: str, count: int) -> list[str]:
    draw = random.Random(1)
    return [" ".join(draw.choices(WORDS, k=draw.randint(*KINDS[kind]))) for _ in range(count)]


def _reference(threads: int) -> Callable[[Sequence[str]], Matrix]:
    import torch
    from sentence_transformers import SentenceTransformer

    from zmqserve.backends import minilm

    torch.set_num_threads(threads)
    model: Any = SentenceTransformer(str(minilm.MODEL.fetch()), device="cpu")
    return lambda texts: model.encode(list(texts), show_progress_bar=False)
