"""HuggingfaceApiWorker: models that run elsewhere, behind Hugging Face's Inference Providers, an Inference Endpoint, or any server that
speaks OpenAI's API or TGI's.

A request's way: hf_parameters says how its model's API is asked (or refuses by name what that cannot carry), hf_client makes the
exchange with `huggingface_hub.AsyncInferenceClient`, hf_choices reads the events as deltas, and hf_upstream times all of it and tries
again what failed before the first token. huggingface_hub is imported by `load`, which says so if it is missing.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from zmqserve.errors import InvalidParameter
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.logs import Logger
from zmqserve.messages import Embed, ModelCard
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .hf_errors import shown
from .hf_parameters import HONOURED_BY_SOME
from .hf_registry import EXTRAS, HostedModel, check_names, checked, read_registry
from .hf_token import token_of
from .model_errors import missing_libraries

if TYPE_CHECKING:
    from .hf_upstream import Upstream

log = Logger("zmqserve.hf")

TICK_S = 0.5
_VERBS = {"chat": "chat", "text_generation": "generate", "feature_extraction": "embed"}
_OPTIONS = frozenset(HostedModel.__struct_fields__) - {"name", "model", "aliases", "slots"}
"""Keys of a model that are options too, under these names in the parsed arguments."""


class HuggingfaceApiWorker(BaseModelWorker):
    """Serves hosted models, each as its HostedModel says: several from a registry file, or the one that `config.model` names.

    Upstreams may be down when it starts: they are asked when a request comes. A model's `slots` bound the requests that its upstream
    gets at one time, the worker's (by default their sum) those of all: what waits for a busy upstream waits in the controller, and
    holds no slot that another model could use. Chat models take messages only, text generation
    models a prompt only. Answers have no token ids, but for text generation's, and cannot be resumed. Usage is what the upstream
    tells, 0 where it tells nothing (feature extraction, an answer that was cancelled). An upstream that fills in max_tokens has its
    own default.
    """

    backend: ClassVar[str] = "hf"
    needs_model: ClassVar[bool] = False
    honours: ClassVar[frozenset[str]] = HONOURED_BY_SOME

    def __init__(self, config: WorkerConfig, models: Sequence[HostedModel] = (), *, origin: str = "models") -> None:
        super().__init__(config)
        self.models = list(models) or [HostedModel(name=self.model_name, model=config.model)]
        for model in self.models:
            checked(model, _where(origin, model))
        check_names(self.models, origin)
        self.slots = config.slots or sum(model.slots for model in self.models)
        self._origin = origin
        self._upstreams: dict[str, Upstream] = {}
        self._keeper: asyncio.Task[None] | None = None
        self._ticked_s = 0.0

    @classmethod
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        add = parser.add_argument
        add("--registry", type=Path, metavar="FILE", help="TOML or JSON that lists several models, in place of --model and what follows")
        add("--api", choices=list(_VERBS), help="how the model is asked (default chat)")
        add("--endpoint", dest="base_url", metavar="URL", help="an Inference Endpoint, or an OpenAI-, TGI- or TEI-compatible server")
        add("--provider", metavar="NAME", help="one of Hugging Face's Inference Providers (default: it chooses one, unless --endpoint)")
        add(
            "--server",
            choices=["openai", "tgi", "vllm"],
            help="what is at --endpoint, and so which parameters it takes (default openai)",
        )
        add("--extra", action="append", metavar="PARAMETER", choices=sorted(EXTRAS), help="a parameter that it takes too; may be repeated")
        add("--token-env", metavar="NAME", help="environment variable with the token (default: none for --endpoint, else the saved login)")
        add("--token-file", metavar="FILE", help="file with the token, closed to other users")
        add("--context-length", type=int, metavar="N", help="tokens of prompt and answer (default: not known)")
        add("--retries", type=int, metavar="N", help="how often a request is tried again before its first token (default 3)")
        add("--connect-timeout", dest="connect_timeout_s", type=float, metavar="S", help="what connecting may take (default 5)")
        add("--first-token-timeout", dest="first_token_timeout_s", type=float, metavar="S", help="until the first token (default 120)")
        add("--token-timeout", dest="token_timeout_s", type=float, metavar="S", help="until each later one (default 60)")

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:
        given = {name: value for name in sorted(_OPTIONS) if (value := getattr(args, name)) is not None}
        if args.registry is None:
            if not config.model:
                raise InvalidParameter("give --model or --registry: which model to serve", data={"parameter": "model"})
            if config.slots is not None:
                given["slots"] = config.slots
            return cls(config, [HostedModel(name=config.served_name or config.model, model=config.model, **given)], origin="command line")
        beside = sorted({*given, *(["model"] if config.model else []), *(["name"] if config.served_name else [])})
        if beside:
            text = f"--registry names the models and their settings: leave out what is for one model ({', '.join(beside)})"
            raise InvalidParameter(text, data={"parameter": "registry"})
        return cls(config, read_registry(args.registry), origin=str(args.registry))

    def load(self) -> list[ModelCard]:
        try:
            from .hf_upstream import Upstream
        except ImportError as error:
            raise missing_libraries(error, "hf") from error
        cards = []
        for model in self.models:
            where = _where(self._origin, model)
            upstream = Upstream(model, token_of(model, where), where)
            self._upstreams.update(dict.fromkeys([model.name, *model.aliases], upstream))
            source = shown(model.base_url) if model.base_url else model.provider or "Hugging Face"
            log.info("hosted model", model=model.name, api=model.api, at=source, slots=model.slots)
            cards.append(
                ModelCard(
                    model.name,
                    context_length=model.context_length,
                    verbs=[_VERBS[model.api], "model_details"],
                    aliases=model.aliases,
                    slots=model.slots,
                    source=model.upstream_name,
                )
            )
        return cards

    async def generate(self, job: GenerateJob) -> AsyncGenerator[Delta, None]:
        self._keep()
        async with aclosing(self._upstreams[job.request.model].answer(job)) as deltas:
            async for delta in deltas:
                yield delta

    async def embed(self, request: Embed) -> Vectors:
        self._keep()
        return await self._upstreams[request.model].embed(request)

    def step_age_s(self) -> float:
        """How long the event loop has stood still. How long an upstream has is for the timeouts to judge, not for the controller."""
        return max(0.0, time.monotonic() - self._ticked_s - TICK_S) if self._keeper is not None else 0.0

    def _keep(self) -> None:
        """Begin, with the first request, what runs on the event loop as long as that does."""
        if self._keeper is None:
            self._ticked_s = time.monotonic()
            self._keeper = asyncio.get_running_loop().create_task(self._tick())

    async def _tick(self) -> None:
        try:
            while True:
                self._ticked_s = time.monotonic()
                await asyncio.sleep(TICK_S)
        finally:
            # The loop ends: connections cannot be closed without it.
            for upstream in dict.fromkeys(self._upstreams.values()):
                await upstream.close()


def _where(origin: str, model: HostedModel) -> str:
    return f"{origin}: model {model.name!r}"
