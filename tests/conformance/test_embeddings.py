"""One vector per text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from zmqserve.errors import ContextOverflow, InvalidParameter
from zmqserve.messages import Embed, Embedding

from .cases import case
from .network import Network

TEXTS = [
    "a fox",
    "the quick brown fox jumps over the lazy dog " * 4,
    "日本語 😀",
    "Paris is the capital of France.",
    "x",
]
WORDS = "one two three four five six seven eight nine ten eleven twelve"
NOISE = 2e-5
"""What the rounding of float32 may do to a number of a unit vector when other texts are in its batch."""


@case("float32, one row per text, as long as the card says", needs=["embed"], role="embed")
def test_shape(network: Network) -> None:
    vectors = network.embed(TEXTS)
    card = network.client.model_details(network.subject.model)
    assert card.embedding_dim > 0
    assert vectors.shape == (len(TEXTS), card.embedding_dim)
    assert vectors.dtype == np.dtype("<f4")
    assert np.isfinite(vectors).all()
    assert {"embed", "count_tokens", "model_details"} <= set(card.verbs)


@case("the same vector alone, in a batch and beside other requests", needs=["embed"], role="embed")
def test_a_vector_does_not_depend_on_the_batch(network: Network) -> None:
    together = network.embed(TEXTS)
    backwards = network.embed(TEXTS[::-1])[::-1]
    with ThreadPoolExecutor(len(TEXTS)) as pool:
        alone = np.concatenate(list(pool.map(lambda text: network.embed([text]), TEXTS)))
    assert np.abs(together - alone).max() < NOISE
    assert np.abs(together - backwards).max() < NOISE
    distances = [np.abs(together[i] - together[k]).max() for i in range(len(TEXTS)) for k in range(i)]
    assert min(distances) > 1e-2, "vectors must tell texts apart"


@case("`normalize`: to length 1, or as the model made it", needs=["embed"], shows=["normalize"], role="embed")
def test_normalize(network: Network) -> None:
    unit, raw = network.embed(TEXTS, normalize=True), network.embed(TEXTS, normalize=False)
    assert np.linalg.norm(unit, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)
    lengths = np.linalg.norm(raw, axis=1)
    assert np.abs(lengths - 1).min() > 1e-3
    assert np.abs(raw / lengths[:, None] - unit).max() < NOISE


@case("`dimensions`: the first so many, at length 1 again", needs=["embed"], shows=["dimensions"], role="embed")
def test_dimensions(network: Network) -> None:
    whole = network.embed(TEXTS, normalize=True)
    cut = network.embed(TEXTS, normalize=True, dimensions=32)
    assert cut.shape == (len(TEXTS), 32)
    first = whole[:, :32]
    assert np.abs(cut - first / np.linalg.norm(first, axis=1)[:, None]).max() < NOISE


@case("more `dimensions` than there are: an error with both numbers", needs=["embed"], shows=["dimensions"], role="embed")
def test_too_many_dimensions(network: Network) -> None:
    size = network.client.model_details(network.subject.model).embedding_dim
    with pytest.raises(InvalidParameter, match=rf"{size}\D.*{size + 1}|{size + 1}\D.*{size}") as caught:
        network.embed(TEXTS, dimensions=size + 1)
    assert caught.value.parameter == "dimensions"


@case("`truncate_tokens`: the vector of the text's beginning", needs=["embed"], shows=["truncate_tokens"], role="embed")
def test_truncate_tokens(network: Network) -> None:
    special = len(network.subject.embed_tokenizer().encode(""))
    beginning = " ".join(WORDS.split()[: 8 - special])
    cut, expected = network.embed([WORDS, beginning], truncate_tokens=8)
    assert np.abs(cut - expected).max() < NOISE
    assert np.abs(cut - network.embed([WORDS])[0]).max() > 1e-3


@case("a text over the model's length is error 40303 with both numbers", needs=["embed"], shows=["truncate_tokens"], role="embed")
def test_a_text_over_the_length(network: Network) -> None:
    length = network.client.model_details(network.subject.model).context_length
    text = "one " * (length + 5)
    with pytest.raises(ContextOverflow) as caught:
        network.embed(["a fox", text])
    special = len(network.subject.embed_tokenizer().encode(""))
    assert (caught.value.context_length, caught.value.tokens) == (length, length + 5 + special)
    assert network.embed(["a fox", text], truncate_tokens=length).shape[0] == 2


@case("usage and `count_tokens` are what the tokenizer counts", needs=["embed"], role="embed")
def test_usage(network: Network) -> None:
    subject = network.subject
    expected = [len(subject.embed_tokenizer().encode(text)) for text in (WORDS, "one two")]
    with network.wire() as wire:
        wire.send(Embed(1, subject.model, texts=[WORDS, "one two"]))
        answer = wire.next()
    assert isinstance(answer, Embedding), answer
    assert answer.usage.prompt_tokens == sum(expected)
    assert network.client.count_tokens(subject.model, WORDS) == expected[0]


@case("an empty text is refused", needs=["embed"], role="embed")
def test_an_empty_text_is_refused(network: Network) -> None:
    with network.wire() as wire:
        wire.send(Embed(1, network.subject.model, texts=["a", ""]))
        failed = wire.next()
    assert (failed.code, failed.data["parameter"]) == (InvalidParameter.code, "texts")
