"""A model's tokenizer behind vLLM: prompts to ids, ids to text. Encoding is for one thread; decoding is for any."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from zmqserve.errors import ContextOverflow, InvalidParameter, Unsupported
from zmqserve.messages import CountTokens, Generate, unpack_ids

from .truncation import check_truncation

MOST_KNOWN_TEXTS = 65536
"""Tokens whose text is kept, for logprobs."""


class ModelVocabulary:
    """`tokenizer` is vLLM's, for a model whose ids end at `size` - 1."""

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.size = size
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
        """The prompt's ids, with the special tokens or the chat template that the model expects.

        Raises InvalidParameter for ids that the model does not know, and for messages that its template refuses.
        """
        if isinstance(request, Generate):
            if request.resume is not None and request.resume.prompt_token_ids is not None:
                return self.known(request.resume.prompt_token_ids, "resume.prompt_token_ids")
            if request.token_ids is not None:
                return self.known(request.token_ids, "token_ids")
        if request.messages is not None:
            ids = self._encode_chat([{"role": turn.role, "content": turn.content} for turn in request.messages])
        else:
            ids = list(self._tokenizer.encode(request.prompt or ""))
        if not ids:
            raise InvalidParameter("the prompt has no tokens: there is nothing to answer", data={"parameter": "prompt"})
        return ids

    def encode_text(self, text: str, most: int | None) -> list[int]:
        """Ids of a text to embed; no more than `most`, among them the special tokens that the model expects.

        InvalidParameter if so few leave nothing of a text.
        """
        if most is None:
            return list(self._tokenizer(text)["input_ids"])
        check_truncation(most, self._tokenizer.num_special_tokens_to_add(pair=False))
        return list(self._tokenizer(text, truncation=True, max_length=most)["input_ids"])

    def known(self, packed: bytes, name: str) -> list[int]:
        """Ids that the model knows; InvalidParameter, which names the field, for others."""
        ids = unpack_ids(packed)
        if max(ids, default=0) >= self.size:
            message = f"{name} holds {max(ids)}, but the model's ids end at {self.size - 1}"
            raise InvalidParameter(message, data={"parameter": name})
        return ids

    def echo(self, request: Generate, prompt: Sequence[int]) -> str:
        """What an answer begins with that repeats its prompt."""
        if request.prompt:
            return request.prompt
        skipped = self.special_ids if request.params.skip_special_tokens else ()
        return self.decode([i for i in prompt if i not in skipped])

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        if not self.chats:
            raise Unsupported("the model's tokenizer has no chat template: send a prompt", data={"parameter": "messages"})
        try:
            return list(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
        except TemplateError as error:
            raise InvalidParameter(f"the model's chat template refuses the messages: {error}", data={"parameter": "messages"}) from error


def room(prompt: int, wanted: int | None, context_length: int) -> int:
    """How many tokens the answer may have at most: what was asked for, or all that the context leaves. Never less in silence."""
    needed = prompt + (wanted or 1)
    if needed > context_length:
        answer = f"max_tokens {wanted}" if wanted else "an answer of at least 1"
        message = f"the prompt's {prompt} tokens and {answer} make {needed}, over the model's context of {context_length} tokens"
        raise ContextOverflow(message, data={"context_length": context_length, "tokens": needed})
    return wanted or context_length - prompt
