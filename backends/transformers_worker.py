"""ModelWorker: a causal language model on this machine's CPU or GPU, run with transformers.

A request's way: its prompt becomes ids on a thread of its own (tokenizers are not for several at once), a Generation holds
its state, the StepLoop's thread makes its tokens in turn with those of others, and deltas come back to the event loop.
torch and transformers are imported by `load`, which says so if they are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.logs import Logger
from zmqserve.messages import CountTokens, Generate, ModelCard, unpack_ids
from zmqserve.worker import BaseModelWorker, WorkerConfig

from . import smollm2
from .model_errors import missing_libraries
from .step_loop import StepLoop

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .generation import Generation

log = Logger("zmqserve.transformers")


class ModelWorker(BaseModelWorker):
    """Serves `config.model`: ``smollm2-135m``, a local checkpoint directory, or an id on the Hugging Face Hub.

    device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``, ``cuda:1``. dtype: ``auto`` (bfloat16 on CUDA, float32 on CPU: greedy
    answers repeat), ``float32``, ``bfloat16``, ``float16``. revision: of a model on the Hub. trust_remote_code: run code that
    comes with the model. threads: of torch, for the whole process; None: all cores but one, or ``OMP_NUM_THREADS``. They spin
    while they wait, so replicas on one machine must share its cores: with too many threads all of them crawl.
    """

    backend: ClassVar[str] = "transformers"
    resumes: ClassVar[Mapping[str, str]] = {"sampling": "approximate"}
    honours: ClassVar[frozenset[str]] = frozenset(
        {
            "echo",
            "ignore_eos",
            "max_tokens",
            "min_p",
            "min_tokens",
            "repetition_penalty",
            "seed",
            "skip_special_tokens",
            "stop",
            "stop_token_ids",
            "temperature",
            "token_ids",
            "top_k",
            "top_p",
        }
    )

    def __init__(
        self,
        config: WorkerConfig,
        *,
        device: str = "auto",
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        threads: int | None = None,
    ) -> None:
        if not config.model:
            raise InvalidParameter("model is empty: give smollm2-135m, a directory or a Hugging Face id", data={"parameter": "model"})
        if threads is not None and threads < 1:
            raise InvalidParameter(f"threads must be an integer >= 1, got {threads!r}", data={"parameter": "threads"})
        super().__init__(config)
        self._device = device
        self._dtype = dtype
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._threads = threads
        self._checkpoint: Checkpoint | None = None
        self._steps: StepLoop | None = None
        self._tokenizing: ThreadPoolExecutor | None = None

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default auto: CUDA if there is any)")
        parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default auto: bfloat16 on CUDA, else float32)")
        parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hugging Face Hub")
        parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
        parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or all cores but one)")

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        return cls(
            config,
            device=args.device,
            dtype=args.dtype,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            threads=args.threads,
        )

    @property
    def model_name(self) -> str:
        """The name that clients use: `config.served_name`, or the last part of the path or id."""
        return self.config.served_name or Path(self.config.model).expanduser().resolve().name

    def load(self) -> list[ModelCard]:
        try:
            import torch

            from . import checkpoint
        except ImportError as error:
            raise missing_libraries(error) from error
        threads = self._threads or _spare_threads()
        if threads:
            torch.set_num_threads(threads)
        source = smollm2.path_of(self.config.model, say=log.info)
        loaded = checkpoint.load(
            source, device=self._device, dtype=self._dtype, revision=self._revision, trust_remote_code=self._trust_remote_code
        )
        loaded.warm_up()
        fingerprint = loaded.fingerprint()
        self._checkpoint = loaded
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name} tokenizer")
        self._steps = StepLoop(f"{self.name} steps")
        self._steps.start()
        log.info("loaded", model=self.model_name, device=str(loaded.device), dtype=str(loaded.model.dtype), threads=torch.get_num_threads())
        # The same ids taken in other pieces give logits with other last bits. In float32 these decide nothing but ties.
        repeats = loaded.model.dtype == torch.float32
        chat = ["chat"] if loaded.tokenizer.chat_template else []
        return [
            ModelCard(
                self.model_name,
                fingerprint=fingerprint,
                context_length=loaded.context_length,
                verbs=["generate", *chat, "count_tokens", "model_details"],
                source=self.config.model,
                resume={} if repeats else {"greedy": "approximate", "seed": "approximate"},
            )
        ]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        _, tokenizing, steps = self._loaded_parts()
        generation = await asyncio.get_running_loop().run_in_executor(tokenizing, self._prepare, job)
        stream = steps.open(generation)
        try:
            while True:
                delta = await stream.next()
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            stream.cancel()

    async def count_tokens(self, request: CountTokens) -> int:
        _, tokenizing, _ = self._loaded_parts()
        return len(await asyncio.get_running_loop().run_in_executor(tokenizing, self._encode, request))

    def step_age_s(self) -> float:
        return self._steps.age_s() if self._steps is not None else 0.0

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        if self._tokenizing is not None:
            self._tokenizing.shutdown(cancel_futures=True)
        self._checkpoint = None

    def _loaded_parts(self) -> tuple[Checkpoint, ThreadPoolExecutor, StepLoop]:
        if self._checkpoint is None or self._tokenizing is None or self._steps is None:
            raise BackendError(f"model {self.model_name!r} is not loaded")
        return self._checkpoint, self._tokenizing, self._steps

    # --- on the tokenizer's thread ----------------------------------------------------------------

    def _prepare(self, job: GenerateJob) -> Generation:
        from .generation import Generation

        checkpoint, _, _ = self._loaded_parts()
        request, params = job.request, job.request.params
        resume = request.resume
        if resume is not None:
            self._known(resume.token_ids, "resume.token_ids")
        prompt = self._encode(request)
        job.prompt_tokens = len(prompt)
        max_tokens = _room(len(prompt), params.max_tokens, checkpoint.context_length)
        echo = ""
        if params.echo:
            skipped = checkpoint.special_ids if params.skip_special_tokens else ()
            echo = request.prompt or checkpoint.decode([i for i in prompt if i not in skipped])
        return Generation(checkpoint, prompt, params, max_tokens, echo=echo, resume=resume)

    def _encode(self, request: Generate | CountTokens) -> list[int]:
        """The prompt's ids, with the special tokens or the chat template that the model expects."""
        checkpoint, _, _ = self._loaded_parts()
        if isinstance(request, Generate):
            if request.resume is not None and request.resume.prompt_token_ids is not None:
                return self._known(request.resume.prompt_token_ids, "resume.prompt_token_ids")
            if request.token_ids is not None:
                return self._known(request.token_ids, "token_ids")
        if request.messages is not None:
            ids = checkpoint.encode_chat([{"role": turn.role, "content": turn.content} for turn in request.messages])
        else:
            ids = checkpoint.encode(request.prompt or "")
        if not ids:
            raise InvalidParameter("the prompt has no tokens: there is nothing to answer", data={"parameter": "prompt"})
        return ids

    def _known(self, packed: bytes, name: str) -> list[int]:
        """Ids that the model knows; InvalidParameter, which names the field, for others."""
        checkpoint, _, _ = self._loaded_parts()
        ids = unpack_ids(packed)
        if max(ids, default=0) >= checkpoint.embeddings:
            message = f"{name} holds {max(ids)}, but the model's ids end at {checkpoint.embeddings - 1}"
            raise InvalidParameter(message, data={"parameter": name})
        return ids


def _spare_threads() -> int | None:
    """All cores but one, which the sockets, the event loop and the heartbeats need. None: what the environment says."""
    return None if os.environ.get("OMP_NUM_THREADS") else max(1, len(os.sched_getaffinity(0)) - 1)


def _room(prompt: int, wanted: int | None, context_length: int) -> int | None:
    """How many tokens the answer may have at most: what was asked for, or all that the context leaves. Never less in silence."""
    if not context_length:
        return wanted
    needed = prompt + (wanted or 1)
    if needed > context_length:
        answer = f"max_tokens {wanted}" if wanted else "an answer of at least 1"
        message = f"the prompt's {prompt} tokens and {answer} make {needed}, over the model's context of {context_length} tokens"
        raise ContextOverflow(message, data={"context_length": context_length, "tokens": needed})
    return wanted or context_length - prompt
