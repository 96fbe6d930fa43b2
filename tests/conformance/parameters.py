"""For each parameter of an answer a value that asks for something, and one that it must not have."""

from __future__ import annotations

from typing import Any

from zmqserve.params import Guided

ASKED: dict[str, Any] = {
    "max_tokens": 3,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
    "stop": ["never"],
    "stop_token_ids": [7],
    "seed": 1,
    "n": 2,
    "logprobs": 2,
    "echo": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "guided": Guided(choice=["a", "b"]),
}
"""Beyond the default."""

ASKED_OF_EMBEDDINGS: dict[str, Any] = {"dimensions": 8, "normalize": False, "truncate_tokens": 4}
"""The same, for EmbedParams."""

WRONG: dict[str, Any] = {
    "max_tokens": 0,
    "min_tokens": -1,
    "temperature": -0.5,
    "top_p": 1.5,
    "top_k": -2,
    "min_p": 2.0,
    "presence_penalty": 3.0,
    "frequency_penalty": -2.5,
    "repetition_penalty": 0.0,
    "stop": [""],
    "stop_token_ids": [-1],
    "seed": -1,
    "n": 0,
    "logprobs": 1000,
    "echo": "yes",
    "ignore_eos": 1,
    "skip_special_tokens": "no",
    "guided": {"choice": []},
}
"""A value that each parameter must not have."""
