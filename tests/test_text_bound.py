"""Texts that are refused by their length: never one that fits, whatever a tokenizer does with it."""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqserve.errors import ContextOverflow
from zmqserve.messages import ChatMessage, CountTokens, Embed, Generate

transformers = pytest.importorskip("transformers")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402 - it may be missing

from zmqserve.backends.embedding import Embedder  # noqa: E402 - the same
from zmqserve.backends.prompts import prompt_ids  # noqa: E402 - the same
from zmqserve.backends.text_bound import TextBound, text_bound  # noqa: E402 - the same
from zmqserve.backends.vllm_vocabulary import ModelVocabulary  # noqa: E402 - the same

from .fakes.tiny_llama import TEMPLATE, WORDS, make_tokenizer  # noqa: E402 - the same

SIZE = 1000
TEXTS = [WORDS * 3, "    \n\n\n\t" * 20, "e\u0301\u0327\u0308 \u1f82 \ufdfa \U0001f600 \ufb03" * 9, "\x04\x06\x13" * 50, "= = = ======"]


def wrapped(tokenizer: Tokenizer, **settings: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def with_bytes() -> Tokenizer:
    """As SentencePiece's BPE: white space is a sign, and unknown characters are their bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([WORDS] * 3, trainer)
    return tokenizer


def byte_level(normalizer: Any = None, lost: str = "") -> Tokenizer:
    tokenizer = make_tokenizer()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if not lost:
        return tokenizer
    alphabet = [sign for sign in pre_tokenizers.ByteLevel.alphabet() if sign not in lost]
    without = Tokenizer(models.BPE())
    without.pre_tokenizer, without.decoder = tokenizer.pre_tokenizer, decoders.ByteLevel()
    without.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    return without


KNOWN = {
    "byte-level": byte_level(),
    "NFC": byte_level(normalizers.NFC()),
    "NFKC": byte_level(normalizers.NFKC()),
    "without some controls": byte_level(lost="\u0104\u0106\u0113"),
    "byte fallback": with_bytes(),
}


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def greedy_for_space() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<|user|>", rstrip=True)])
    return tokenizer


UNKNOWN = {
    "white space is dropped, and words are unknown": word_pieces(),
    "a token takes all white space behind it": greedy_for_space(),
    "accents are dropped": byte_level(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "ends are cut": byte_level(normalizers.Strip()),
    "letters are lost": byte_level(lost="Z"),
}


@pytest.mark.parametrize("kind", KNOWN)
@given(text=st.text(st.sampled_from("".join(TEXTS)) | st.characters(codec="utf-8"), max_size=200) | st.sampled_from(TEXTS))
def test_no_text_has_fewer_tokens_than_is_said(kind: str, text: str) -> None:
    tokenizer = wrapped(KNOWN[kind])
    bound = text_bound(tokenizer, 1)
    assert 0 < bound.longest < 200
    assert bound.least_tokens(text) <= len(tokenizer.encode(text))


@pytest.mark.parametrize("kind", UNKNOWN)
def test_where_length_says_nothing_no_text_is_refused(kind: str) -> None:
    bound = text_bound(wrapped(UNKNOWN[kind]), 1)
    bound.check("Z" * 10**6, "a prompt")
    assert bound == TextBound(1)


def test_a_tokenizer_of_another_kind_bounds_nothing() -> None:
    assert text_bound(object(), 1) == TextBound(1)


def test_characters_without_a_token_do_not_count() -> None:
    bound = text_bound(wrapped(KNOWN["without some controls"]), 10)
    bound.check("\x04\x06\x13" * 10**6, "a prompt")
    with pytest.raises(ContextOverflow) as caught:
        bound.check("\x04x" * 10**5, "a prompt")
    least = caught.value.tokens
    assert str(caught.value) == f"a prompt of 200000 characters has at least {least} tokens, over the model's context of 10 tokens"
    assert 10**5 / 50 < least <= 10**5


class NeverEncoding:
    """A tokenizer with a template that keeps the last word of each message."""

    chat_template = TEMPLATE

    def apply_chat_template(self, turns: list[dict[str, str]], *, tokenize: bool, **_: Any) -> Any:
        text = " ".join(turn["content"].split()[-1] for turn in turns)
        return [1] * len(text) if tokenize else text


@pytest.mark.parametrize("kind", [Generate, CountTokens])
def test_what_cannot_fit_is_refused_before_it_is_made_into_tokens(kind: Any) -> None:
    def encode(_: str) -> list[int]:
        raise AssertionError("encoded")

    bound = TextBound(10, 5.0)
    with pytest.raises(ContextOverflow, match="a prompt of 51 characters has at least 11 tokens") as caught:
        prompt_ids(kind(1, "m", prompt="x" * 51), None, encode, SIZE, bound)
    assert caught.value.data == {"context_length": 10, "tokens": 11}
    long = kind(1, "m", messages=[ChatMessage("user", "x" * 40), ChatMessage("user", "y" * 40)])
    with pytest.raises(ContextOverflow, match="a conversation of 81 characters has at least 17 tokens"):
        prompt_ids(long, NeverEncoding(), encode, SIZE, bound)
    short = kind(1, "m", messages=[ChatMessage("user", "x " * 400)])
    assert prompt_ids(short, NeverEncoding(), encode, SIZE, bound) == [1]


def test_texts_to_embed_are_refused_likewise_unless_they_are_to_be_cut() -> None:
    vocabulary = ModelVocabulary(wrapped(KNOWN["byte-level"]), 320, 10)
    with pytest.raises(ContextOverflow, match="a text of 5000 characters has at least"):
        vocabulary.encode_text("x" * 5000, None)
    assert len(vocabulary.encode_text("x" * 5000, 5)) == 5

    model = MagicMock(tokenizer=wrapped(KNOWN["byte-level"]), context_length=10, dimensions=3)
    model.device.type = "cpu"
    embedder = Embedder(model, "test", on_death=MagicMock())
    try:
        model.rows.reset_mock()
        with pytest.raises(ContextOverflow, match=r"texts\[1\] of 5000 characters has at least") as caught:
            asyncio.run(embedder.embed(Embed(1, "m", texts=["x", "y" * 5000])))
        assert caught.value.data["position"] == 1
        with pytest.raises(ContextOverflow, match="a prompt of 5000 characters"):
            asyncio.run(embedder.count_tokens(CountTokens(1, "m", prompt="x" * 5000)))
        model.rows.assert_not_called()
    finally:
        embedder.close()
