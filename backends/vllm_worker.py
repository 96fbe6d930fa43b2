"""VLLMWorker: a model that vLLM runs, through its AsyncLLM engine.

A request's way: its prompt becomes ids on a thread of its own, together with those of others that have come (vllm_admission.py), the
engine (a process beside this one) makes tokens for all requests in its own batches, and EngineOutputs reads and emits what each step
made. vLLM is imported by `load`, which says so if it
is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Collection, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Self

import msgspec

from zmqserve.answers import Job
from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.logs import Logger
from zmqserve.messages import CountTokens, Embed, ModelCard
from zmqserve.params import SamplingParams
from zmqserve.resuming import reread
from zmqserve.stopping import StopStrings
from zmqserve.worker import BaseModelWorker, WorkerConfig

from . import vllm_engine
from .adapters import check_adapters, parse_adapters
from .named_models import path_of
from .prompts import echo_of, known_ids, room
from .reader import Reader
from .vllm_adapters import adapters_of, allowed_rank
from .vllm_admission import Admission
from .vllm_embedding import check_length, embed
from .vllm_fingerprint import directory_of, fingerprint
from .vllm_outputs import Choice, EngineOutputs
from .vllm_params import refused, sampling, token_logprobs
from .vllm_vocabulary import ModelVocabulary

log = Logger("zmqserve.vllm")
MOST_LOGPROBS = 100
"""What a request may ask for (params.py); vLLM's own default is 20."""
MOST_STOP_IDS = 128
"""What vLLM's sampler for GPUs takes with min_tokens."""
LOOP_S = 10.0
"""What an event loop with nothing to do may take to answer."""


@dataclass(frozen=True, eq=False)
class Loaded:
    """What `load` leaves. `loras`: vLLM's LoRARequest by the name of its model. `ends`: ids that end an answer, unless ignored."""

    engine: Any
    figures: vllm_engine.EngineFigures
    outputs: EngineOutputs
    vocabulary: ModelVocabulary
    tokenizing: ThreadPoolExecutor
    context_length: int
    ends: frozenset[int]
    loras: Mapping[str, Any]


