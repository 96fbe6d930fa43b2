"""Vectors from a pooling model that vLLM serves."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from itertools import count
from typing import TYPE_CHECKING, Any

from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter
from zmqserve.jobs import Vectors
from zmqserve.params import EmbedParams

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_names = count(1)


async def embed(engine: Any, texts: list[list[int]], params: EmbedParams, lora: Any = None) -> Vectors:
    """One vector for each of `texts`, which are ids. vLLM batches them among all that it does.

    `normalize` None: as the model's pooler says. Cut vectors are brought to length 1 again, unless `normalize` is false.
    Raises InvalidParameter for more dimensions than the model has.
    """
    import numpy as np
    from vllm import PoolingParams

    cut = params.dimensions
    # Cut first, then normalise: so vLLM must not do the second.
    activation = False if cut is not None else params.normalize
    pooling = PoolingParams(task="embed", use_activation=activation)
    try:
        # One that fails ends the others: nobody wants them then.
        async with asyncio.TaskGroup() as group:
            rows = [group.create_task(_pooled(engine, ids, pooling.clone(), lora)) for ids in texts]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    matrix = np.stack([row.result() for row in rows])
    if cut is not None:
        if cut > matrix.shape[1]:
            text = f"dimensions must be at most {matrix.shape[1]}, the model's own; got {cut}"
            raise InvalidParameter(text, data={"parameter": "dimensions"})
        matrix = matrix[:, :cut]
        if params.normalize is not False:
            matrix = matrix / np.linalg.norm(matrix, axis=1, keepdims=True)
    return Vectors(matrix.astype("<f4").tobytes(), (len(texts), matrix.shape[1]), sum(map(len, texts)))


def check_length(ids: list[int], context_length: int) -> list[int]:
    """`ids`, if the model takes so many; ContextOverflow otherwise."""
    if len(ids) > context_length:
        message = f"a text has {len(ids)} tokens, over the model's context of {context_length} tokens: cut it, or set truncate_tokens"
        raise ContextOverflow(message, data={"context_length": context_length, "tokens": len(ids)})
    return ids


async def _pooled(engine: Any, ids: list[int], params: Any, lora: Any) -> NDArray[np.float32]:
    async with aclosing(
        engine.encode({"type": "token", "prompt_token_ids": ids}, params, f"embed-{next(_names)}", lora_request=lora)
    ) as outputs:
        async for output in outputs:
            if output.finished:
                vector: NDArray[np.float32] = output.outputs.data.float().numpy().reshape(-1)
                return vector
    raise BackendError("vLLM gave no vector for a text")
