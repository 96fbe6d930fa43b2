"""A request's prompt as token ids, whatever tokenizer and engine take it. For one thread at a time: encoding changes a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from zmqserve.errors import ContextOverflow, InvalidParameter, Unsupported
from zmqserve.messages import ChatMessage, CountTokens, Generate, unpack_ids

from .reader import Vocabulary
from .text_bound import TextBound


def prompt_ids(
    request: Generate | CountTokens, tokenizer: Any, encode: Callable[[str], list[int]], size: int, bound: TextBound
) -> list[int]:
    """With the special tokens (`encode` adds them to a text) or the chat template that the model expects; its ids end at `size` - 1.

    Raises InvalidParameter for ids that the model does not know, for messages that its template refuses, and where there is nothing;
    ContextOverflow for what is over `bound`, also where tokens are only to be counted: it would keep others waiting as long.
    """
    if isinstance(request, Generate):
        if request.resume is not None and request.resume.prompt_token_ids is not None:
            return known_ids(request.resume.prompt_token_ids, "resume.prompt_token_ids", size)
        if request.token_ids is not None:
            return known_ids(request.token_ids, "token_ids", size)
    if request.messages is not None:
        ids = chat_ids(request.messages, tokenizer, bound)
    else:
        bound.check(request.prompt or "", "a prompt")
        ids = encode(request.prompt or "")
    if not ids:
        raise InvalidParameter("the prompt has no tokens: there is nothing to answer", data={"parameter": "prompt"})
    return ids


def chat_ids(messages: Sequence[ChatMessage], tokenizer: Any, bound: TextBound) -> list[int]:
    """Ids of a conversation in the tokenizer's own template, up to where the answer begins. InvalidParameter if it refuses them,
    ContextOverflow if its text is over `bound`."""
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise Unsupported("the model's tokenizer has no chat template: send a prompt", data={"parameter": "messages"})
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    try:
        if bound.least_tokens("".join(turn.content for turn in messages)):
            # A template may leave much of them out.
            bound.check(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False), "a conversation")
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False))
    except TemplateError as error:
        raise InvalidParameter(f"the model's chat template refuses the messages: {error}", data={"parameter": "messages"}) from error


def known_ids(packed: bytes, name: str, size: int) -> list[int]:
    """Ids that a model of `size` ids knows; InvalidParameter, which names the field, for others."""
    ids = unpack_ids(packed)
    if max(ids, default=0) >= size:
        message = f"{name} holds {max(ids)}, but the model's ids end at {size - 1}"
        raise InvalidParameter(message, data={"parameter": name})
    return ids


def echo_of(request: Generate, prompt: Sequence[int], vocabulary: Vocabulary) -> str:
    """What an answer begins with that repeats its prompt."""
    if request.prompt:
        return request.prompt
    skipped = vocabulary.special_ids if request.params.skip_special_tokens else ()
    return vocabulary.decode([i for i in prompt if i not in skipped])


def room(prompt: int, wanted: int | None, context_length: int) -> int:
    """How many tokens the answer may have at most: what was asked for, or all that the context leaves. Never less in silence."""
    needed = prompt + (wanted or 1)
    if needed > context_length:
        answer = f"max_tokens {wanted}" if wanted else "an answer of at least 1"
        message = f"the prompt's {prompt} tokens and {answer} make {needed}, over the model's context of {context_length} tokens"
        raise ContextOverflow(message, data={"context_length": context_length, "tokens": needed})
    return wanted or context_length - prompt
