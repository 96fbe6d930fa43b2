"""ModelWorker: a causal language model or an embedding model on this machine's CPU or GPU, run with transformers.

What is loaded answers through a TextGenerator or an Embedder. torch and transformers are imported by `load`, which says so if they
are missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

from zmqserve.answers import Job
from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.jobs import Vectors
from zmqserve.logs import Logger
from zmqserve.messages import CountTokens, Embed, ModelCard
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .adapters import check_adapters, parse_adapters
from .load_options import LoadOptions
from .model_errors import missing_libraries
from .named_models import path_of

if TYPE_CHECKING:
    from .checkpoint import Checkpoint
    from .embedding import Embedder
    from .loaded_model import LoadedModel
    from .text_generator import TextGenerator

log = Logger("zmqserve.transformers")


class ModelWorker(BaseModelWorker):
    """Serves `config.model`: ``smollm2-135m``, ``all-minilm-l6-v2``, a local checkpoint directory, or an id on the Hugging Face Hub.

    A text encoder, or what has sentence-transformers' layout, embeds (see embedding.py); a causal language model generates.

    device: ``auto`` (CUDA if there is any), ``cpu``, ``cuda``, ``cuda:1``. dtype: ``auto`` (bfloat16 on CUDA, float32 on CPU: greedy
    answers repeat), ``float32``, ``bfloat16``, ``float16``. attention: transformers' name of an implementation (``sdpa``, ``eager``,
    ``flash_attention_2``). lora: directories of adapters by the names under which they are served, beside the model and at the
    same time; each has a cache of its own. cache_tokens: what all requests of a model in progress may have together, prompts and
    answers; None: a whole context, and something for each slot, if the memory allows. revision: of a model on the Hub.
    trust_remote_code: run code that comes with the model. threads: of torch, for the whole process; None: all cores but one, or
    ``OMP_NUM_THREADS``. They spin while they wait, so replicas on one machine must share its cores: with too many threads all of
    them crawl.
    """

    backend: ClassVar[str] = "transformers"
    default_slots: ClassVar[int] = 16
    resumes: ClassVar[Mapping[str, str]] = {"sampling": "approximate"}
    honours: ClassVar[frozenset[str]] = frozenset(
        {
            "dimensions",
            "echo",
            "frequency_penalty",
            "guided",
            "ignore_eos",
            "logprobs",
            "max_tokens",
            "min_p",
            "min_tokens",
            "n",
            "normalize",
            "presence_penalty",
            "repetition_penalty",
            "seed",
            "skip_special_tokens",
            "stop",
            "stop_token_ids",
            "temperature",
            "token_ids",
            "top_k",
            "top_p",
            "truncate_tokens",
        }
    )

    def __init__(
        self,
        config: WorkerConfig,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str | None = None,
        lora: Mapping[str, str] | None = None,
        cache_tokens: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        threads: int | None = None,
    ) -> None:
        if not config.model:
            raise InvalidParameter("model is empty: give smollm2-135m, a directory or a Hugging Face id", data={"parameter": "model"})
        for name, value in (("threads", threads), ("cache_tokens", cache_tokens)):
            if value is not None and value < 1:
                raise InvalidParameter(f"{name} must be an integer >= 1, got {value!r}", data={"parameter": name})
        super().__init__(config)
        self._options = LoadOptions(device, dtype, attention, revision, trust_remote_code)
        self._lora = dict(lora or {})
        self._cache_tokens = cache_tokens
        self._threads = threads
        self._models: dict[str, LoadedModel] = {}
        # One of these, once it is loaded.
        self._generator: TextGenerator | None = None
        self._embedder: Embedder | None = None

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default auto: CUDA if there is any)")
        parser.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default auto: bfloat16 on CUDA, else float32)")
        parser.add_argument("--attention", metavar="NAME", help="sdpa, eager, flash_attention_2 ... (default: the library's choice)")
        parser.add_argument("--lora", action="append", default=[], metavar="NAME=PATH", help="serve this adapter too; may be repeated")
        parser.add_argument(
            "--cache-tokens", type=int, metavar="N", help="of all running requests together (default: by context and memory)"
        )
        parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the Hugging Face Hub")
        parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")
        parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: OMP_NUM_THREADS, or all cores but one)")

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        return cls(
            config,
            device=args.device,
            dtype=args.dtype,
            attention=args.attention,
            lora=parse_adapters(args.lora),
            cache_tokens=args.cache_tokens,
            revision=args.revision,
            trust_remote_code=args.trust_remote_code,
            threads=args.threads,
        )

    @cached_property
    def model_name(self) -> str:
        """The name that clients use: `config.served_name`, or the last part of the path or id."""
        return self.config.served_name or os.path.basename(os.path.abspath(os.path.expanduser(self.config.model)))

    def load(self) -> list[ModelCard]:
        check_adapters(self._lora, self.model_name)
        try:
            return self._load_model()
        except ImportError as error:
            raise missing_libraries(error) from error

    def _load_model(self) -> list[ModelCard]:
        import torch

        from . import embedding_model

        threads = self._threads or _spare_threads()
        if threads:
            torch.set_num_threads(threads)
        source = path_of(self.config.model, say=log.info)
        if embedding_model.embeds(source, self._options):
            return [self._load_embedder(source)]
        return self._load_generator(source)

    def _load_generator(self, source: str) -> list[ModelCard]:
        """The model and its adapters, each with an engine of its own."""
        import torch

        from . import checkpoint, lora_model, text_generator

        base = checkpoint.load(source, self._options)
        base.warm_up()
        checkpoints = {self.model_name: base}
        for name, path in self._lora.items():
            checkpoints[name] = lora_model.with_adapter(base, name, path)
        sources = {self.model_name: self.config.model, **self._lora}
        try:
            self._start_engines(checkpoints)
            cards = [model.card(sources[name]) for name, model in self._models.items()]
        except BaseException:
            self.close()
            raise
        self._generator = text_generator.TextGenerator(self._models, self.name)
        log.info("loaded", model=self.model_name, device=str(base.device), dtype=str(base.model.dtype), threads=torch.get_num_threads())
        return cards

    def _start_engines(self, checkpoints: Mapping[str, Checkpoint]) -> None:
        """One after the other: each takes its share of the memory that is left."""
        from . import loaded_model

        for name, each in checkpoints.items():
            self._models[name] = model = loaded_model.start_model(
                name, each, slots=self.slots, cache_tokens=self._cache_tokens, engines=len(checkpoints) - len(self._models)
            )
            model.engine.on_death = self._fail

    def _load_embedder(self, source: str) -> ModelCard:
        from . import embedding, embedding_model

        given = [name for name, value in (("lora", self._lora), ("cache_tokens", self._cache_tokens)) if value]
        if given:
            raise InvalidParameter(f"{given[0]} is for models that generate, and {self.model_name!r} embeds", data={"parameter": given[0]})
        loaded = embedding_model.load(source, self._options)
        self._embedder = embedding.Embedder(loaded, self.name, on_death=self._fail)
        self.slots = self.config.slots or embedding.DEFAULT_SLOTS
        log.info("loaded", model=self.model_name, device=str(loaded.device), dimensions=loaded.dimensions)
        return self._embedder.card(self.model_name, self.config.model)

    def begin(self, job: Job) -> None:
        """Without a task per request: what a step made of all of them is emitted in one turn of the event loop."""
        if self._generator is None:
            raise self._unsupported("generate")
        self._generator.begin(job)

    def abandon(self, job: Job) -> None:
        if self._generator is not None:
            self._generator.abandon(job)

    async def embed(self, request: Embed) -> Vectors:
        if self._embedder is None:
            raise self._unsupported("embed")
        return await self._embedder.embed(request)

    async def count_tokens(self, request: CountTokens) -> int:
        serves = self._serves
        if serves is None:
            raise BackendError(f"model {request.model!r} is not loaded")
        return await serves.count_tokens(request)

    def step_age_s(self) -> float:
        return 0.0 if self._serves is None else self._serves.step_age_s()

    def waiting(self) -> int:
        return 0 if self._serves is None else self._serves.waiting()

    def close(self) -> None:
        if self._serves is not None:
            self._serves.close()
        for model in self._models.values():
            model.engine.close()
        self._models.clear()

    @property
    def _serves(self) -> TextGenerator | Embedder | None:
        return self._embedder or self._generator


def _spare_threads() -> int | None:
    """All cores but one, which the sockets, the event loop and the heartbeats need. None: what the environment says."""
    return None if os.environ.get("OMP_NUM_THREADS") else max(1, len(os.sched_getaffinity(0)) - 1)
