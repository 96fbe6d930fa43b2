"""The model itself, run by the tests: what a backend's log probabilities are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any


@cache
def _model(directory: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    torch.set_num_threads(1)
    return loader.from_pretrained(directory, dtype=torch.float32).eval()


def logprobs(directory: str, prompt: Sequence[int], ids: Sequence[int]) -> list[list[float]]:
    """For each of `ids`, generated after `prompt`: the log probability of every token at its place, by one forward in float32."""
    import torch

    with torch.inference_mode():
        logits = _model(directory)(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        rows: list[list[float]] = logits.float().log_softmax(dim=-1).tolist()
    return rows
