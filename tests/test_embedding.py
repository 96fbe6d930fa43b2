"""ModelWorker with an embedding model: a tiny BERT with random weights, compared with transformers one text at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter, Unsupported
from zmqserve.messages import BYE, ChatMessage, CountTokens, Embed, ModelCard
from zmqserve.params import EmbedParams
from zmqserve.worker import WorkerConfig

from .fakes.controller import FakeController
from .fakes.tiny_bert import CONTEXT, DIMENSIONS, make_encoder
from .fakes.tiny_llama import make_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["a fox", "the quick brown fox jumps over the lazy dog and the hat", "dog", "small words about a dog, a fox and a hat.", "a fox"]
NOISE = 1e-5
"""What the order of additions in float32 may change in vectors whose numbers are about 1."""


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("models") / "tiny-bert")


def make_worker(directory: Path, **options: Any) -> ModelWorker:
    return ModelWorker(WorkerConfig(model=str(directory)), **{"device": "cpu", "threads": 1, **options})


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[ModelWorker]:
    made = make_worker(model_dir)
    made.cards = made.load()
    embed(made, ["warm up"])
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(model_dir: Path) -> Any:
    """TEXTS, each by itself: no batch, no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model = transformers.AutoModel.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0) for text in TEXTS]
    return torch.stack(rows).numpy()


def tokens_of(model_dir: Path, text: str) -> int:
    return len(transformers.AutoTokenizer.from_pretrained(model_dir).encode(text))


async def vectors(worker: ModelWorker, texts: Sequence[str], **params: Any) -> Any:
    made = await worker.embed(Embed(1, "tiny-bert", texts=list(texts), params=EmbedParams(**params)))
    return np.frombuffer(made.data, dtype="<f4").reshape(made.shape)


def embed(worker: ModelWorker, texts: Sequence[str], **params: Any) -> Any:
    return asyncio.run(vectors(worker, texts, **params))


