"""A backend of one's own: it answers with the prompt in capitals, word by word."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from typing import Self

from zmqserve import BaseModelWorker, Delta, GenerateJob, ModelCard, WorkerConfig


class ShoutWorker(BaseModelWorker):
    backend = "shout"
    honours = frozenset({"max_tokens"})  # any other parameter is refused by name

    def __init__(self, config: WorkerConfig, pause_s: float = 0.0) -> None:
        super().__init__(config)
        self.pause_s = pause_s

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument("--pause", type=float, default=0.0, metavar="S", help="seconds before each word")

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        return cls(config, args.pause)

    def load(self) -> list[ModelCard]:
        return [ModelCard(self.model_name, context_length=0)]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        words = (job.request.prompt or "").upper().split()
        wanted = words[: job.request.params.max_tokens]
        job.prompt_tokens = len(words)
        for number, word in enumerate(wanted):
            await asyncio.sleep(self.pause_s)
            reason = None if number + 1 < len(wanted) else "length" if len(wanted) < len(words) else "stop"
            yield Delta(word + " ", (number,), finish_reason=reason)
