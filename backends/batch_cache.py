"""How large the key-value cache of a batch is: for at least one whole context, for all slots at a moderate length, within the memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from zmqserve.errors import InvalidParameter

from .checkpoint import Checkpoint

_PAGE_TOKENS = 32
"""A prompt's beginning that others have had is shared in whole pages: the smaller they are, the more of it."""
_FLASH_PAGE_TOKENS = 256
"""What the kernels of flash attention read in one go."""
_STEP_TOKENS = {"cpu": 512}
_STEP_TOKENS_ELSEWHERE = 2048
"""Tokens of prompts in one step: a long one keeps others waiting for a piece, not for the whole."""
_SLOT_TOKENS = {"cpu": 512}
_SLOT_TOKENS_ELSEWHERE = 2048
"""What an answer and its prompt have on average, with room to spare. A CPU clears 1000 tokens of a small model in 0.1 s."""
_SHARE = 0.5
"""Of the free memory at most: the rest is for the forward, and for others."""


@dataclass(frozen=True)
class CacheSize:
    """`pages` of `page_tokens` each; a step takes at most `step_tokens`."""

    page_tokens: int
    pages: int
    step_tokens: int

    @property
    def tokens(self) -> int:
        """What all requests in the batch, prompts and answers, may have together."""
        return self.page_tokens * self.pages


def cache_size(checkpoint: Checkpoint, slots: int, most_sequences: int, asked_tokens: int | None, engines: int) -> CacheSize:
    """For one of `engines` on this device. Raises InvalidParameter if `asked_tokens` do not fit the free memory."""
    device = checkpoint.device.type
    config = checkpoint.model.config
    page = _FLASH_PAGE_TOKENS if "flash" in (config._attn_implementation or "") else _PAGE_TOKENS
    step = max(_STEP_TOKENS.get(device, _STEP_TOKENS_ELSEWHERE), most_sequences)
    item = checkpoint.model.dtype.itemsize
    text = config.get_text_config()
    # Keys and values of all layers, and a column of the attention mask.
    token_bytes = item * (2 * text.num_hidden_layers * _key_value_width(text) + step)
    most = int(_SHARE * _free_bytes(checkpoint.device) / engines / token_bytes)
    if asked_tokens is not None and asked_tokens > most:
        message = f"cache_tokens {asked_tokens} would take {asked_tokens * token_bytes / 2**20:.0f} MiB: there is room for {most}"
        raise InvalidParameter(message, data={"parameter": "cache_tokens", "value": asked_tokens})
    usual = max(checkpoint.context_length, slots * _SLOT_TOKENS.get(device, _SLOT_TOKENS_ELSEWHERE))
    tokens = min(usual, most) if asked_tokens is None else asked_tokens
    return CacheSize(page, max(1, -(-tokens // page)), step)


def _key_value_width(config: Any) -> int:
    """Numbers in the keys of one token in one layer; as many are in its values."""
    heads: int = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * width)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return int(psutil.virtual_memory().available)
