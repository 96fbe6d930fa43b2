"""A text embedding model and its tokenizer: loaded with sentence-transformers where it has that layout, else with transformers.

Without that layout a text's vector is the mean of its tokens' last hidden states, padding left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING, MODEL_MAPPING
from transformers.utils.hub import cached_file

from .checkpoint import device_of, dtype_of, explained, fingerprint_of, quiet
from .load_options import LoadOptions
from .model_errors import missing_libraries, unavailable
from .truncation import check_truncation

LAYOUT = "modules.json"
"""The file that makes a directory one of sentence-transformers."""

_BODIES: tuple[Any, ...] = (MODEL_MAPPING, MODEL_FOR_MASKED_LM_MAPPING)
"""transformers' classes that read and do nothing else, and those that guess hidden tokens, which is how readers are trained."""

_NO_BOUND = 10**9
"""transformers writes "no length given" as a number above this."""

_PROBES = ["a dog", "The quick brown fox jumps over the lazy dog, and the small model answers with small words."]
_SAME_COSINE = 0.999
"""What two ways to compute one vector must reach; below it is a mistake, not rounding, in 16-bit numbers too."""

Features = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """One text as the model takes it: lists of one number per token, `length` tokens long, special tokens included."""

    columns: Mapping[str, list[int]]
    length: int


