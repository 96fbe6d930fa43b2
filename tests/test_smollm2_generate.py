"""ModelWorker beside transformers' own generate, with a real model: the same greedy answers, token for token, alone and in a batch."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

import pytest

from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.messages import Generate
from zmqserve.params import SamplingParams
from zmqserve.worker import WorkerConfig

from .fakes.asked import AskedJob, answer_of

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]

MODEL = "smollm2-135m"
TOKENS = 16
TOKENS_ALONE = 8
"""Of an answer that has the engine to itself: the way there is the same for each token, and each takes a whole step."""
AT_ONCE = 16
TIE = 1e-3
"""Two logits that are nearer than this are in an order that rounding decides; the model's are tens apart."""
PROMPTS = [
    "The capital of France is",
    "Some facts about the sea:",
    "Once upon a time there was a small fox who",
    "def fibonacci(n):\n",
    "The three primary colours are",
    "Water boils at",
    "Dear Sir or Madam,\n",
    "1, 2, 3, 4,",
    "The opposite of hot is",
    "To bake bread, first",
    "Albert Einstein was born in",
    "In the beginning",
    "Q: What is the largest planet?\nA:",
    "Le chat est",
    "import numpy as np\n",
    "The moon goes around",
    "A list of fruits: apple,",
    "Yesterday it rained, so",
    "Photosynthesis is the process by which",
    "She opened the door and",
]


@pytest.fixture(scope="module")
def worker() -> Iterator[ModelWorker]:
    made = ModelWorker(WorkerConfig(model=MODEL), device="cpu", threads=1)
    made.cards = made.load()
    asyncio.run(ids_of(made, "warm up", 1))
    yield made
    made.close()


async def ids_of(worker: ModelWorker, prompt: str, tokens: int = TOKENS) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    job = AskedJob(Generate(1, MODEL, prompt=prompt, params=params))
    return [token_id async for delta in answer_of(worker, job) for token_id in delta.token_ids]


def generated(worker: ModelWorker, prompts: list[str]) -> list[list[int]]:
    """transformers' own answers, made in one batch that is padded on the left."""
    checkpoint = worker._models[MODEL].checkpoint
    rows = [checkpoint.encode(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    out = checkpoint.model.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    answers: list[list[int]] = out[:, longest:].tolist()
    return answers


def gap(worker: ModelWorker, prompt: str, one: list[int], other: list[int]) -> float:
    """Between the logits of the first tokens in which two answers differ."""
    checkpoint = worker._models[MODEL].checkpoint
    same = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=True))]
    with torch.inference_mode():
        logits, _ = checkpoint.forward(torch.tensor([checkpoint.encode(prompt) + same]), None)
    return abs(float(logits[0, one[len(same)]] - logits[0, other[len(same)]]))


def test_greedy_answers_are_those_of_generate(worker: ModelWorker) -> None:
    assert len(PROMPTS) == 20

    async def together(prompts: list[str]) -> list[list[int]]:
        return list(await asyncio.gather(*(ids_of(worker, prompt) for prompt in prompts)))

    answers: dict[str, list[list[int]]] = {
        "generate": generated(worker, PROMPTS),
        "alone": [asyncio.run(ids_of(worker, prompt, TOKENS_ALONE)) for prompt in PROMPTS],
        f"{AT_ONCE} at once": asyncio.run(together(PROMPTS[:AT_ONCE])) + asyncio.run(together(PROMPTS[AT_ONCE:])),
    }
    ties: dict[tuple[str, str], float] = {}
    for arm in list(answers)[1:]:
        for prompt, expected, got in zip(PROMPTS, answers["generate"], answers[arm], strict=True):
            assert len(got) == (TOKENS_ALONE if arm == "alone" else TOKENS)
            if got != expected[: len(got)]:
                ties[arm, prompt] = gap(worker, prompt, expected[: len(got)], got)
    sys.stdout.write(f"\n{2 * len(PROMPTS) - len(ties)} of {2 * len(PROMPTS)} answers are equal; ties: {ties}\n")
    assert all(between < TIE for between in ties.values())
    assert len(ties) < 4


def test_seeded_answers_are_the_same_alone_and_in_a_batch(worker: ModelWorker) -> None:
    def job(seed: int) -> Any:
        params = SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=12, ignore_eos=True)
        return AskedJob(Generate(1, MODEL, prompt=PROMPTS[seed], params=params))

    async def ids(seed: int) -> list[int]:
        return [token_id async for delta in answer_of(worker, job(seed)) for token_id in delta.token_ids]

    async def together() -> list[list[int]]:
        return list(await asyncio.gather(*(ids(seed) for seed in range(8))))

    assert asyncio.run(together()) == [asyncio.run(ids(seed)) for seed in range(8)]
