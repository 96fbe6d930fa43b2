"""What is asked: prompts with the lengths of their inputs and outputs, drawn at random or from a file of conversations."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from zmqserve.requests import Prompt

Kind = Literal["ids", "text", "chat"]
"""How a prompt is sent: as token ids, as a text, as a conversation of one turn."""
KINDS: tuple[Kind, ...] = ("ids", "text", "chat")

WORDS = (
    "the",
    "of",
    "and",
    "river",
    "small",
    "answer",
    "quick",
    "brown",
    "stone",
    "network",
    "message",
    "winter",
    "music",
    "garden",
    "road",
)
"""Of random texts: each is one token of most vocabularies."""
MIN_TOKENS, MAX_INPUT_TOKENS, MAX_TOKENS = 4, 1024, 2048
"""Conversations with a side that is shorter, a longer input, or more tokens in both are left out, as in `vllm bench serve`."""


@dataclass(frozen=True)
class Sample:
    """One request: its prompt as ids or text, the tokens that this should be, and how many are asked for."""

    prompt: Sequence[int] | str
    input_tokens: int
    output_tokens: int

    def as_prompt(self, kind: Kind) -> Prompt:
        """What the client is given."""
        if kind != "chat":
            return self.prompt if isinstance(self.prompt, str) else list(self.prompt)
        return [{"role": "user", "content": str(self.prompt)}]


@dataclass(frozen=True)
class RandomLengths:
    """Lengths in tokens: even between mean x (1 - ratio) and mean x (1 + ratio), after `prefix` tokens that all prompts share."""

    input_len: int
    output_len: int
    input_ratio: float
    output_ratio: float
    prefix: int

    def draw(self, count: int, rng: np.random.Generator) -> list[tuple[int, int]]:
        """(input without the prefix, output) of each request: what `vllm bench serve` draws from the same seed."""
        least, most = (math.floor(self.input_len * (1 - self.input_ratio)), math.ceil(self.input_len * (1 + self.input_ratio)))
        inputs = rng.integers(least, most + 1, size=count)
        least, most = (math.floor(self.output_len * (1 - self.output_ratio)), math.ceil(self.output_len * (1 + self.output_ratio)))
        outputs = rng.integers(max(1, least), max(1, most) + 1, size=count)
        return [(int(taken), int(given)) for taken, given in zip(inputs, outputs, strict=True)]


def range_ratio(value: str) -> tuple[float, float]:
    """Of ``--random-range-ratio``, for input and output: one number, or JSON like {"input": 0.3, "output": 0.5}. ValueError otherwise."""
    try:
        said = json.loads(value)
        ratios = (float(said["input"]), float(said["output"])) if isinstance(said, Mapping) else (float(said), float(said))
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{value!r} is neither a number nor JSON with input and output") from None
    if not all(0 <= ratio < 1 for ratio in ratios):
        raise ValueError(f"{value!r} is not from 0 to below 1")
    return ratios


def random_samples(count: int, lengths: RandomLengths, ids: range, kind: Kind, seed: int) -> list[Sample]:
    """Prompts that have nothing in common but the prefix: token ids out of `ids`, or where these are not taken as many words."""
    rng = np.random.default_rng(seed)
    drawn = lengths.draw(count, rng)
    if kind == "ids":
        prefix = rng.integers(ids.start, ids.stop, lengths.prefix).tolist()
        return [Sample([*prefix, *rng.integers(ids.start, ids.stop, n).tolist()], lengths.prefix + n, out) for n, out in drawn]
    words = rng.choice(WORDS, lengths.prefix).tolist()
    return [Sample(" ".join([*words, *rng.choice(WORDS, n).tolist()]), lengths.prefix + n, out) for n, out in drawn]


def conversations(path: Path, seed: int, *, shuffle: bool = True) -> list[tuple[str, str]]:
    """The first two turns of each conversation of a ShareGPT file, shuffled: a JSON array, or JSON Lines with one conversation each.

    Each is an object with ``conversations``, a list of objects with ``value``; those of fewer than two turns are left out. ValueError,
    which names the line, for a file that is something else.
    """
    found = []
    for where, entry in _entries(path):
        try:
            turns = [str(turn["value"]) for turn in entry.get("conversations", [])]
        except (AttributeError, TypeError, KeyError):
            raise ValueError(f"{path}, {where}: not a conversation of ShareGPT: {str(entry)[:80]}") from None
        if len(turns) >= 2:
            found.append((turns[0], turns[1]))
    if not found:
        raise ValueError(f"{path} has no conversation of two turns")
    if shuffle:
        random.Random(seed).shuffle(found)
    return found


def sharegpt_samples(
    found: Sequence[tuple[str, str]],
    count: int,
    output_len: int | None,
    count_tokens: Callable[[Sequence[str]], list[int]],
    seed: int,
    *,
    oversample: bool = True,
) -> list[Sample]:
    """Requests of the first conversations that are of a fit length; some come twice where there are fewer than `count`.

    output_len: tokens that each asks for; None: as many as its second turn has. ValueError where no conversation fits.
    """
    samples: list[Sample] = []
    for start in range(0, len(found), count):
        batch = found[start : start + count]
        inputs = count_tokens([asked for asked, _ in batch])
        outputs = [output_len] * len(batch) if output_len is not None else count_tokens([said for _, said in batch])
        for (asked, _), taken, given in zip(batch, inputs, outputs, strict=True):
            fits = MIN_TOKENS <= taken <= MAX_INPUT_TOKENS and taken + given <= MAX_TOKENS
            if fits and (output_len is not None or given >= MIN_TOKENS) and len(samples) < count:
                samples.append(Sample(asked, taken, given))
        if len(samples) == count:
            break
    if not samples:
        raise ValueError(f"no conversation fits: inputs of {MIN_TOKENS} to {MAX_INPUT_TOKENS} tokens, at most {MAX_TOKENS} with the output")
    if oversample:
        draw = random.Random(seed)
        samples += [draw.choice(samples) for _ in range(count - len(samples))]
    return samples


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            yield from ((f"entry {number}", entry) for number, entry in enumerate(json.loads(text)))
            return
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
