"""Vectors of hosted models: in order, as the options say, or an error."""

from __future__ import annotations

import asyncio

import pytest

from zmqserve import WorkerConfig
from zmqserve.backends.huggingface_api_worker import HuggingfaceApiWorker
from zmqserve.errors import InvalidParameter, Unsupported, UpstreamError
from zmqserve.messages import Embed
from zmqserve.params import EmbedParams

from .fakes.hosted import hosted, serving
from .fakes.upstream import Exchange, FakeUpstream

np = pytest.importorskip("numpy")
pytest.importorskip("huggingface_hub")


async def embed(exchange: Exchange) -> None:
    await exchange.respond(200, [[float(len(text)), 3.0, 4.0] for text in exchange.body["inputs"]])


def test_vectors_come_in_order_and_in_batches() -> None:
    texts = ["x" * (k + 1) for k in range(70)]
    with FakeUpstream(embed) as upstream, serving(hosted(upstream.url + "/embed", api="feature_extraction")) as client:
        vectors = client.embed("m", texts)
        assert (vectors.shape, vectors.dtype) == ((70, 3), np.float32)
        assert vectors[:, 0].tolist() == [float(k + 1) for k in range(70)]
        assert [len(each.body["inputs"]) for each in upstream.seen] == [32, 32, 6]
        assert upstream.seen[0].target == "/embed"
        assert upstream.seen[0].body["truncate"] is False


def test_embedding_options_are_acted_on_or_refused() -> None:
    with FakeUpstream(embed) as upstream, serving(hosted(upstream.url, api="feature_extraction")) as client:
        assert np.allclose(np.linalg.norm(client.embed("m", ["a"], normalize=True), axis=1), 1)
        client.embed("m", ["a"], normalize=False)
        assert [each.body.get("normalize") for each in upstream.seen] == [True, False]
        assert client.embed("m", ["ab"], dimensions=2).tolist() == [[2.0, 3.0]]
        assert np.allclose(client.embed("m", ["ab"], params=EmbedParams(dimensions=2, normalize=True)), [[2 / 13**0.5, 3 / 13**0.5]])
        with pytest.raises(InvalidParameter, match=r"at most 3.*got 4"):
            client.embed("m", ["a"], dimensions=4)
        with pytest.raises(Unsupported, match="truncate_tokens"):
            client.embed("m", ["a"], truncate_tokens=4)


@pytest.mark.parametrize("path", ["", "/v1", "/v1/embeddings"])
def test_openais_embeddings_are_asked_for_too(path: str) -> None:
    async def handle(exchange: Exchange) -> None:
        rows = [{"index": k, "embedding": [float(len(text)), 1.0]} for k, text in enumerate(exchange.body["input"])]
        await exchange.respond(200, {"data": rows[::-1], "usage": {"prompt_tokens": 2 * len(rows), "total_tokens": 0}})

    model = {"api": "feature_extraction", "server": "openai", "model": "org/e"}
    with FakeUpstream(handle) as upstream, serving(hosted(upstream.url + path, **model)) as client:
        assert client.embed("m", ["x" * (k + 1) for k in range(40)])[:, 0].tolist() == [float(k + 1) for k in range(40)]
        assert [len(each.body["input"]) for each in upstream.seen] == [32, 8]
        asked = upstream.seen[0]
        assert (asked.target, asked.body["model"], "authorization" in asked.headers) == ("/v1/embeddings", "org/e", False)
        with pytest.raises(Unsupported, match="normalize"):
            client.embed("m", ["a"], normalize=False)


@pytest.mark.parametrize(
    "body", [[[1.0], [2.0, 3.0]], [[[1.0]], [[2.0]]], [[1.0]], [], ["a", "b"], {"a": 1}, [[1.0], [float("nan")]], b"[1"]
)
def test_vectors_that_are_none_are_an_error(body: object) -> None:
    async def handle(exchange: Exchange) -> None:
        await exchange.respond(200, body)

    with FakeUpstream(handle) as upstream, serving(hosted(upstream.url, api="feature_extraction")) as client:
        with pytest.raises(UpstreamError):
            client.embed("m", ["a", "b"])


def test_usage_is_what_the_upstream_counts() -> None:
    async def handle(exchange: Exchange) -> None:
        rows = [{"index": k, "embedding": [1.0]} for k in range(len(exchange.body["input"]))]
        await exchange.respond(200, {"data": rows, "usage": {"prompt_tokens": 2 * len(rows)}})

    with FakeUpstream(handle, embed) as upstream:
        worker = HuggingfaceApiWorker(
            WorkerConfig(),
            [hosted(upstream.url, api="feature_extraction", server="openai"), hosted(upstream.url, api="feature_extraction", name="tei")],
        )
        worker.load()

        async def used() -> list[int]:
            return [(await worker.embed(Embed(1, name, texts=texts))).prompt_tokens for name, texts in (("m", ["a"] * 20), ("tei", ["a"]))]

        assert asyncio.run(used()) == [40, 0]
