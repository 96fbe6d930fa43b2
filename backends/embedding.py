"""What ModelWorker does with an embedding model: texts become tokens on one thread, batches become vectors on another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter, Unsupported
from zmqserve.jobs import Vectors
from zmqserve.messages import CountTokens, Embed, ModelCard
from zmqserve.params import EmbedParams

from .embedding_loop import EmbeddingLoop, Matrix
from .text_bound import text_bound

if TYPE_CHECKING:
    from .embedding_model import EmbeddingModel, Row

DEFAULT_SLOTS = 64
"""A slot costs no memory of its own here, and the texts of all requests in slots share batches."""

CPU_BATCH = {"batch_tokens": 1024, "padding_tokens": 64}
"""A CPU gains nothing from larger batches, and padding costs as much as text."""
GPU_BATCH = {"batch_tokens": 16384, "padding_tokens": 4096}
"""A GPU is idle with less, and so little padding costs less than one more pass."""

PROBE = "a"
"""What any model that runs makes a vector of."""

PIECE = 256
"""How many texts become tokens in one go: other requests' turn comes between."""


class Embedder:
    """Answers `embed` and `count_tokens` with `model`, on an event loop. Close it at the end.

    `on_death`: what to call, from another thread, if the model runs no more; what is asked then gets no answer.
    """

    def __init__(self, model: EmbeddingModel, name: str, *, on_death: Callable[[Exception], object]) -> None:
        self._model = model
        self._bound = text_bound(model.tokenizer, model.context_length)
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{name} tokenizer")
        batches = CPU_BATCH if model.device.type == "cpu" else GPU_BATCH
        self._loop = EmbeddingLoop(f"{name} embeddings", model, model.rows([PROBE]), **batches)
        self._loop.on_death = on_death
        self._loop.start()

    def card(self, name: str, source: str) -> ModelCard:
        """What is served."""
        model = self._model
        return ModelCard(
            name,
            fingerprint=model.fingerprint,
            context_length=model.context_length,
            verbs=["embed", "count_tokens", "model_details"],
            embedding_dim=model.dimensions,
            source=source,
        )

    async def embed(self, request: Embed) -> Vectors:
        """One vector per text. `dimensions` cuts it before it is normalised; `normalize` None is as the model does.

        `truncate_tokens` cuts each text to so many tokens, special tokens included, as the model's own bound counts them. A text that is
        still longer than the context is a ContextOverflow.
        """
        params = request.params
        own = self._model.dimensions
        if params.dimensions is not None and params.dimensions > own:
            why = f"dimensions must be at most {own}, the model's own; got {params.dimensions}"
            raise InvalidParameter(why, data={"parameter": "dimensions", "value": params.dimensions, "embedding_dim": own})
        if params.truncate_tokens is None:
            for position, text in enumerate(request.texts):
                self._bound.check(text, f"texts[{position}]", position=position)
        rows: list[Row] = []
        for start in range(0, len(request.texts), PIECE):
            rows += await self._tokenized(request.texts[start : start + PIECE], params.truncate_tokens)
            self._check(rows, start)
        tokens = sum(row.length for row in rows)
        return await self._loop.embed(rows, lambda vectors: self._finished(vectors, params, tokens))

    async def count_tokens(self, request: CountTokens) -> int:
        """Tokens of the prompt, special tokens included. ContextOverflow for one that cannot fit: it would keep others waiting."""
        if request.prompt is None:
            raise Unsupported("an embedding model has no chat template: send a prompt", data={"parameter": "messages"})
        self._bound.check(request.prompt, "a prompt")
        (row,) = await self._tokenized([request.prompt], None)
        return row.length

    def step_age_s(self) -> float:
        """Seconds since the last batch ended; 0 when there is nothing to do."""
        return self._loop.age_s()

    def waiting(self) -> int:
        """Requests of which no text was in a batch yet. From any thread."""
        return self._loop.waiting()

    def close(self) -> None:
        """End both threads."""
        self._loop.close()
        self._tokenizing.shutdown(cancel_futures=True)

    async def _tokenized(self, texts: list[str], truncate_tokens: int | None) -> list[Row]:
        return await asyncio.get_running_loop().run_in_executor(self._tokenizing, self._model.rows, texts, truncate_tokens)

    def _check(self, rows: list[Row], start: int) -> None:
        """Refuse what the model cannot read, from `start` on. Never is a text cut in silence."""
        bound = self._model.context_length
        for position in range(start, len(rows)):
            tokens = rows[position].length
            if not tokens:
                raise InvalidParameter(f"texts[{position}] has no tokens: there is nothing to embed", data={"parameter": "texts"})
            if bound and tokens > bound:
                why = f"texts[{position}] has {tokens} tokens, over the model's context of {bound}: truncate_tokens={bound} would cut it"
                raise ContextOverflow(why, data={"context_length": bound, "tokens": tokens, "position": position})

    # --- on the model's thread --------------------------------------------------------------------

    def _finished(self, vectors: Matrix, params: EmbedParams, tokens: int) -> Vectors:
        vectors = vectors[:, : params.dimensions]
        finite = np.isfinite(vectors).all(axis=1)
        if not finite.all():
            raise BackendError(f"the model's vector of texts[{int(finite.argmin())}] is not finite: another dtype may help")
        if self._model.normalizes if params.normalize is None else params.normalize:
            vectors = normalized(vectors)
        return Vectors(vectors.astype("<f4").tobytes(), (vectors.shape[0], vectors.shape[1]), tokens)


def normalized(vectors: Matrix) -> Matrix:
    """Each row to length 1; a row of zeros stays one. As torch.nn.functional.normalize does."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Matrix = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled
