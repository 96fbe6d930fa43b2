"""Detokenizer: the pieces of a text add up to the text, and no piece holds part of a character."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqserve.backends.detokenize import Detokenizer

pytest.importorskip("tokenizers")

from tokenizers import Tokenizer

from .fakes.tiny_llama import SPECIAL, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)


def decode_with(tokenizer: Tokenizer) -> Callable[[list[int]], str]:
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "😀 and 👩‍👩‍👧 and 🏳️‍🌈!", "  spaces\n\tand tabs  "])
def test_a_character_never_comes_in_parts(tokenizer: Tokenizer, text: str) -> None:
    stream = Detokenizer(decode_with(tokenizer), ids_of(tokenizer, "the"))
    pieces = [stream.feed(token_id) for token_id in ids_of(tokenizer, text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text
    assert len(pieces) > len([piece for piece in pieces if piece]) or text.isascii()


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=40), cut=st.integers(0, 40))
def test_any_text_comes_back_whole_from_its_tokens(tokenizer: Tokenizer, text: str, cut: int) -> None:
    ids = [*ids_of(tokenizer, text[:cut]), *ids_of(tokenizer, text[cut:])]
    stream = Detokenizer(decode_with(tokenizer), [])
    assert "".join(map(stream.feed, ids)) + stream.flush() == text


def test_an_answer_that_ends_inside_a_character_ends_before_it(tokenizer: Tokenizer) -> None:
    stream = Detokenizer(decode_with(tokenizer), [])
    pieces = [stream.feed(token_id) for token_id in ids_of(tokenizer, "ok 😀")[:-1]]
    assert "".join(pieces) + stream.flush() == "ok "


def test_bytes_of_no_character_are_not_held_for_ever(tokenizer: Tokenizer) -> None:
    half = ids_of(tokenizer, "😀")[0]
    stream = Detokenizer(decode_with(tokenizer), [])
    assert any(stream.feed(half) for _ in range(20))


def test_special_tokens_have_text_only_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, "a</s>b")
    special = frozenset(range(len(SPECIAL)))
    assert "".join(map(Detokenizer(decode_with(tokenizer), [], special).feed, ids)) == "ab"
    assert "".join(map(Detokenizer(decode_with(tokenizer), []).feed, ids)) == "a</s>b"
