"""ModelWorker: a causal language model or an embedding model on this machine's CPU or GPU, run with transformers.

A request's way: its prompt becomes ids on a thread of its own (tokenizers are not for several at once), a Generation holds its
state, an engine's thread makes its tokens together with those of others, and on the event loop they become text and leave.
torch and transformers are imported by `load`, which says so if they are missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self

from zmqserve.answers import Job
from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.logs import Logger
from zmqserve.messages import CountTokens, Embed, ModelCard
from zmqserve.worker import BaseModelWorker, WorkerConfig

from . import minilm, smollm2
from .adapters import check_adapters, parse_adapters
from .model_errors import missing_libraries

if TYPE_CHECKING:
    from .embedding import Embedder
    from .generation import Generation
    from .loaded_model import LoadedModel

CONGESTED_WAIT_S = 0.01
"""When to look again, while a job's controller takes less than is made."""

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
        self._device = device
        self._dtype = dtype
        self._attention = attention
        self._lora = dict(lora or {})
        self._cache_tokens = cache_tokens
        self._revision = revision
        self._trust_remote_code = trust_remote_code
        self._threads = threads
        self._models: dict[str, LoadedModel] = {}
        self._tokenizing: ThreadPoolExecutor | None = None
        self._embedder: Embedder | None = None
        # None: its prompt is still being made into ids.
        self._generations: dict[Job, Generation | None] = {}
        self._paused: dict[Job, Generation] = {}
        self._looking: asyncio.TimerHandle | None = None

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

    @property
    def model_name(self) -> str:
        """The name that clients use: `config.served_name`, or the last part of the path or id."""
        return self.config.served_name or os.path.basename(os.path.abspath(os.path.expanduser(self.config.model)))

    def load(self) -> list[ModelCard]:
        check_adapters(self._lora, self.model_name)
        try:
            import torch

            from . import checkpoint, embedding_model, loaded_model, lora_model
        except ImportError as error:
            raise missing_libraries(error) from error
        threads = self._threads or _spare_threads()
        if threads:
            torch.set_num_threads(threads)
        source = minilm.path_of(smollm2.path_of(self.config.model, say=log.info), say=log.info)
        if embedding_model.embeds(source, revision=self._revision, trust_remote_code=self._trust_remote_code):
            return [self._load_embedder(source)]
        loaded = checkpoint.load(
            source,
            device=self._device,
            dtype=self._dtype,
            attention=self._attention,
            revision=self._revision,
            trust_remote_code=self._trust_remote_code,
        )
        loaded.warm_up()
        checkpoints = {self.model_name: loaded}
        for name, path in self._lora.items():
            checkpoints[name] = lora_model.with_adapter(loaded, name, path)
        sources = {self.model_name: self.config.model, **self._lora}
        try:
            for name, each in checkpoints.items():
                engines = len(checkpoints) - len(self._models)
                self._models[name] = loaded_model.start_model(
                    name, each, slots=self.slots, cache_tokens=self._cache_tokens, engines=engines
                )
            cards = [model.card(sources[name]) for name, model in self._models.items()]
        except BaseException:
            self.close()
            raise
        for model in self._models.values():
            model.engine.on_death = self._fail
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix=f"{self.name} tokenizer")
        log.info("loaded", model=self.model_name, device=str(loaded.device), dtype=str(loaded.model.dtype), threads=torch.get_num_threads())
        return cards

    def _load_embedder(self, source: str) -> ModelCard:
        from . import embedding, embedding_model

        given = [name for name, value in (("lora", self._lora), ("cache_tokens", self._cache_tokens)) if value]
        if given:
            raise InvalidParameter(f"{given[0]} is for models that generate, and {self.model_name!r} embeds", data={"parameter": given[0]})
        loaded = embedding_model.load(
            source,
            device=self._device,
            dtype=self._dtype,
            attention=self._attention,
            revision=self._revision,
            trust_remote_code=self._trust_remote_code,
        )
        self._embedder = embedding.Embedder(loaded, self.name)
        self.slots = self.config.slots or embedding.DEFAULT_SLOTS
        log.info("loaded", model=self.model_name, device=str(loaded.device), dimensions=loaded.dimensions)
        return self._embedder.card(self.model_name, self.config.model)

    async def embed(self, request: Embed) -> Vectors:
        if self._embedder is None:
            raise self._unsupported("embed")
        return await self._embedder.embed(request)

    def begin(self, job: Job) -> None:
        """Without a task per request: what a step made of all of them is emitted in one turn of the event loop."""
        model, tokenizing = self._parts(job.request.model)
        self._generations[job] = None
        preparing = asyncio.get_running_loop().run_in_executor(tokenizing, self._prepare, job, model)
        preparing.add_done_callback(partial(self._prepared, job, model))

    def abandon(self, job: Job) -> None:
        generation = self._generations.pop(job, None)
        self._paused.pop(job, None)
        if generation is not None:
            generation.stop()

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        model, tokenizing = self._parts(job.request.model)
        generation = await asyncio.get_running_loop().run_in_executor(tokenizing, model.prepare, job)
        made: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        generation.start(model.engine, made.put_nowait)
        try:
            while not (generation.done and made.empty()):
                delta = await made.get()
                if isinstance(delta, Exception):
                    raise delta
                job.cached_tokens = generation.cached_tokens
                yield delta
        finally:
            generation.stop()

    async def count_tokens(self, request: CountTokens) -> int:
        if self._embedder is not None:
            return await self._embedder.count_tokens(request)
        model, tokenizing = self._parts(request.model)
        return len(await asyncio.get_running_loop().run_in_executor(tokenizing, model.encode, request))

    def step_age_s(self) -> float:
        if self._embedder is not None:
            return self._embedder.step_age_s()
        return max((model.engine.age_s() for model in tuple(self._models.values())), default=0.0)

    def close(self) -> None:
        if self._embedder is not None:
            self._embedder.close()
        for model in self._models.values():
            model.engine.close()
        if self._tokenizing is not None:
            self._tokenizing.shutdown(cancel_futures=True)
        self._models = {}

    def _parts(self, name: str) -> tuple[LoadedModel, ThreadPoolExecutor]:
        model = self._models.get(name)
        if model is None or self._tokenizing is None:
            raise BackendError(f"model {name!r} is not loaded")
        return model, self._tokenizing

    def _prepare(self, job: Job, model: LoadedModel) -> Generation | None:
        """On the tokenizer's thread. None if nobody wants it any more: what was cancelled must not keep others waiting."""
        return model.prepare(job) if job in self._generations else None

    # --- jobs on the event loop -------------------------------------------------------------------

    def _prepared(self, job: Job, model: LoadedModel, preparing: asyncio.Future[Generation | None]) -> None:
        if preparing.cancelled():
            self._fail_job(job, BackendError("the worker is stopping"))
            return
        failure = preparing.exception()
        if job not in self._generations:
            return
        if failure is not None:
            self._fail_job(job, failure if isinstance(failure, Exception) else BackendError(repr(failure)))
            return
        generation = preparing.result()
        if generation is None:
            return
        self._generations[job] = generation
        try:
            generation.start(model.engine, partial(self._emit, job, generation))
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request
            self._fail_job(job, error)

    def _emit(self, job: Job, generation: Generation, made: Delta | Exception) -> None:
        if isinstance(made, Exception):
            self._fail_job(job, made)
            return
        try:
            job.cached_tokens = generation.cached_tokens
            job.emit(made)
            if generation.done:
                self._generations.pop(job, None)
                job.finish()
            elif job.congested:
                self._pause(job, generation)
        except Exception as error:  # noqa: BLE001 - the same
            self._fail_job(job, error)

    def _fail_job(self, job: Job, error: Exception) -> None:
        if job in self._generations:
            self.abandon(job)
            job.fail(error)

    def _pause(self, job: Job, generation: Generation) -> None:
        """What is made for a controller that does not take it would pile up. In a batch nobody can wait: it leaves, and comes back."""
        generation.pause()
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(CONGESTED_WAIT_S, self._look)
        self._paused[job] = generation

    def _look(self) -> None:
        """Let those go on whose controller takes more."""
        for job, generation in list(self._paused.items()):
            if not job.congested:
                del self._paused[job]
                try:
                    generation.go_on()
                except Exception as error:  # noqa: BLE001 - the same
                    self._fail_job(job, error)
        self._looking = asyncio.get_running_loop().call_later(CONGESTED_WAIT_S, self._look) if self._paused else None


def _spare_threads() -> int | None:
    """All cores but one, which the sockets, the event loop and the heartbeats need. None: what the environment says."""
    return None if os.environ.get("OMP_NUM_THREADS") else max(1, len(os.sched_getaffinity(0)) - 1)
