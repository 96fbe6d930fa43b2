"""What `bench serve` computes and draws, beside `vllm bench serve` itself: the same numbers. For `make test-vllm`."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import metrics
from bench.serve_arrivals import arrivals
from bench.serve_samples import RandomLengths, conversations, sharegpt_samples

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.filterwarnings("default")]

PERCENTILES = [25.0, 50.0, 99.0, 99.9]
GOODPUT = {"ttft": 300.0, "tpot": 26.0, "e2el": 1200.0}


def test_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    draw = random.Random(3)
    theirs, ours = [], []
    for index in range(200):
        start_s, ttft_s = 1000 + draw.random() * 7, draw.random() * 0.4
        itls_s = [draw.random() * 0.05 for _ in range(draw.choice([0, 0, 4, 29, 59]))]
        error = "" if draw.random() > 0.1 else "Boom"
        latency_s, tokens = ttft_s + sum(itls_s), 1 + len(itls_s)
        theirs.append(
            RequestFuncOutput(
                success=not error, latency=latency_s, output_tokens=tokens, ttft=ttft_s, itl=itls_s, prompt_len=index, start_time=start_s
            )
        )
        ours.append(metrics.Record(index, index, start_s, start_s, start_s, ttft_s, itls_s, latency_s, tokens, error_type=error))
    expected, lengths = calculate_metrics([], theirs, 12.5, None, PERCENTILES, GOODPUT)
    found = metrics.summary(ours, 12.5, GOODPUT)
    names = {"total_input_tokens": "total_input", "total_output_tokens": "total_output", "duration": ""}
    checked = [name for name in found if names.get(name, name) and hasattr(expected, names.get(name, name))]
    assert len(checked) == 10
    for name in checked:
        assert found[name] == pytest.approx(getattr(expected, names.get(name, name))), name
    assert metrics.details(ours)["output_lens"] == lengths
    for name, values_ms in metrics.latencies(ours, queued=False, planned=False).items():
        statistics = metrics.statistics_of(name, values_ms, PERCENTILES)
        assert statistics.pop(f"p99.9_{name}_ms") == pytest.approx(dict(getattr(expected, f"percentiles_{name}_ms"))[99.9])
        for kind in ("mean", "median", "std"):
            assert statistics.pop(f"{kind}_{name}_ms") == pytest.approx(getattr(expected, f"{kind}_{name}_ms"))
        assert list(statistics) == [f"p{percentile}_{name}_ms" for percentile in (25, 50, 99)]
    capsys.readouterr()


@pytest.mark.parametrize(("request_rate", "burstiness"), [(7.0, 1.0), (50.0, 0.3), (3.0, math.inf), (math.inf, 1.0)])
def test_arrivals(request_rate: float, burstiness: float, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from vllm.benchmarks import serve as theirs

    now = [0.0]

    async def sleep(delay_s: float) -> None:
        now[0] += delay_s

    async def due() -> list[float]:
        asked: list[Any] = [SimpleNamespace(timestamp=None)] * 300
        return [now[0] async for _ in theirs.get_request(asked, request_rate, burstiness)]

    monkeypatch.setattr(theirs, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(theirs, "asyncio", SimpleNamespace(sleep=sleep))
    np.random.seed(11)
    assert asyncio.run(due()) == pytest.approx(arrivals(300, request_rate, burstiness, 11))


def test_random_lengths() -> None:
    import numpy as np
    from vllm.benchmarks.datasets.utils import get_sampling_params

    tokenizer: Any = SimpleNamespace(vocab_size=1000, num_special_tokens_to_add=lambda: 0)
    inputs, outputs, _ = get_sampling_params(np.random.default_rng(5), 50, {"input": 0.3, "output": 0.6}, 100, 40, tokenizer)
    found = RandomLengths(100, 40, 0.3, 0.6, 0).draw(50, np.random.default_rng(5))
    assert found == list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def test_conversations(tmp_path: Path) -> None:
    from vllm.benchmarks.datasets import ShareGPTDataset

    draw = random.Random(1)
    talks = []
    for _ in range(120):
        turns = [{"value": "w " * draw.choice([2, 5, 30, 1100])}, {"value": "v " * draw.choice([1, 6, 40, 900])}]
        talks.append({"conversations": turns[: draw.choice([1, 2, 2, 2])]})
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    tokenizer: Any = lambda text: SimpleNamespace(input_ids=text.split())  # noqa: E731 - a tokenizer is called
    theirs = ShareGPTDataset(random_seed=4, dataset_path=str(path)).sample(tokenizer, 90)
    ours = sharegpt_samples(conversations(path, 4), 90, None, lambda texts: [len(text.split()) for text in texts], 4)
    assert [(each.prompt, each.prompt_len, each.expected_output_len) for each in theirs] == [
        (each.prompt, each.input_tokens, each.output_tokens) for each in ours
    ]


def test_admission(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "admission", "--requests", "6", "--input-len", "8", "--runs", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["benchmark"], result["settings"]["requests"]) == ("admission", 6)
    assert [json.loads(path.read_text()) for path in tmp_path.iterdir()] == [result]
    for figures in result["figures"].values():
        first, last, cpu, passes, begun = (each["median"] for each in figures.values())
        assert 0 < first <= last < begun
        assert cpu > 0
        assert 1 <= passes <= 6
    assert set(result["figures"]) == {"generate", "worker"}
    assert set(result["ratios"]) == set(result["figures"]["worker"])
