"""A model worker for FastChat without a model, run by FastChat's own Python: FastChat's app serves what this makes.

    PYTHON -I fastchat_worker.py CONTROLLER_URL PORT

Each piece is a token alone, where a real worker of FastChat sends the whole text so far each time.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any

import uvicorn
from fastchat.serve import base_model_worker

TEXT = "x" * 20


class Worker(base_model_worker.BaseModelWorker):  # type: ignore[misc]
    """Answers at once."""

    def make_conv_template(self, *_arguments: Any) -> Any:
        """A fixed one: the model adapters would need torch."""
        from fastchat.conversation import get_conv_template

        return get_conv_template("one_shot")

    async def generate_stream_gate(self, params: dict[str, Any]) -> Any:
        """As many tokens as the prompt says, at its pace if it has one."""
        _kind, _streams, tokens, rate = params["prompt"].split()
        began_s, pace = time.monotonic(), float(rate)
        for k in range(int(tokens)):
            text = TEXT
            if pace and k:
                await asyncio.sleep(began_s + k / pace - time.monotonic())
                text = f"{time.monotonic():020.9f}"
            yield json.dumps({"text": text, "error_code": 0, "usage": {"completion_tokens": k + 1}}).encode() + b"\0"

    def get_embeddings(self, params: dict[str, Any]) -> dict[str, Any]:
        """Vectors that are ready."""
        return {"embedding": VECTORS[: len(params["input"])], "token_num": len(params["input"])}


VECTORS = [[random.random() for _ in range(384)] for _ in range(32)]

if __name__ == "__main__":
    controller, port = sys.argv[1], int(sys.argv[2])
    worker = Worker(controller, f"http://127.0.0.1:{port}", "bench", "bench", ["bench"], 1024)
    worker.init_heart_beat()
    uvicorn.run(base_model_worker.app, host="127.0.0.1", port=port, log_level="critical", access_log=False)
