"""A stand-in for vLLM's AsyncLLM: the test says what each request's next step makes. And a job that keeps what it is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from zmqserve.jobs import Delta
from zmqserve.messages import Generate
from zmqserve.params import SamplingParams


class Collector:
    """As vLLM's RequestOutputCollector: one output waits in it, later ones are added to that."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.output: Any = None

    def put(self, output: Any) -> None:
        if self.output is None:
            self.output = output
        else:
            self.output.outputs[0].token_ids += output.outputs[0].token_ids
            self.output.outputs[0].finish_reason = output.outputs[0].finish_reason

    def get_nowait(self) -> Any:
        output, self.output = self.output, None
        return output


class ScriptedEngine:
    """Takes requests, and makes what `step` says. `early`: ids that are made before `add_request` returns."""

    def __init__(self) -> None:
        self.collectors: list[Collector] = []
        self.asked: list[tuple[list[int], Any, Any]] = []
        self.aborted: list[str] = []
        self.early: list[int] = []
        self.refuses: Exception | None = None

    async def add_request(self, request_id: str, prompt: dict[str, Any], params: Any, *, lora_request: Any = None) -> Collector:
        if self.refuses is not None:
            raise self.refuses
        collector = Collector(f"{request_id}-internal")
        self.collectors.append(collector)
        self.asked.append((prompt["prompt_token_ids"], params, lora_request))
        if self.early:
            collector.put(output(self.early))
        return collector

    async def abort(self, ids: list[str], internal: bool) -> None:
        assert internal
        self.aborted += ids

    def step(self, *made: Any) -> None:
        """One step: what it made for each request, in their order; None for nothing."""
        for collector, each in zip(self.collectors, made, strict=False):
            if each is not None:
                collector.put(each)


def output(ids: list[int], reason: str | None = None, *, logprobs: list[dict[int, Any]] | None = None, cached: int = 0) -> Any:
    """As vLLM's RequestOutput of one request."""
    made = SimpleNamespace(token_ids=list(ids), finish_reason=reason, stop_reason=None, logprobs=logprobs)
    return SimpleNamespace(outputs=[made], num_cached_tokens=cached)


@dataclass(eq=False)
class KeptJob:
    """As a Job: keeps its deltas and its end. `congested`: its controller takes no more."""

    params: SamplingParams = field(default_factory=SamplingParams)
    congested: bool = False
    stopped: bool = False
    congested_after: int | None = None
    prompt_tokens: int = 3
    cached_tokens: int = 0
    deltas: list[Delta] = field(default_factory=list)
    finished: bool = False
    error: Exception | None = None

    @property
    def request(self) -> Generate:
        return Generate(1, "m", prompt="x", params=self.params)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    def emit(self, delta: Delta) -> None:
        self.deltas.append(delta)
        if self.congested_after is not None and len(self.deltas) >= self.congested_after:
            self.congested = True

    def finish(self) -> None:
        self.finished = True

    def fail(self, error: Exception) -> None:
        self.error = error