class VLLMWorker(BaseModelWorker):
    """Serves `config.model`: ``smollm2-135m``, ``all-minilm-l6-v2``, a checkpoint directory or a Hugging Face id that vLLM can run.

    engine_args: arguments of vLLM's engine by name, as texts, read as on vLLM's own command line (``{"tensor_parallel_size": "2"}``).
    loras: adapter directories by the name of the model that each is served as, beside the base model. A model that embeds is served
    for `embed`. Slots are vLLM's ``max_num_seqs``, unless `config.slots` says otherwise.
    """

    backend: ClassVar[str] = "vllm"
    honours: ClassVar[frozenset[str]] = frozenset(
        {"echo", "frequency_penalty", "guided", "ignore_eos", "logprobs", "max_tokens", "min_p", "min_tokens", "n", "presence_penalty"}
        | {"repetition_penalty", "seed", "skip_special_tokens", "stop", "stop_token_ids", "temperature", "token_ids", "top_k", "top_p"}
        | {"dimensions", "normalize", "truncate_tokens"}
    )
    # vLLM counts these two over its own output, and takes what was received as prompt. Its generator for a seed begins anew.
    resumes: ClassVar[Mapping[str, str]] = {
        "frequency_penalty": "refused",
        "presence_penalty": "refused",
        "sampling": "approximate",
        "seed": "approximate",
    }

    def __init__(
        self, config: WorkerConfig, *, engine_args: Mapping[str, str] | None = None, loras: Mapping[str, str] | None = None
    ) -> None:
        if not config.model:
            raise InvalidParameter("model is empty: give smollm2-135m, a directory or a Hugging Face id", data={"parameter": "model"})
        super().__init__(config)
        check_adapters(loras or {}, self.model_name)
        self._engine_args = dict(engine_args or {})
        self._adapters = adapters_of(loras or {})
        self._loaded_parts: Loaded | None = None
        self._watch: vllm_engine.EngineWatch | None = None
        self._embedding = 0
        self._admission: Admission[Asked] | None = None

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        parser.add_argument(
            "--engine-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of vLLM's engine; may be repeated"
        )
        parser.add_argument(
            "--lora", action="append", default=[], metavar="NAME=PATH", help="serve an adapter as a model of that name; may be repeated"
        )

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        return cls(config, engine_args=vllm_engine.split_arguments(args.engine_arg), loras=parse_adapters(args.lora))

    @cached_property
    def model_name(self) -> str:
        """The name that clients use: `config.served_name`, or the last part of the path or id."""
        return self.config.served_name or os.path.basename(os.path.abspath(os.path.expanduser(self.config.model)))

    def load(self) -> list[ModelCard]:
        version = vllm_engine.library()
        source = os.path.expanduser(path_of(self.config.model, say=log.info))
        ranks = [adapter.rank for adapter in self._adapters]
        defaults: dict[str, Any] = {"max_logprobs": MOST_LOGPROBS}
        if ranks:
            # vLLM's kernels for CPUs take a base model's -1 for the last slot: it must stay empty.
            slots = len(ranks) + vllm_engine.on_cpu()
            defaults |= {"enable_lora": True, "max_loras": slots, "max_lora_rank": allowed_rank(max(ranks))}
        figures = vllm_engine.EngineFigures()
        engine = vllm_engine.start(source, self._engine_args, defaults, figures)
        try:
            loaded = self._take_over(engine, figures)
            cards = self._cards(loaded)
            self._on_loop(vllm_engine.warm_up(engine, loaded.loras))
        except BaseException:
            vllm_engine.shut_down(engine)
            raise
        settings = engine.model_config
        self.slots = self.config.slots or engine.vllm_config.scheduler_config.max_num_seqs
        self._loaded_parts = loaded
        self._admission = Admission(loaded.tokenizing, partial(_prepare, loaded), partial(self._open, loaded))
        self._watch = vllm_engine.EngineWatch(engine, self._fail, self.name)
        log.info("loaded", model=self.model_name, vllm=version, dtype=str(settings.dtype), runner=settings.runner_type, slots=self.slots)
        return cards

    def _on_loop(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` on the event loop, where the engine's sockets belong, and wait for it."""
        loop: Future[asyncio.AbstractEventLoop] = Future()
        if self._engine is not None:
            self._engine.call([(lambda: loop.set_result(asyncio.get_running_loop()),)])
            asyncio.run_coroutine_threadsafe(work, loop.result(LOOP_S)).result()

    def _take_over(self, engine: Any, figures: vllm_engine.EngineFigures) -> Loaded:
        from vllm.lora.request import LoRARequest

        settings = engine.model_config
        tokenizer = engine.get_tokenizer()
        vocabulary = ModelVocabulary(tokenizer, settings.get_vocab_size(), settings.max_model_len)
        # A chat model's turn may end with another token than its texts do; generation_config lists all.
        ends = settings.try_get_generation_config().get("eos_token_id")
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        if tokenizer.eos_token_id is not None:
            ends.add(tokenizer.eos_token_id)
        return Loaded(
            engine=engine,
            figures=figures,
            outputs=EngineOutputs(engine, vocabulary.text_of, token_logprobs),
            vocabulary=vocabulary,
            tokenizing=ThreadPoolExecutor(1, thread_name_prefix=f"{self.name} tokenizer"),
            context_length=settings.max_model_len,
            ends=frozenset(ends),
            loras={each.name: LoRARequest(each.name, number, str(each.path)) for number, each in enumerate(self._adapters, 1)},
        )

    def _cards(self, loaded: Loaded) -> list[ModelCard]:
        """The base model's, and one for each adapter."""
        settings = loaded.engine.model_config
        dtype = str(settings.dtype).removeprefix("torch.")
        facts = [dtype, str(settings.quantization), str(loaded.engine.vllm_config.cache_config.cache_dtype)]
        places = {directory_of(settings.model, settings.revision), directory_of(settings.tokenizer, settings.tokenizer_revision)}
        files = sorted(place for place in places if place is not None)
        if not files:  # not from the Hub nor from a directory: the name is all that is known
            facts += [settings.model, str(settings.revision)]
        embeds = settings.runner_type == "pooling"
        chat = ["chat"] if loaded.vocabulary.chats else []
        base = ModelCard(
            self.model_name,
            fingerprint=fingerprint(files, facts),
            context_length=loaded.context_length,
            verbs=["embed", "count_tokens", "model_details"] if embeds else ["generate", *chat, "count_tokens", "model_details"],
            features=[] if embeds else ["guided", "logprobs"],
            embedding_dim=settings.get_hidden_size() if embeds else 0,
            source=self.config.model,
            # The same ids taken in other pieces give logits with other last bits. In float32 these decide nothing but ties.
            resume={} if dtype == "float32" else {"greedy": "approximate"},
        )
        adapted = [
            msgspec.structs.replace(base, name=each.name, fingerprint=fingerprint([*files, each.path], facts), source=str(each.path))
            for each in self._adapters
        ]
        return [base, *adapted]

    # --- requests ---------------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        self._parts()  # or there is nothing to begin with
        if self._admission is not None:
            self._admission.add(job)

    def abandon(self, job: Job) -> None:
        self._parts().outputs.abandon(job)

    async def embed(self, request: Embed) -> Vectors:
        loaded = self._parts()
        texts = await asyncio.get_running_loop().run_in_executor(loaded.tokenizing, _encode_texts, loaded, request)
        self._embedding += 1
        try:
            return await embed(loaded.engine, texts, request.params, loaded.loras.get(request.model))
        except Exception as error:
            if loaded.engine.errored:
                # The worker ends, and the request goes on elsewhere.
                await asyncio.get_running_loop().create_future()
            raise refused(error) from error
        finally:
            self._embedding -= 1

    async def count_tokens(self, request: CountTokens) -> int:
        loaded = self._parts()
        return len(await asyncio.get_running_loop().run_in_executor(loaded.tokenizing, loaded.vocabulary.encode, request))

    async def _open(self, loaded: Loaded, job: Job, asked: Asked | Exception) -> None:
        """Hand a request to the engine. Its answer needs no task."""
        try:
            if isinstance(asked, Exception):
                raise asked
            if asked.complete is not None:
                job.emit(Delta(asked.choices[0].late, finish_reason=asked.complete))
                job.finish()
                return
            try:
                await loaded.outputs.open(job, asked.choices, asked.ids, asked.params, loaded.loras.get(job.request.model))
            except Exception as error:
                raise refused(error, job.request.params.guided) from error
        except Exception as error:  # noqa: BLE001 - it belongs to this request
            # With a dead engine the worker ends, and the request goes on elsewhere.
            if not loaded.engine.errored:
                loaded.outputs.fail(job, error)

    # --- its state --------------------------------------------------------------------------------

    def step_age_s(self) -> float:
        loaded = self._loaded_parts
        return loaded.figures.age_s() if loaded is not None and self._busy(loaded) else 0.0

    def waiting(self) -> int:
        loaded = self._loaded_parts
        return loaded.figures.waiting if loaded is not None else 0

    def close(self) -> None:
        loaded, self._loaded_parts = self._loaded_parts, None
        if self._watch is not None:
            self._watch.close()
        if loaded is not None:
            loaded.tokenizing.shutdown(cancel_futures=True)
            vllm_engine.shut_down(loaded.engine)

    def _parts(self) -> Loaded:
        if self._loaded_parts is None:
            raise BackendError(f"model {self.model_name!r} is not loaded")
        return self._loaded_parts

    def _busy(self, loaded: Loaded) -> bool:
        return bool(len(loaded.outputs) or self._embedding)


@dataclass(frozen=True)
class Asked:
    """A request for the engine: `ids` in, `choices` out, each made with its `params`. `complete`: why a resumed answer ends at once."""

    ids: list[int]
    choices: list[Choice]
    params: list[Any]
    complete: str | None


def _prepare(loaded: Loaded, job: GenerateJob) -> Asked:
    """On the tokenizer's thread. Raises what is wrong with the request."""
    vocabulary = loaded.vocabulary
    request, params = job.request, job.request.params
    resume = request.resume
    received = [] if resume is None else known_ids(resume.token_ids, "resume.token_ids", vocabulary.size)
    prompt = vocabulary.encode(request)
    job.prompt_tokens = len(prompt)
    max_tokens = room(len(prompt), params.max_tokens, loaded.context_length)
    _check_stops(params, vocabulary.size, loaded.ends)
    echo = echo_of(request, prompt, vocabulary) if params.echo else ""
    stop = StopStrings(params.stop)
    choices = []
    for _ in range(params.n):
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else loaded.ends)}
        choices.append(Choice(Reader(vocabulary, prompt, params, ends, max_tokens, stop), ends, echo))
    complete = None
    if resume is not None:
        choices[0].late, complete = reread(resume, choices[0].reader.read, echo)
    if complete is not None:
        return Asked([], choices, [], complete)
    wanted = [sampling(params, max_tokens, index=index, received=len(received)) for index in range(params.n)]
    return Asked([*prompt, *received], choices, wanted, None)


def _check_stops(params: SamplingParams, size: int, ends: Collection[int]) -> None:
    """Refuse stop ids that vLLM's engine process would not survive: not all versions check them before they get there."""
    ids = params.stop_token_ids
    why = ""
    if max(ids, default=0) >= size:
        why = f"holds {max(ids)}, but the model's ids end at {size - 1}"
    elif params.min_tokens and len({*ids, *ends}) > MOST_STOP_IDS:
        why = f"must be at most {MOST_STOP_IDS} ids beside min_tokens, the model's {len(ends)} ends among them; got {len(ids)}"
    if why:
        raise InvalidParameter(f"stop_token_ids {why}", data={"parameter": "stop_token_ids"})


def _encode_texts(loaded: Loaded, request: Embed) -> list[list[int]]:
    most = request.params.truncate_tokens
    return [check_length(loaded.vocabulary.encode_text(text, most), loaded.context_length) for text in request.texts]
