"""A causal language model and its tokenizer, loaded with transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from zmqserve.errors import InvalidParameter

from .guided import Grammars
from .load_options import LoadOptions
from .model_errors import ModelUnavailable, unavailable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model ready to run, in inference mode. `context_length` is in tokens, 0 if the model names no bound; `eos` ends an answer.

    `grammars`: what answers can be held to; for one thread, which is not the tokenizer's: to compile takes long. `adapter`: settings of
    the LoRA adapter in it, "" without one.
    """

    model: Any
    tokenizer: Any
    device: torch.device
    context_length: int
    eos: frozenset[int]
    grammars: Grammars
    adapter: str = ""

    def forward(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Run `ids` (1, n) after what is in `cache` (None: nothing yet).

        Gives the logits of the last position, (1, vocabulary) in float32, and the new cache.
        """
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **self._only_last)
        return out.logits[:, -1, :].float(), getattr(out, "past_key_values", None)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Make the first request as quick as the next. ModelUnavailable if the model cannot go on from what it has read."""
        token = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        _, cache = self.forward(token, None)
        if cache is None:
            raise unavailable(type(self.model).__name__, "keeps no key-value cache: this backend cannot generate with it token by token")
        self.forward(token, cache)

    def encode(self, text: str) -> list[int]:
        """Ids of a plain prompt, with the special tokens that the tokenizer adds to one."""
        return list(self.tokenizer.encode(text, verbose=False))

    def decode(self, ids: list[int]) -> str:
        """Their text, special tokens included."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def text_of(self, token_id: int) -> str:
        """The text of one token by itself, decoded once: with log probabilities many are told of at each token."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id])
        return text

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that a reader does not want to see."""
        return frozenset(self.tokenizer.all_special_ids)

    @cached_property
    def embeddings(self) -> int:
        """How many token ids the model knows."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @cached_property
    def _only_last(self) -> dict[str, int]:
        # Logits of a whole prompt would be a large matrix, and only its last row is of use.
        return {"logits_to_keep": 1} if "logits_to_keep" in signature(self.model.forward).parameters else {}

    def fingerprint(self) -> str:
        """Equal for equal tokenizer, chat template, weights, dtype and end tokens, wherever they were loaded from.

        Weights count by the sum of each row's bit patterns: exact, the same on any device, and as quick as reading them once.
        """
        facts = [str(self.tokenizer.chat_template), sorted(self.eos), *([self.adapter] if self.adapter else [])]
        return fingerprint_of(self.model, self.tokenizer, facts)


def fingerprint_of(model: Any, tokenizer: Any, facts: list[Any]) -> str:
    """Equal for equal weights, tokenizer and `facts`, which can be written as JSON; see Checkpoint.fingerprint."""
    digest = hashlib.sha256()
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    digest.update(json.dumps([words, *facts]).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        bits = weight.contiguous().view(_BITS[weight.element_size()]) if weight.dim() else weight.reshape(1)
        digest.update(bits.sum(dim=-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def load(source: str, options: LoadOptions) -> Checkpoint:
    """Load from a local directory or the Hugging Face Hub. dtype ``auto``: float32 on a CPU, else bfloat16.

    Raises ModelUnavailable, which says what is wrong with `source`, and InvalidParameter for a device or dtype that is none.
    """
    where = device_of(options.device)
    kind = dtype_of(options.dtype, where)
    local = is_local(source)
    source = os.path.expanduser(source) if local else source
    files = options.of_files
    loader: Any = AutoModelForCausalLM
    with explained(source, local=local), quiet(local=local):
        config = AutoConfig.from_pretrained(source, **files)
        _check_kind(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **files)
        model, report = loader.from_pretrained(source, config=config, dtype=kind, output_loading_info=True, **options.of_weights, **files)
        model = model.to(where).eval().requires_grad_(False)
    missing = sorted(report["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise unavailable(source, f"is incomplete: it lacks the weights {named} ({len(missing)} in all)")
    context_length = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    eos = _eos(model, tokenizer)
    grammars = Grammars(tokenizer, model.get_input_embeddings().weight.shape[0], eos)
    return Checkpoint(model, tokenizer, where, int(context_length), eos, grammars)


def device_of(name: str) -> torch.device:
    """The device; ``auto``: CUDA if there is any. InvalidParameter for one that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise InvalidParameter(f"device {name!r} cannot be used: {why}", data={"parameter": "device", "value": name}) from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """The dtype; ``auto``: float32 on a CPU, else bfloat16. InvalidParameter for one that is not in DTYPES."""
    if name == "auto":
        # A CPU without bfloat16 instructions is slower with it, above all on prompts; and float32 keeps greedy answers repeatable.
        name = "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        known = ", ".join(["auto", *DTYPES])
        raise InvalidParameter(f"dtype must be one of {known}, got {name!r}", data={"parameter": "dtype", "value": name})
    return DTYPES[name]


def is_local(source: str) -> bool:
    """Whether `source` is a model directory; ModelUnavailable if it is meant to be one and is none."""
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise unavailable(source, "is no model directory: it has no config.json")
        return True
    if path.exists():
        raise unavailable(source, "is a file: give the directory of a checkpoint in transformers' layout")
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise unavailable(source, "does not exist: give an existing directory, or an id on the Hugging Face Hub")
    return False


def _check_kind(source: str, config: Any) -> None:
    names = set(config.architectures or ())
    # transformers would load the body of any model and put a random head on it.
    if names and not names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and not getattr(config, "auto_map", None):
        supported = "a text encoder or a directory in sentence-transformers' layout (modules.json), to embed"
        raise unavailable(source, f"is a {', '.join(sorted(names))}, neither a causal language model, to generate text, nor {supported}")


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    # A chat model's turn may end with another token than its texts do; generation_config lists all.
    given = getattr(model.generation_config, "eos_token_id", None)
    ids = {given} if isinstance(given, int) else set(given or ())
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return frozenset(ids)


@contextmanager
def explained(source: str, *, local: bool) -> Iterator[None]:
    """Loaders fail with anything, and at length: one sentence for all of it."""
    try:
        yield
    except ModelUnavailable:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = f"{type(error).__name__}: {(lines or ['no reason given'])[0][:300]}"
        if isinstance(error, OSError) and not local:
            hint = "is no directory here and could not be had from the Hugging Face Hub (check the name and the network)"
            raise unavailable(source, f"{hint}: {why}") from error
        raise unavailable(source, f"cannot be loaded: {why}") from error


@contextmanager
def quiet(*, local: bool) -> Iterator[None]:
    """No progress bar over files that are here already: it would run through the worker's log."""
    bars: Any = transformers_logging
    hide = local and bars.is_progress_bar_enabled()
    if hide:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if hide:
            bars.enable_progress_bar()
