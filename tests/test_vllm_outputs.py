"""What vLLM's engine makes, passed on: with a scripted engine, in one thread. Ids are code points, so that texts can be read."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from zmqserve.backends.reader import Reader
from zmqserve.backends.vllm_outputs import MOST_PILED_LOGPROBS, PIECE_TOKENS, Choice, EngineOutputs
from zmqserve.backends.vllm_params import token_logprobs
from zmqserve.errors import BackendError, SlowConsumer
from zmqserve.params import SamplingParams
from zmqserve.stopping import StopStrings

from .fakes.vllm_engine import KeptJob, ScriptedEngine, output

MOST_TURNS = 10_000


class CodePoints:
    """A vocabulary in which every character is a token."""

    special_ids: frozenset[int] = frozenset()

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def ids_of(text: str) -> list[int]:
    return [ord(character) for character in text]


def choices_of(params: SamplingParams, max_tokens: int = 1000) -> list[Choice]:
    stop = StopStrings(params.stop)
    all_ends = [set(params.stop_token_ids) for _ in range(params.n)]
    return [Choice(Reader(CodePoints(), [1], params, ends, max_tokens, stop), ends) for ends in all_ends]


def run(scene: Callable[[ScriptedEngine, EngineOutputs], Awaitable[None]]) -> None:
    async def play() -> None:
        engine = ScriptedEngine()
        await scene(engine, EngineOutputs(engine, chr, token_logprobs))

    asyncio.run(play())


async def opened(outputs: EngineOutputs, job: Any) -> None:
    await outputs.open(job, choices_of(job.params), [1], [None] * job.params.n)


async def turns(until: Callable[[], bool]) -> None:
    """Let the event loop go on until it is so."""
    for _ in range(MOST_TURNS):
        if until():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it never came to that")


def test_a_steps_tokens_are_emitted_before_the_engine_goes_on() -> None:
    """No turn of the event loop lies between: what one step made for all requests leaves together."""

    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        jobs = [KeptJob(), KeptJob()]
        for job in jobs:
            await opened(outputs, job)
        engine.step(output(ids_of("a")), output(ids_of("b"), "length"))
        assert [job.text for job in jobs] == ["a", "b"]
        assert [job.finished for job in jobs] == [False, True]
        assert len(outputs) == 1

    run(scene)


def test_what_came_before_the_collector_was_taken_over_is_not_lost() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob()
        engine.early = ids_of("ab")
        await opened(outputs, job)
        engine.step(output(ids_of("c")))
        assert (job.text, job.ids) == ("abc", ids_of("abc"))

    run(scene)


def test_a_stop_string_ends_the_answer_and_the_engine_is_told() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(stop=["cd"]))
        await opened(outputs, job)
        engine.step(output(ids_of("abc")))
        engine.step(output(ids_of("def")))
        assert (job.text, job.ids, job.finished) == ("ab", ids_of("abcd"), True)
        engine.step(output(ids_of("g"), "length"))
        await turns(lambda: bool(engine.aborted))
        assert engine.aborted == [engine.collectors[0].request_id]
        assert job.text == "ab"

    run(scene)


def test_the_id_that_ends_an_answer_has_no_text_even_if_only_the_engine_knows_it() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob()
        await opened(outputs, job)
        engine.step(output(ids_of("ab!"), "stop"))
        assert (job.text, job.ids, job.deltas[-1].finish_reason) == ("ab", ids_of("ab!"), "stop")
        assert not engine.aborted

    run(scene)


def test_choices_end_one_by_one_and_the_job_with_the_last() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(n=2))
        await opened(outputs, job)
        engine.step(output(ids_of("a"), "length"), output(ids_of("b")))
        before = job.finished
        engine.step(None, output(ids_of("c"), "stop"))
        assert (before, job.finished) == (False, True)
        emitted = [(delta.index, delta.text, delta.finish_reason) for delta in job.deltas]
        assert emitted == [(0, "a", "length"), (1, "b", None), (1, "", "stop")]

    run(scene)


def test_an_abandoned_job_gets_nothing_more_and_leaves_the_engine() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(n=2))
        await opened(outputs, job)
        engine.step(output(ids_of("a"), "length"), output(ids_of("b")))
        outputs.abandon(job)
        engine.step(None, output(ids_of("c")))
        await turns(lambda: bool(engine.aborted))
        assert engine.aborted == [engine.collectors[1].request_id], "the first had ended by itself"
        assert (job.text, job.finished, len(outputs)) == ("ab", False, 0)

    run(scene)


def test_a_job_that_was_cancelled_before_is_not_asked_for() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        await opened(outputs, KeptJob(stopped=True))
        assert not engine.collectors

    run(scene)


def test_an_end_that_is_no_answers_fails_its_job_alone() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        jobs = [KeptJob(), KeptJob()]
        for job in jobs:
            await opened(outputs, job)
        engine.step(output([], "error"), output(ids_of("b")))
        assert isinstance(jobs[0].error, BackendError)
        assert "error" in str(jobs[0].error)
        assert (jobs[1].error, jobs[1].text) == (None, "b")

    run(scene)


def test_a_dead_engine_leaves_answers_to_other_workers() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob()
        await opened(outputs, job)
        engine.step(RuntimeError("dead"))
        assert (job.error, job.finished) == (None, False)

    run(scene)


def test_a_congested_answer_waits_as_ids_and_loses_nothing() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        slow, other = KeptJob(congested=True), KeptJob()
        await opened(outputs, slow)
        await opened(outputs, other)
        text = "0123456789" * 100
        for character in text:
            engine.step(output(ids_of(character)), output(ids_of(character)))
        engine.step(output([], "length"))
        assert (slow.deltas, other.text) == ([], text)
        slow.congested = False
        await turns(lambda: slow.finished)
        assert (slow.text, slow.deltas[-1].finish_reason) == (text, "length")
        assert len(slow.deltas) == -(-len(text) // PIECE_TOKENS), "it leaves in pieces"

    run(scene)


def test_an_answer_that_congests_again_waits_again() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(congested=True)
        await opened(outputs, job)
        engine.step(output(ids_of("x" * 2 * PIECE_TOKENS)))
        job.congested_after = 1
        job.congested = False
        await turns(lambda: bool(job.deltas))
        engine.step(output(ids_of("y")))
        assert len(job.deltas) == 1
        job.congested, job.congested_after = False, None
        await turns(lambda: job.text.endswith("y"))
        assert job.text == "x" * 2 * PIECE_TOKENS + "y"

    run(scene)


def test_log_probabilities_that_nobody_takes_are_bounded() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(logprobs=1), congested=True)
        await opened(outputs, job)
        position = {65: SimpleNamespace(logprob=-0.1, rank=1)}
        for _ in range(MOST_PILED_LOGPROBS):
            engine.step(output([65], logprobs=[position]))
            if job.error is not None:
                break
        assert isinstance(job.error, SlowConsumer)
        await turns(lambda: bool(engine.aborted))

    run(scene)


def test_logprobs_are_the_chosen_ones_and_the_likeliest() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(logprobs=2))
        await opened(outputs, job)
        ranks = {67: (-3.0, 3), 65: (-0.1, 1), 66: (-2.0, 2)}
        engine.step(output([67], logprobs=[{i: SimpleNamespace(logprob=p, rank=r) for i, (p, r) in ranks.items()}]))
        (entry,) = job.deltas[0].logprobs or []
        assert (entry.token_id, entry.text, entry.logprob) == (67, "C", -3.0)
        assert [(top.token_id, top.text, top.logprob) for top in entry.top] == [(65, "A", -0.1), (66, "B", -2.0)]

    run(scene)


def test_logprobs_tell_nothing_of_tokens_that_a_form_excludes() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(SamplingParams(logprobs=3))
        await opened(outputs, job)
        ranks = {65: (0.0, 1), 66: (-math.inf, 2), 67: (-math.inf, 3)}
        engine.step(output([65], logprobs=[{i: SimpleNamespace(logprob=p, rank=r) for i, (p, r) in ranks.items()}]))
        (entry,) = job.deltas[0].logprobs or []
        assert [top.token_id for top in entry.top] == [65]

    run(scene)


def test_tokens_that_the_engine_had_already_are_counted() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        job = KeptJob(prompt_tokens=20)
        await opened(outputs, job)
        engine.step(output(ids_of("a"), cached=16))
        assert job.cached_tokens == 16

    run(scene)


def test_what_the_engine_refuses_is_raised() -> None:
    async def scene(engine: ScriptedEngine, outputs: EngineOutputs) -> None:
        engine.refuses = ValueError("no")
        with pytest.raises(ValueError, match="no"):
            await opened(outputs, KeptJob())

    run(scene)
