"""Models in sentence-transformers' layout: their vectors are those of SentenceTransformer.encode, alone and in any batch."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zmqserve import Client, EmbedParams
from zmqserve.backends import minilm
from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.named_models import path_of
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import ContextOverflow, InvalidParameter
from zmqserve.messages import Embed
from zmqserve.worker import WorkerConfig

from .fakes.tiny_bert import DIMENSIONS, add_layout, make_encoder
from .processes import Served, ServedController, zmqserve

NAME = minilm.MODEL.name
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]
pytest.importorskip("torch")

LOAD_S = 120.0
COSINE = 0.99999
NOISE = 1e-6
"""What the order of additions in float32 may change in the numbers of a vector of length 1: ten times what was measured."""
WORDS = ["dog", "fox", "hat", "über", "naïve", "日本語", "😀", "jumps", "small-words,", "(the)", "lazy", "model;", "12.5%", "then"]


def some_texts(count: int, longest: int, seed: int = 7) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def reference_of(directory: Path) -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(directory), device="cpu")


def make_worker(directory: Path | str, **options: Any) -> ModelWorker:
    worker = ModelWorker(WorkerConfig(model=str(directory)), device="cpu", threads=1, **options)
    worker.cards = worker.load()
    asyncio.run(vectors(worker, ["warm up"]))
    return worker


async def vectors(worker: ModelWorker, texts: list[str], **params: Any) -> Any:
    made = await worker.embed(Embed(1, worker.model_name, texts=texts, params=EmbedParams(**params)))
    return np.frombuffer(made.data, dtype="<f4").reshape(made.shape)


def embed(worker: ModelWorker, texts: list[str], **params: Any) -> Any:
    return asyncio.run(vectors(worker, texts, **params))


def least_cosine(found: Any, expected: Any) -> float:
    products = (found.astype(np.float64) * expected).sum(axis=1)
    return float((products / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)).min())


# --- the real model ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[ModelWorker]:
    worker = make_worker(NAME)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def encode() -> Any:
    return reference_of(minilm.MODEL.fetch()).encode


def test_the_real_model_alone_and_in_any_batch(real: ModelWorker, encode: Any, record_property: Any) -> None:
    texts = some_texts(60, 60)
    expected = np.stack([encode(text) for text in texts])
    alone = np.concatenate([embed(real, [text]) for text in texts])
    together = embed(real, texts)
    draw = random.Random(3)
    order = draw.sample(range(len(texts)), len(texts))

    async def mixed() -> Any:
        """Requests of 1 to 9 texts, all at once."""
        parts: list[list[int]] = []
        rest = order
        while rest:
            size = draw.randint(1, 9)
            parts, rest = [*parts, rest[:size]], rest[size:]
        return np.concatenate(await asyncio.gather(*(vectors(real, [texts[i] for i in part]) for part in parts)))

    in_any_order = asyncio.run(mixed())[np.argsort(order)]
    for found in (alone, together, in_any_order):
        assert least_cosine(found, expected) > COSINE
        record_property("largest difference", float(np.abs(found - expected).max()))
        assert np.abs(found - expected).max() < NOISE
        assert np.abs(found - alone).max() < NOISE


def test_the_real_models_options_are_those_of_sentence_transformers(real: ModelWorker, encode: Any) -> None:
    texts = some_texts(5, 20)
    assert least_cosine(embed(real, texts, dimensions=64), encode(texts, truncate_dim=64, normalize_embeddings=True)) > COSINE
    assert np.linalg.norm(embed(real, texts, dimensions=64), axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    raw = embed(real, texts, normalize=False)
    assert np.linalg.norm(raw, axis=1).min() > 1.1
    assert least_cosine(raw, encode(texts)) > COSINE


def test_the_real_models_bound_is_never_passed_in_silence(real: ModelWorker, encode: Any) -> None:
    text = " ".join(some_texts(1, 1)[:1] * 400)
    tokens = len(reference_of(minilm.MODEL.fetch()).tokenizer(text, truncation=False, verbose=False)["input_ids"])
    with pytest.raises(ContextOverflow) as caught:
        embed(real, [text])
    assert (caught.value.context_length, caught.value.tokens) == (256, tokens)
    assert least_cosine(embed(real, [text], truncate_tokens=256), encode([text])) > COSINE


def test_the_command_prints_where_the_model_lies(capsys: pytest.CaptureFixture[str]) -> None:
    assert minilm.MODEL.main() == 0
    directory = Path(capsys.readouterr().out.strip())
    assert (directory / "modules.json").is_file()
    assert path_of("all-minilm-l6-v2") == str(directory)
    assert path_of("sentence-transformers/all-MiniLM-L6-v2") == "sentence-transformers/all-MiniLM-L6-v2"


# --- other layouts, with random weights --------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        {"pooling": "mean", "normalize": False},
        {"pooling": "cls", "normalize": True},
        {"pooling": "max", "normalize": False, "general": {"prompts": {"passage": "about dog: "}, "default_prompt_name": "passage"}},
        {"pooling": "lasttoken", "normalize": True, "length": 12},
    ],
    ids=str,
)
def test_any_pooling_and_prompt_is_as_encode_does_it(tmp_path: Path, layout: dict[str, Any]) -> None:
    directory = add_layout(make_encoder(tmp_path / "tiny"), **layout)
    texts = ["a fox", "the quick brown fox", "dog", "a hat", "lazy dog"]
    reference = reference_of(directory)
    expected = reference.encode(texts)
    worker = make_worker(directory)
    try:
        assert worker.cards[0].context_length == layout.get("length", 40)
        assert np.abs(embed(worker, texts) - expected).max() < 1e-5
        raw = embed(worker, texts, normalize=False)
        assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1
        assert np.abs(embed(worker, texts, normalize=True) - reference.encode(texts, normalize_embeddings=True)).max() < 1e-5
        prompt = reference.prompts.get(reference.default_prompt_name or "", "")
        counted = sum(len(reference.tokenizer(prompt + text)["input_ids"]) for text in texts)
        assert asyncio.run(worker.embed(Embed(1, "tiny", texts=texts))).prompt_tokens == counted
    finally:
        worker.close()


def test_dimensions_that_the_model_is_cut_to_are_its_own(tmp_path: Path) -> None:
    directory = add_layout(make_encoder(tmp_path / "tiny"), normalize=False, general={"truncate_dim": 8})
    worker = make_worker(directory)
    try:
        assert worker.cards[0].embedding_dim == 8
        assert np.abs(embed(worker, ["a fox"]) - reference_of(directory).encode(["a fox"])).max() < 1e-5
        with pytest.raises(InvalidParameter, match="at most 8"):
            embed(worker, ["a fox"], dimensions=DIMENSIONS)
    finally:
        worker.close()


def test_a_pipeline_that_is_not_a_text_encoders_is_refused(tmp_path: Path) -> None:
    directory = add_layout(make_encoder(tmp_path / "tiny"))
    (directory / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])
    )
    with pytest.raises(ModelUnavailable, match="begins with a Pooling: of sentence-transformers' models only text encoders"):
        make_worker(directory)


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    made = make_encoder(tmp_path / "plain")
    prints = {make_worker_and_close(made)}
    prints.add(make_worker_and_close(add_layout(made)))
    prints.add(make_worker_and_close(add_layout(make_encoder(tmp_path / "cls"), pooling="cls")))
    prints.add(make_worker_and_close(add_layout(make_encoder(tmp_path / "raw"), normalize=False)))
    assert len(prints) == 4
    assert make_worker_and_close(made) in prints


def make_worker_and_close(directory: Path) -> str:
    worker = make_worker(directory)
    worker.close()
    return str(worker.cards[0].fingerprint)


def test_without_sentence_transformers_one_sentence_names_the_extra(tmp_path: Path) -> None:
    directory = add_layout(make_encoder(tmp_path / "tiny"))
    code = (
        "import sys; sys.modules['sentence_transformers'] = None\n"
        "from zmqserve.backends.transformers_worker import ModelWorker\nfrom zmqserve.worker import WorkerConfig\n"
        f"try: ModelWorker(WorkerConfig(model={str(directory)!r}), device='cpu').load()\nexcept Exception as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=LOAD_S, check=True)
    assert (
        'the transformers backend needs sentence_transformers, which is not installed: pip install "zmqserve[transformers]"' in done.stdout
    )


# --- through the network -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A controller process and a worker process with the real model."""
    minilm.MODEL.fetch()
    with ServedController() as controller:
        arguments = ("--model", NAME, "--device", "cpu", "--threads", "1", "--worker-name", "w", "--controller", controller.workers)
        with Served("worker", "transformers", *arguments):
            controller.wait_ready("w", LOAD_S)
            yield controller.clients


