"""Vectors from a feature extraction API: asked for in batches, checked, cut and normalised as EmbedParams say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from zmqserve.errors import InvalidParameter, Unsupported
from zmqserve.jobs import Vectors
from zmqserve.messages import Embed
from zmqserve.params import EmbedParams

from .hf_errors import Blame
from .hf_parameters import Plan, honoured
from .hf_registry import HostedModel

BATCH_TEXTS = 32
"""Texts in one request to the upstream: what Text Embeddings Inference takes by default."""

_UNIT = 1e-3
"""How far from 1 the length of a normalised vector may be."""


def plan_embed(model: HostedModel, params: EmbedParams) -> Plan:
    """How to ask. Raises Unsupported, which names what the API cannot carry."""
    what = f"the feature_extraction API of model {model.name!r}"
    for name in params.__struct_fields__:
        if getattr(params, name) is not None and name not in honoured(model):
            raise Unsupported(f"{name} is not supported by {what}", data={"parameter": name})
    if model.dialect == "openai" or (model.base_url is None and model.provider != "hf-inference"):
        if params.normalize is False:
            raise Unsupported(f"normalize = false is not supported by {what}: it has no such option", data={"parameter": "normalize"})
        return Plan({}, {})
    # Without `truncate` some servers cut what is too long, and say nothing.
    return Plan({"truncate": False, "normalize": params.normalize}, {})


def batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """In order, at most BATCH_TEXTS each."""
    for start in range(0, len(texts), BATCH_TEXTS):
        yield list(texts[start : start + BATCH_TEXTS])


def stacked(arrays: list[Any], request: Embed, blame: Blame, prompt_tokens: int) -> Vectors:
    """All batches' rows, float32, little-endian."""
    import numpy as np

    if len({array.shape[1] for array in arrays}) > 1:
        raise blame.nonsense("the upstream gave vectors of different lengths")
    rows = np.concatenate(arrays).astype("<f4")
    if not np.isfinite(rows).all():
        raise blame.nonsense("the upstream gave vectors that hold something else than finite numbers")
    params = request.params
    unit = params.normalize or (params.normalize is None and bool(np.all(np.abs(np.linalg.norm(rows, axis=1) - 1) < _UNIT)))
    if params.dimensions is not None:
        if params.dimensions > rows.shape[1]:
            text = f"dimensions must be at most {rows.shape[1]}, the model's own; got {params.dimensions}"
            raise InvalidParameter(text, data={"parameter": "dimensions"})
        rows = rows[:, : params.dimensions]
    if params.normalize or (unit and params.dimensions is not None):
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        rows = (rows / np.where(lengths > 0, lengths, 1)).astype("<f4")
    return Vectors(np.ascontiguousarray(rows).tobytes(), (rows.shape[0], rows.shape[1]), prompt_tokens)