@dataclass(frozen=True, eq=False)
class EmbeddingModel:
    """A model ready to run. `encode` gives one row a text, before any normalisation; `normalizes`: the model's own vectors have length 1.

    `context_length` is in tokens, special tokens included, 0 if the model names no bound. `prompt` stands before each text.
    """

    tokenizer: Any
    encode: Callable[[Features], torch.Tensor]
    device: torch.device
    dimensions: int
    context_length: int
    normalizes: bool
    fingerprint: str
    prompt: str = ""

    def rows(self, texts: Sequence[str], truncate_tokens: int | None = None) -> list[Row]:
        """Texts as tokens, each cut to `truncate_tokens`, special tokens included, and else never. For one thread at a time.

        InvalidParameter if so few tokens leave nothing of a text.
        """
        cut: dict[str, Any] = {}
        if truncate_tokens is not None:
            special = self.tokenizer.num_special_tokens_to_add(pair=False)
            check_truncation(truncate_tokens, special)
            cut = {"truncation": True, "max_length": truncate_tokens}
        columns = self.tokenizer([self.prompt + text for text in texts], padding=False, return_attention_mask=True, verbose=False, **cut)
        ids = columns["input_ids"]
        return [Row({name: column[i] for name, column in columns.items()}, len(ids[i])) for i in range(len(ids))]

    @torch.inference_mode()
    def vectors(self, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One vector for each row, (rows, dimensions), as it comes from the model: not normalised. The rows are padded to the longest."""
        vectors = self.encode(self._padded(rows))[:, : self.dimensions]
        return np.asarray(vectors.float().cpu().numpy())

    def _padded(self, rows: Sequence[Row]) -> Features:
        lengths = np.array([row.length for row in rows])[:, None]
        width = int(lengths.max())
        positions = np.arange(width)
        real = positions >= width - lengths if self.tokenizer.padding_side == "left" else positions < lengths
        fill = {"input_ids": self.tokenizer.pad_token_id or 0, "token_type_ids": getattr(self.tokenizer, "pad_token_type_id", 0)}
        features: Features = {}
        for name in rows[0].columns:
            column = np.full(real.shape, fill.get(name, 0), dtype=np.int64)
            column[real] = np.fromiter(chain.from_iterable(row.columns[name] for row in rows), np.int64)
            features[name] = torch.from_numpy(column).to(self.device)
        return features


def embeds(source: str, options: LoadOptions) -> bool:
    """Whether `source` (a directory, or an id on the Hugging Face Hub) is a text embedding model.

    That is what has sentence-transformers' layout, or a text encoder with no head but that of its training.
    """
    source = os.path.expanduser(source)
    try:
        if _has_layout(source, options.revision):
            return True
        config = AutoConfig.from_pretrained(source, **options.of_files)
    except Exception:  # noqa: BLE001 - who then loads it as a language model says what is wrong with it
        return False
    kinds: list[Any] = [types[type(config)] for types in _BODIES if type(config) in types]
    names = {kind.__name__ for kind in kinds if getattr(kind, "main_input_name", None) == "input_ids"}
    return bool(names & set(config.architectures or ())) and not config.is_encoder_decoder


def load(source: str, options: LoadOptions) -> EmbeddingModel:
    """Load what `embeds`. dtype ``auto``: float32 on a CPU, elsewhere as the checkpoint is stored, as sentence-transformers does.

    Raises ModelUnavailable, which says what is wrong with `source`, and InvalidParameter for a device or dtype that is none.
    """
    where = device_of(options.device)
    kind: Any = "auto" if options.dtype == "auto" and where.type != "cpu" else dtype_of(options.dtype, where)
    weights = {"dtype": kind, **options.of_weights}
    source = os.path.expanduser(source)
    local = os.path.isdir(source)
    with explained(source, local=local), quiet(local=local):
        return (_load_pipeline if _has_layout(source, options.revision) else _load_body)(source, where, options.of_files, weights)


def _has_layout(source: str, revision: str | None) -> bool:
    silent = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    return cached_file(source, LAYOUT, revision=revision, **silent) is not None


# --- sentence-transformers' layout ----------------------------------------------------------------


def _load_pipeline(source: str, device: torch.device, files: dict[str, Any], weights: dict[str, Any]) -> EmbeddingModel:
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules import Normalize, Transformer
    except ImportError as error:
        raise missing_libraries(error) from error

    pipeline: Any = SentenceTransformer(source, device=str(device), model_kwargs=weights, **files)
    pipeline.eval().requires_grad_(False)
    body: Any = pipeline[0]
    if not isinstance(body, Transformer) or set(body.modalities) != {"text"} or body.transformer_task != "feature-extraction":
        raise unavailable(source, f"begins with a {type(body).__name__}: of sentence-transformers' models only text encoders are supported")
    _check_tokenizer(source, pipeline.tokenizer)
    expected = torch.from_numpy(pipeline.encode(_PROBES, show_progress_bar=False))
    prompt = pipeline.prompts.get(pipeline.default_prompt_name, "") if pipeline.default_prompt_name else ""
    extra = {name: value for name, value in pipeline.preprocess(["x"], prompt=prompt).items() if name in {"modality", "prompt_length"}}
    normalizes = False
    while isinstance(pipeline[-1], Normalize) and pipeline[-1].module_output_name == "sentence_embedding":
        # Taken off, so that a request may have the vector before it.
        del pipeline[-1]
        normalizes = True

    def encode(features: Features) -> torch.Tensor:
        vectors: torch.Tensor = pipeline({**features, **extra})["sentence_embedding"]
        return vectors

    facts = [str(pipeline), prompt, normalizes, pipeline.max_seq_length, pipeline.truncate_dim]
    model = EmbeddingModel(
        pipeline.tokenizer,
        encode,
        device,
        dimensions=min(expected.shape[1], pipeline.truncate_dim or expected.shape[1]),
        context_length=_context_length(body.auto_model, pipeline.max_seq_length),
        normalizes=normalizes,
        fingerprint=fingerprint_of(pipeline, pipeline.tokenizer, facts),
        prompt=prompt,
    )
    found = torch.from_numpy(model.vectors(model.rows(_PROBES, model.context_length or None)))
    worst = float(cosine_similarity(found, expected.float()).min())
    if not worst > _SAME_COSINE:
        raise unavailable(source, f"gives other vectors here than SentenceTransformer.encode (cosine {worst:.4f}): it is not supported")
    return model


# --- a plain encoder ------------------------------------------------------------------------------


def _load_body(source: str, device: torch.device, files: dict[str, Any], weights: dict[str, Any]) -> EmbeddingModel:
    loader: Any = AutoModel
    tokenizer = AutoTokenizer.from_pretrained(source, **files)
    _check_tokenizer(source, tokenizer)
    # Position 0 is a text's first token, whatever it stands beside.
    tokenizer.padding_side = "right"
    body, report = loader.from_pretrained(source, output_loading_info=True, **weights, **files)
    # Some checkpoints of bodies lack the pooler, which the mean does not use.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise unavailable(source, f"is incomplete: it lacks the weights {', '.join(missing[:3])} ({len(missing)} in all)")
    body = body.to(device).eval().requires_grad_(False)

    def encode(features: Features) -> torch.Tensor:
        return masked_mean(body(**features).last_hidden_state, features["attention_mask"])

    model = EmbeddingModel(
        tokenizer,
        encode,
        device,
        dimensions=int(body.config.hidden_size),
        context_length=_context_length(body, tokenizer.model_max_length),
        normalizes=False,
        fingerprint=fingerprint_of(body, tokenizer, ["masked mean"]),
    )
    model.vectors(model.rows(_PROBES, model.context_length or None))
    return model


def _check_tokenizer(source: str, tokenizer: Any) -> None:
    # Without files transformers makes one up that knows no words: all texts would look alike.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise unavailable(source, "has no tokenizer files: add tokenizer.json, or what the model was trained with")


def masked_mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of `states` (texts, tokens, dimensions) over the tokens where `mask` (texts, tokens) is 1, in float32."""
    weights = mask.unsqueeze(-1).float()
    return (states.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _context_length(body: Any, named: int | None) -> int:
    """The least of what the tokenizer names and what the positions have room for; 0: no bound."""
    bounds = [named or _NO_BOUND, getattr(body.config, "max_position_embeddings", None) or _NO_BOUND]
    for module in body.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, torch.nn.Embedding) and positions.padding_idx is not None:
            # RoBERTa and its kin count positions from the one after padding's.
            bounds.append(positions.num_embeddings - positions.padding_idx - 1)
    least = min(bounds)
    return int(least) if 0 < least < _NO_BOUND else 0