def test_a_hundred_concurrent_requests_get_each_its_own_vectors(endpoint: str, encode: Any) -> None:
    texts = some_texts(260, 25, seed=11)
    expected = np.stack([encode(text) for text in texts])
    draw = random.Random(5)
    parts = [draw.sample(range(len(texts)), draw.choice([1, 1, 1, 2, 7])) for _ in range(100)]
    with Client(endpoint) as client, ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda part: client.embed(NAME, [texts[i] for i in part], timeout_s=LOAD_S), parts))
        card = client.model_details(NAME)
    for part, rows in zip(parts, found, strict=True):
        assert rows.dtype == np.float32
        assert least_cosine(rows, expected[part]) > COSINE
        assert np.abs(rows - expected[part]).max() < NOISE
    assert (card.embedding_dim, card.context_length, card.verbs) == (384, 256, ["embed", "count_tokens", "model_details"])


def test_errors_are_typed_and_the_worker_goes_on(endpoint: str) -> None:
    with Client(endpoint) as client:
        with pytest.raises(InvalidParameter, match=r"at most 384.*got 385") as caught:
            client.embed(NAME, ["a"], dimensions=385)
        assert caught.value.parameter == "dimensions"
        with pytest.raises(ContextOverflow, match=r"302 tokens.*256"):
            client.embed(NAME, ["fine", "a " * 300])
        assert client.embed(NAME, ["a " * 300], truncate_tokens=256, dimensions=10).shape == (1, 10)
        assert client.count_tokens(NAME, "a " * 300) == 302


def test_the_command_prints_vectors(endpoint: str, encode: Any) -> None:
    done = zmqserve("embed", NAME, "a dog", "日本語", "--controller", endpoint)
    assert done.returncode == 0, done.stderr
    printed = np.array([json.loads(line) for line in done.stdout.splitlines()])
    assert printed.shape == (2, 384)
    assert np.abs(printed - encode(["a dog", "日本語"])).max() < NOISE