def unit(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# --- vectors -----------------------------------------------------------------------------------


def test_a_vector_is_the_mean_of_the_last_states_whatever_stands_beside_it(worker: ModelWorker, expected: Any) -> None:
    distances = [np.abs(expected[i] - expected[k]).max() for i in range(4) for k in range(i)]
    assert min(distances) > 0.1, "the model of this test must tell texts apart"
    alone = np.concatenate([embed(worker, [text]) for text in TEXTS])
    together = embed(worker, TEXTS)
    assert np.abs(alone - expected).max() < NOISE
    assert np.abs(together - expected).max() < NOISE

    async def mixed() -> list[Any]:
        """Requests of one, two and five texts at once."""
        requests = [[text] for text in TEXTS] + [[first, second] for first in TEXTS for second in TEXTS] + [TEXTS[::-1]]
        return list(zip(requests, await asyncio.gather(*(vectors(worker, texts) for texts in requests)), strict=True))

    for texts, rows in asyncio.run(mixed()):
        assert np.abs(rows - expected[[TEXTS.index(text) for text in texts]]).max() < NOISE


@pytest.mark.parametrize(("normalize", "normalized"), [(None, False), (False, False), (True, True)])
def test_normalize_is_done_when_asked(worker: ModelWorker, expected: Any, normalize: bool | None, normalized: bool) -> None:
    assert np.abs(embed(worker, TEXTS, normalize=normalize) - (unit(expected) if normalized else expected)).max() < NOISE


def test_dimensions_cut_before_they_are_normalised(worker: ModelWorker, expected: Any) -> None:
    assert np.abs(embed(worker, TEXTS, dimensions=8) - expected[:, :8]).max() < NOISE
    assert np.abs(embed(worker, TEXTS, dimensions=8, normalize=True) - unit(expected[:, :8])).max() < NOISE


def test_more_dimensions_than_the_model_has_are_refused_with_both_numbers(worker: ModelWorker) -> None:
    with pytest.raises(InvalidParameter, match=f"at most {DIMENSIONS}.*got {DIMENSIONS + 1}") as caught:
        embed(worker, TEXTS, dimensions=DIMENSIONS + 1)
    assert caught.value.parameter == "dimensions"
    assert embed(worker, TEXTS, dimensions=DIMENSIONS).shape == (len(TEXTS), DIMENSIONS)


def test_truncate_tokens_counts_special_tokens(worker: ModelWorker) -> None:
    words = "fox dog hat dog fox hat dog"
    assert np.array_equal(embed(worker, [words], truncate_tokens=5), embed(worker, ["fox dog hat"]))
    assert not np.allclose(embed(worker, [words]), embed(worker, ["fox dog hat"]))
    with pytest.raises(InvalidParameter, match="more than the 2 special tokens that each text gets, got 2"):
        embed(worker, [words], truncate_tokens=2)


def test_a_text_over_the_context_is_refused_with_both_numbers_unless_it_is_cut(worker: ModelWorker) -> None:
    long = "dog " * (CONTEXT - 1)
    for cut in ({}, {"truncate_tokens": CONTEXT + 1}):
        with pytest.raises(ContextOverflow, match=rf"texts\[1\] has {CONTEXT + 1} tokens, over the model's context of {CONTEXT}") as caught:
            embed(worker, ["dog", long], **cut)
        assert (caught.value.context_length, caught.value.tokens) == (CONTEXT, CONTEXT + 1)
    fits = embed(worker, ["dog " * (CONTEXT - 2)])
    assert np.abs(embed(worker, ["dog", long], truncate_tokens=CONTEXT)[1] - fits[0]).max() < NOISE


def test_usage_and_count_tokens_are_the_tokenizers_own_count_without_padding(worker: ModelWorker, model_dir: Path) -> None:
    made = asyncio.run(worker.embed(Embed(1, "tiny-bert", texts=TEXTS)))
    assert made.prompt_tokens == sum(tokens_of(model_dir, text) for text in TEXTS)
    cut = asyncio.run(worker.embed(Embed(1, "tiny-bert", texts=TEXTS, params=EmbedParams(truncate_tokens=3))))
    assert cut.prompt_tokens == 3 * len(TEXTS)
    for text in (TEXTS[1], "dog " * 500):
        assert asyncio.run(worker.count_tokens(CountTokens(1, "tiny-bert", prompt=text))) == tokens_of(model_dir, text)
    with pytest.raises(Unsupported, match="no chat template"):
        asyncio.run(worker.count_tokens(CountTokens(1, "tiny-bert", messages=[ChatMessage("user", "dog")])))


def test_a_vector_that_is_not_finite_is_an_error_and_fails_alone(model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = make_encoder(tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    token = transformers.AutoTokenizer.from_pretrained(broken).convert_tokens_to_ids("fox")
    weights["embeddings.word_embeddings.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    bad = make_worker(broken)
    bad.cards = bad.load()

    async def both() -> list[Any]:
        return list(await asyncio.gather(vectors(bad, ["dog", "a fox"]), vectors(bad, ["hat"]), return_exceptions=True))

    try:
        failed, good = asyncio.run(both())
    finally:
        bad.close()
    assert isinstance(failed, BackendError)
    assert "texts[1] is not finite" in failed.message
    assert good.shape == (1, DIMENSIONS)


# --- loading -----------------------------------------------------------------------------------


def test_a_worker_whose_model_runs_no_more_ends_and_its_controller_hears_it(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a CUDA error that lasts. What was asked has no answer: it goes on elsewhere."""

    def broken(*_: object) -> None:
        raise RuntimeError("device-side assert")

    with FakeController() as controller:
        config = WorkerConfig(model=str(model_dir), controllers=(controller.endpoint,))
        with ModelWorker(config, device="cpu", threads=1) as worker:
            controller.register(timeout_s=60, ttl_ms=600_000)
            monkeypatch.setattr("zmqserve.backends.embedding_model.EmbeddingModel.vectors", broken)
            controller.request(Embed(1, "tiny-bert", texts=["a fox", "a dog"]))
            controller.expect(BYE, timeout_s=20)
            with pytest.raises(BackendError, match="cannot run any more, the worker ends: RuntimeError: device-side assert"):
                worker.wait_ended(20)


def test_the_card_says_what_is_served(worker: ModelWorker, model_dir: Path) -> None:
    (card,) = worker.cards
    verbs = ["embed", "count_tokens", "model_details"]
    assert card == ModelCard(
        "tiny-bert", card.fingerprint, context_length=CONTEXT, verbs=verbs, embedding_dim=DIMENSIONS, source=str(model_dir)
    )
    assert len(card.fingerprint) == 32
    assert worker.slots == 64


def test_slots_are_as_asked(model_dir: Path) -> None:
    few = ModelWorker(WorkerConfig(model=str(model_dir), slots=3), device="cpu", threads=1)
    try:
        few.cards = few.load()
        assert few.slots == 3
    finally:
        few.close()


@pytest.mark.parametrize("architecture", ["BertModel", "BertForMaskedLM"])
def test_encoders_are_known_by_their_architecture(tmp_path: Path, architecture: str) -> None:
    """The head that guesses hidden tokens is left away."""
    made = make_worker(make_encoder(tmp_path / "encoder", architecture))
    try:
        (card,) = made.load()
        assert "embed" in card.verbs
        assert "generate" not in card.verbs
    finally:
        made.close()


def test_a_model_with_another_head_is_refused(tmp_path: Path) -> None:
    directory = make_encoder(tmp_path / "judge", "BertForSequenceClassification")
    with pytest.raises(
        ModelUnavailable, match=r"is a BertForSequenceClassification, neither a causal language model, .*, nor a text encoder"
    ):
        make_worker(directory).load()


def test_a_language_model_does_not_embed(tmp_path: Path) -> None:
    made = make_worker(make_model(tmp_path / "tiny"))
    try:
        (card,) = made.load()
        assert "embed" not in card.verbs
        with pytest.raises(Unsupported, match="does not embed"):
            asyncio.run(made.embed(Embed(1, card.name, texts=["a"])))
    finally:
        made.close()


def test_an_encoder_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    poor = make_encoder(tmp_path / "poor")
    weights = load_file(poor / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, poor / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"lacks the weights encoder\.layer\.1\.output\.dense\.weight"):
        make_worker(poor).load()


def test_an_encoder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would make one up that knows no words."""
    dumb = make_encoder(tmp_path / "dumb")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (dumb / name).unlink()
    with pytest.raises(ModelUnavailable, match="has no tokenizer files"):
        make_worker(dumb).load()


def test_an_option_for_models_that_generate_is_refused(model_dir: Path) -> None:
    with pytest.raises(InvalidParameter, match="cache_tokens is for models that generate, and 'tiny-bert' embeds") as caught:
        make_worker(model_dir, cache_tokens=10).load()
    assert caught.value.parameter == "cache_tokens"
