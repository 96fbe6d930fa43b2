"""One hosted model: requests to it, tried again where that may help, and what they may take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, asynccontextmanager
from itertools import count
from typing import Any

from huggingface_hub.errors import TextGenerationError
from huggingface_hub.inference._providers import PROVIDERS, get_provider_helper

from zmqserve.errors import InvalidParameter
from zmqserve.jobs import Delta, GenerateJob, Vectors
from zmqserve.logs import Logger
from zmqserve.messages import Embed

from .hf_choices import ChatReader, TextReader
from .hf_client import UpstreamClient, http, new_session
from .hf_embeddings import batches, plan_embed, stacked
from .hf_errors import Blame, Failure
from .hf_parameters import Plan, plan_of
from .hf_registry import HostedModel
from .hf_retries import pause_s
from .hf_token import Token

log = Logger("zmqserve.hf")

_TASKS = {"chat": "conversational", "text_generation": "text-generation", "feature_extraction": "feature-extraction"}


class Upstream:
    """A hosted model as its worker uses it, on one event loop. Raises errors of zmqserve only; `close` ends its connections."""

    def __init__(self, model: HostedModel, token: Token, where: str) -> None:
        self.model = model
        self._token = token
        self._blame = Blame(model, token)
        self._session = new_session(model)
        self._found = False
        _check_provider(model, where)
        if model.base_url is not None:
            # Asks nobody, and does what the library does once: it would hold the first request up.
            _look_up(model, token)
            self._found = True

    def __repr__(self) -> str:
        return f"Upstream({self.model.name!r})"

    async def close(self) -> None:
        """Close connections that are kept open."""
        await self._session.aclose()

    async def answer(self, job: GenerateJob) -> AsyncGenerator[Delta, None]:
        """The deltas of an answer. Before its first token a request that fails is tried again."""
        plan = plan_of(self.model, job.request)
        for attempt in count(1):
            kind = ChatReader if self.model.api == "chat" else TextReader
            reader = kind(job, self._blame, self.model.context_length, plan.copies)
            try:
                async with aclosing(self._stream(plan, reader)) as deltas:
                    async for delta in deltas:
                        for copy in reader.copied(delta):
                            yield copy
                return
            except Failure as failure:
                await self._pause(failure, attempt, job.deadline_s, started=reader.started)

    async def embed(self, request: Embed) -> Vectors:
        """The vectors of the request's texts, asked for in batches."""
        plan = plan_embed(self.model, request.params)
        deadline_s = None if request.deadline_ms is None else time.monotonic() + request.deadline_ms / 1000
        rows: list[Any] = []
        prompt_tokens = 0
        for texts in batches(request.texts):
            for attempt in count(1):
                try:
                    array, used = await self._vectors(plan, texts)
                    break
                except Failure as failure:
                    await self._pause(failure, attempt, deadline_s, started=False)
            rows.append(array)
            prompt_tokens += used
        try:
            return stacked(rows, request, self._blame, prompt_tokens)
        except Failure as failure:
            raise failure.error from None

    async def _stream(self, plan: Plan, reader: ChatReader | TextReader) -> AsyncGenerator[Delta, None]:
        """One attempt."""
        client = self._client(plan.body)
        ask = client.chat_completion if self.model.api == "chat" else client.text_generation
        until_s = time.monotonic() + self.model.first_token_timeout_s
        events: Any = None
        try:
            while True:
                try:
                    async with self._guard(until_s, "token_timeout_s" if reader.started else "first_token_timeout_s"):
                        if events is None:
                            await self._find_provider()
                            events = await ask(stream=True, **plan.arguments)
                        event: Any = await anext(events, None)
                        deltas = [] if event is None else list(reader.read(event))
                except Failure:
                    if not reader.finished:
                        raise
                    # All of the answer is here, only the usage is not.
                    event, deltas = None, []
                for delta in deltas:
                    yield delta
                if event is None or reader.cut:
                    for delta in reader.end():
                        yield delta
                    return
                if reader.started:
                    until_s = time.monotonic() + self.model.token_timeout_s
        finally:
            if events is not None:
                await events.aclose()
            await client.close()

    async def _vectors(self, plan: Plan, texts: list[str]) -> tuple[Any, int]:
        """One attempt for one batch: a float32 array of (texts, dimensions), and the tokens used, 0 where the API tells none."""
        client = self._client(plan.body)
        try:
            async with self._guard(time.monotonic() + self.model.first_token_timeout_s, "first_token_timeout_s"):
                await self._find_provider()
                used = 0
                if self.model.dialect == "openai":
                    array, used = await client.embeddings(texts, self.model.upstream_name)
                else:
                    array = await client.feature_extraction(texts, **plan.arguments)
        finally:
            await client.close()
        if array.ndim != 2 or array.shape[0] != len(texts) or not array.shape[1]:
            shape = " x ".join(map(str, array.shape))
            raise self._blame.nonsense(f"the upstream gave numbers of shape {shape} for {len(texts)} texts, not one vector for each")
        return array, used

    @asynccontextmanager
    async def _guard(self, until_s: float, key: str) -> AsyncGenerator[None, None]:
        """Within it, whatever goes wrong becomes a Failure, and so does what takes longer than until `until_s`: an event loop's clock is
        time.monotonic. `key` is the setting that says so."""
        try:
            async with asyncio.timeout_at(until_s):
                yield
        except Failure:
            raise
        except TimeoutError:
            raise self._blame.late(key) from None
        except Exception as error:  # noqa: BLE001 - of a library that meets an upstream's nonsense it may be anything
            # Not chained: frames of the library hold the token, and a log may show them.
            raise self._strange(error) from None

    def _strange(self, error: Exception) -> Failure:
        if isinstance(error, TextGenerationError):
            return self._blame.reported(error.args[0] if error.args else "it does not say which")
        if isinstance(error, http.TransportError):
            return self._blame.broken(f"cannot reach the upstream: {error or type(error).__name__}")
        if isinstance(error, http.HTTPStatusError) or getattr(error, "response", None) is not None:
            response: Any = getattr(error, "response", None)
            return self._blame.status(response.status_code, str(response.url), str(error), None)
        return self._blame.nonsense(f"the upstream's answer, or how it is asked, is not as it should be: {type(error).__name__}: {error}")

    async def _pause(self, failure: Failure, attempt: int, deadline_s: float | None, *, started: bool) -> None:
        """Wait before the next attempt; raise the error where there is to be none."""
        wait_s: float | None = None
        if failure.transient and not started and attempt <= self.model.retries:
            remaining_s = None if deadline_s is None else deadline_s - time.monotonic()
            wait_s = pause_s(attempt, failure.told_s, remaining_s)
        if wait_s is None:
            raise failure.error from None
        log.warning("upstream failed", model=self.model.name, attempt=attempt, retry_s=round(wait_s, 3), why=failure.error.message)
        await asyncio.sleep(wait_s)

    async def _find_provider(self) -> None:
        """Let the library look up once what the provider calls the model: it asks the Hub, and would block the event loop."""
        if self._found:
            return
        await asyncio.to_thread(_look_up, self.model, self._token)
        self._found = True

    def _client(self, body: dict[str, Any]) -> UpstreamClient:
        return UpstreamClient(self._session, self.model, self._token, self._blame, body)


def _look_up(model: HostedModel, token: Token) -> None:
    provider: Any = model.provider
    name = model.base_url or model.upstream_name
    helper = get_provider_helper(provider, task=_TASKS[model.api], model=name)
    helper.prepare_request(inputs=[], parameters={}, headers={}, model=name, api_key=token.value)


def _check_provider(model: HostedModel, where: str) -> None:
    """Raise InvalidParameter for a provider that there is not, or that lacks the API."""
    provider = model.provider
    if provider is None or provider == "auto":
        return
    able = sorted(name for name, tasks in PROVIDERS.items() if _TASKS[model.api] in tasks)
    if provider not in able:
        text = f"{where}: provider must be auto or one that serves api {model.api} ({', '.join(able)}), got {provider!r}"
        raise InvalidParameter(text, data={"parameter": "provider"})
