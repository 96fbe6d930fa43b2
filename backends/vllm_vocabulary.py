"""A model's tokenizer behind vLLM: prompts to ids, ids to text. Encoding is for one thread; decoding is for any."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

from zmqserve.messages import CountTokens, Generate

from .prompts import prompt_ids
from .text_bound import text_bound
from .truncation import check_truncation

MOST_KNOWN_TEXTS = 65536
"""Tokens whose text is kept, for logprobs."""


class ModelVocabulary:
    """`tokenizer` is vLLM's, for a model whose ids end at `size` - 1, of `context_length` tokens (0: no bound)."""

    def __init__(self, tokenizer: Any, size: int, context_length: int = 0) -> None:
        self.size = size
        self._bound = text_bound(tokenizer, context_length)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        # Encoding changes a tokenizer's state (truncation), and vLLM's own may be in use on another thread.
        self._tokenizer = copy.deepcopy(tokenizer)
        # The library under a fast tokenizer: the same text for a tenth of the time.
        self._fast = getattr(tokenizer, "_tokenizer", None)
        self.text_of = lru_cache(MOST_KNOWN_TEXTS)(self._text_of)

    def __repr__(self) -> str:
        return f"ModelVocabulary({self.size} ids)"

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return bool(getattr(self._tokenizer, "chat_template", None))

    def decode(self, ids: list[int]) -> str:
        """Their text, special tokens included."""
        if self._fast is not None:
            return str(self._fast.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))

    def _text_of(self, token_id: int) -> str:
        return self.decode([token_id])

    def encode(self, request: Generate | CountTokens) -> list[int]:
        """See prompt_ids."""
        return prompt_ids(request, self._tokenizer, lambda text: list(self._tokenizer.encode(text)), self.size, self._bound)

    def encode_text(self, text: str, most: int | None) -> list[int]:
        """Ids of a text to embed; no more than `most`, among them the special tokens that the model expects.

        InvalidParameter if so few leave nothing of a text; ContextOverflow for one that is not cut and cannot fit.
        """
        if most is None:
            self._bound.check(text, "a text")
            return list(self._tokenizer(text)["input_ids"])
        check_truncation(most, self._tokenizer.num_special_tokens_to_add(pair=False))
        return list(self._tokenizer(text, truncation=True, max_length=most)["input_ids"])
