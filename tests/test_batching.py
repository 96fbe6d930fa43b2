"""ModelWorker's batch: answers are the same as alone, whatever comes, goes, breaks or does not fit beside them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import aclosing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from zmqserve import messages as m
from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter
from zmqserve.jobs import Delta
from zmqserve.params import SamplingParams
from zmqserve.worker import WorkerConfig

from .fakes.asked import AskedJob, answer_of
from .fakes.controller import FakeController, chunks_of
from .fakes.engines import without_batching
from .fakes.tiny_llama import CONTEXT, WORDS, make_model
from .fakes.traced import peak_bytes

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from zmqserve.backends.checkpoint import Checkpoint  # noqa: E402 - it imports torch
from zmqserve.backends.generation import STAY_TOKENS, Generation  # noqa: E402 - it imports torch
from zmqserve.backends.loaded_model import LoadedModel  # noqa: E402 - the same

pytestmark = pytest.mark.timeout(300)

TOKENS = 24
POISON = 77
PROMPTS = [[5, 6, 7 + i, 8, 40 + i] for i in range(6)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def loaded(directory: Path, slots: int | None = None, **options: Any) -> Iterator[ModelWorker]:
    worker = ModelWorker(WorkerConfig(model=str(directory), slots=slots), device="cpu", threads=1, **options)
    worker.cards = worker.load()
    try:
        asyncio.run(together(worker, PROMPTS[:1], max_tokens=1))  # its threads start now, and not within a test
        yield worker
    finally:
        worker.close()


@pytest.fixture(scope="module")
def worker(model_dir: Path) -> Iterator[ModelWorker]:
    with loaded(model_dir) as made:
        yield made


def job_of(prompt: list[int], **params: Any) -> AskedJob:
    params = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, **params}
    return AskedJob(m.Generate(1, "tiny", token_ids=m.pack_ids(prompt), params=SamplingParams(**params)))


async def ids_of(worker: ModelWorker, job: AskedJob, made: Callable[[], object] = lambda: None) -> list[int]:
    """The ids of its answer; `made` is called after each."""
    ids: list[int] = []
    async for delta in answer_of(worker, job):
        ids += delta.token_ids
        made()
    return ids


async def together(worker: ModelWorker, prompts: list[list[int]], **params: Any) -> list[Any]:
    """Ids, or what went wrong, of all."""
    jobs = [job_of(prompt, **params) for prompt in prompts]
    return list(await asyncio.gather(*(ids_of(worker, job) for job in jobs), return_exceptions=True))


def alone(worker: ModelWorker, **params: Any) -> list[list[int]]:
    return [asyncio.run(ids_of(worker, job_of(prompt, **params))) for prompt in PROMPTS]


def model_of(worker: ModelWorker) -> Any:
    return worker._models["tiny"].checkpoint.model


@contextmanager
def broken_forward(worker: ModelWorker, breaks: Callable[[Any], bool], error: Exception) -> Iterator[list[int]]:
    """Forwards of a batch for which `breaks` is true of the ids raise `error`. Gives the number of sequences in each forward."""
    model = model_of(worker)
    forward = model.forward
    sizes: list[int] = []

    def patched(*args: Any, **kwargs: Any) -> Any:
        sizes.append(kwargs["cu_seq_lens_q"].shape[0] - 1)
        if breaks(kwargs):
            raise error
        return forward(*args, **kwargs)

    model.forward = patched
    try:
        yield sizes
    finally:
        del model.forward


# --- together as alone -------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 4.0, "seed": 3}, {"frequency_penalty": 1.0}, {"logprobs": 2}], ids=str)
def test_answers_in_a_batch_are_those_alone(worker: ModelWorker, params: dict[str, Any]) -> None:
    expected = alone(worker, **params)
    with broken_forward(worker, lambda _: False, RuntimeError()) as sizes:
        assert asyncio.run(together(worker, PROMPTS, **params)) == expected
    assert max(sizes) == len(PROMPTS), "they were not in one batch"


def test_all_tokens_of_a_step_leave_as_one_message(model_dir: Path) -> None:
    with FakeController() as controller:
        config = WorkerConfig(model=str(model_dir), controllers=(controller.endpoint,))
        with ModelWorker(config, device="cpu", threads=1):
            controller.register(timeout_s=60, ttl_ms=600_000)
            params = SamplingParams(temperature=0, max_tokens=4 * TOKENS, ignore_eos=True)
            for rid in (1, 2, 3, 4):
                controller.request(m.Generate(rid, "tiny", token_ids=m.pack_ids(PROMPTS[rid]), params=params))
            got = [controller.expect(m.FIRST, m.MORE, m.DONE, timeout_s=60)]
            while sum(each.head.kind == m.DONE for each in got) < 4:
                got.append(controller.expect(m.FIRST, m.MORE, m.DONE, timeout_s=60))
    assert [len(chunks_of(got, rid)) for rid in (1, 2, 3, 4)] == [4 * TOKENS] * 4
    kinds = [each.head.kind for each in got]
    last_first = len(kinds) - 1 - kinds[::-1].index(m.FIRST)
    # Of the steps in which the last one begins and the first one ends, others' tokens leave beside FIRST and DONE.
    steps = [each.message for each in got[last_first + 2 : kinds.index(m.DONE) - 1]]
    assert steps
    assert all(isinstance(step, m.Chunks) and len(step.chunks) % 4 == 0 for step in steps)  # some steps in one, where the thread is late


def test_a_prompt_that_was_there_before_is_not_computed_again(worker: ModelWorker) -> None:
    prompt = [(3 * i) % 200 + 3 for i in range(70)]
    jobs = [job_of(prompt, max_tokens=5), job_of(prompt, max_tokens=5), job_of(prompt, max_tokens=5, n=2)]
    answers = [asyncio.run(ids_of(worker, job)) for job in jobs]
    assert [job.cached_tokens for job in jobs] == [0, 64, 64]
    assert answers[0] == answers[1]


# --- room --------------------------------------------------------------------------------------


def test_a_cache_too_small_for_all_at_once_serves_all(worker: ModelWorker, model_dir: Path) -> None:
    expected = alone(worker, max_tokens=60)
    with loaded(model_dir, cache_tokens=CONTEXT) as small:
        assert asyncio.run(together(small, PROMPTS, max_tokens=60)) == expected


def test_a_cache_smaller_than_the_context_limits_what_is_taken(model_dir: Path) -> None:
    """A request that can never fit would keep the batch from going on."""
    with loaded(model_dir, cache_tokens=64) as small:
        assert small.cards[0].context_length == 64
        with pytest.raises(ContextOverflow) as caught:
            asyncio.run(ids_of(small, job_of([5] * 60, max_tokens=5)))
        assert (caught.value.context_length, caught.value.tokens) == (64, 65)
        assert len(asyncio.run(ids_of(small, job_of([5] * 60, max_tokens=4)))) == 4


def test_a_cache_that_no_memory_holds_is_refused(model_dir: Path) -> None:
    with pytest.raises(InvalidParameter, match="there is room for"), loaded(model_dir, cache_tokens=10**12):
        pass
    with pytest.raises(InvalidParameter, match="cache_tokens must be an integer >= 1"):
        ModelWorker(WorkerConfig(model="m"), cache_tokens=0)


# --- whose turn it is --------------------------------------------------------------------------


@pytest.fixture
def narrow(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelWorker]:
    """With four places in its batch."""
    monkeypatch.setattr("zmqserve.backends.loaded_model._MOST_SEQUENCES", 4)
    with loaded(model_dir, slots=2) as made:
        yield made


async def choices_of(worker: ModelWorker, job: AskedJob, made: Callable[[], object] = lambda: None) -> list[list[int]]:
    """The ids of each of its choices."""
    choices: list[list[int]] = [[] for _ in range(job.request.params.n)]
    async for delta in answer_of(worker, job):
        choices[delta.index] += delta.token_ids
        made()
    return choices


def test_a_request_for_many_choices_keeps_nobody_waiting(narrow: ModelWorker) -> None:
    """It has all places of the batch, and one that comes later gets one of these after a step. The choices are those that it would get."""
    params: dict[str, Any] = {"n": 12, "temperature": 4.0, "seed": 3, "max_tokens": 60}
    expected = asyncio.run(choices_of(narrow, job_of(PROMPTS[0], **params)))
    (alone_too,) = asyncio.run(choices_of(narrow, job_of(PROMPTS[1], max_tokens=20)))

    async def scene() -> None:
        full = asyncio.Event()
        job = job_of(PROMPTS[0], **params)
        made = 0

        def count() -> None:
            nonlocal made
            made += 1
            if max(sizes) == 4:
                full.set()

        greedy = asyncio.create_task(choices_of(narrow, job, count))
        await full.wait()
        before = made
        assert await choices_of(narrow, job_of(PROMPTS[1], max_tokens=20)) == [alone_too]
        assert made - before < 4 * 25, "it waited for an answer of the other's"
        assert await greedy == expected

    with broken_forward(narrow, lambda _: False, RuntimeError()) as sizes:
        asyncio.run(scene())
    assert max(sizes) == 4


def test_requests_share_the_places_that_become_free(narrow: ModelWorker) -> None:
    """Of two that ask for many choices, the one that came later does not wait for all of the other's."""

    async def scene() -> list[int]:
        order: list[int] = []

        async def ask(number: int) -> None:
            async for delta in answer_of(narrow, job_of(PROMPTS[number], n=8, max_tokens=10)):
                order.extend([number] * (delta.finish_reason is not None))

        await asyncio.gather(ask(0), ask(1))
        return order

    order = asyncio.run(scene())
    assert order[:8].count(1) >= 3


def test_heartbeats_tell_what_no_step_has_had_yet(model_dir: Path) -> None:
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(_: Any) -> bool:
        hangs.set()
        return not goes_on.wait(20)

    with FakeController() as controller:
        config = WorkerConfig(model=str(model_dir), controllers=(controller.endpoint,), ttl_s=0.3)
        with ModelWorker(config, device="cpu", threads=1) as worker:
            controller.register(timeout_s=60, ttl_ms=600_000)
            with broken_forward(worker, hang, RuntimeError()):
                params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
                controller.request(m.Generate(1, "tiny", token_ids=m.pack_ids(PROMPTS[0]), params=params))
                assert hangs.wait(20)
                for rid in (2, 3):
                    controller.request(m.Generate(rid, "tiny", token_ids=m.pack_ids(PROMPTS[rid]), params=params))
                told = controller.expect(m.LOAD, timeout_s=20, where=lambda got: got.message.yours == 3).message
                assert (told.running, told.waiting) == (1, 2)
                goes_on.set()
                ended = 0
                while ended < 3:
                    ended += controller.expect(m.FIRST, m.MORE, m.DONE, timeout_s=20).head.kind == m.DONE


# --- what breaks -------------------------------------------------------------------------------


def test_a_request_that_breaks_the_forward_fails_alone(worker: ModelWorker) -> None:
    """Others that were in the batch go on with the tokens that would have come."""
    expected = alone(worker)
    error = torch.OutOfMemoryError("the device is full")

    async def scene() -> list[Any]:
        begun = [asyncio.Event() for _ in PROMPTS]
        others = [asyncio.create_task(ids_of(worker, job_of(p), e.set)) for p, e in zip(PROMPTS, begun, strict=True)]
        for event in begun:
            await event.wait()
        poisoned = asyncio.create_task(ids_of(worker, job_of([5, POISON, 6])))
        return list(await asyncio.gather(*others, poisoned, return_exceptions=True))

    with broken_forward(worker, lambda kwargs: bool((kwargs["input_ids"] == POISON).any()), error):
        *answers, failure = asyncio.run(scene())
    assert answers == expected
    assert failure is error
    assert alone(worker) == expected


def test_a_batch_that_is_too_large_goes_on_in_smaller_ones(worker: ModelWorker) -> None:
    """Each runs alone, but three at once are too many: nothing fails."""
    expected = alone(worker)
    with broken_forward(worker, lambda kwargs: kwargs["cu_seq_lens_q"].shape[0] > 3, MemoryError("three are too many")) as sizes:
        assert asyncio.run(together(worker, PROMPTS)) == expected
    assert 2 in sizes
    with broken_forward(worker, lambda _: False, RuntimeError()) as sizes:
        asyncio.run(together(worker, PROMPTS))
    assert max(sizes) == len(PROMPTS), "the bound outlived its cause"


def test_one_that_breaks_the_batch_with_any_other_beside_it_starves_nobody(worker: ModelWorker) -> None:
    """Each break gives each of them a token, and the next batch is smaller, so that in the end it runs alone."""
    expected = asyncio.run(together(worker, PROMPTS, max_tokens=60))
    quarrel = [5, POISON, 6]
    (own,) = asyncio.run(together(worker, [quarrel], max_tokens=60))
    engine: Any = worker._models["tiny"].engine
    breaks: list[int] = []

    def breaks_it(kwargs: Any) -> bool:
        batch = [engine._running[request].ids for request in engine._in_batch if request in engine._running]
        broken = len(batch) > 1 and any(ids[:3] == quarrel for ids in batch)
        breaks.extend([len(batch)] * broken)
        return broken

    with broken_forward(worker, breaks_it, RuntimeError("not beside me")) as sizes:
        *answers, answer = asyncio.run(together(worker, [*PROMPTS, quarrel], max_tokens=60))
    assert answers == expected
    assert answer == own
    assert breaks[0] == 7
    assert len(breaks) <= 20
    assert len(sizes) < 7 * 60, "so many it would take without batches"


def test_what_a_batch_may_hold_grows_again_while_there_is_work(worker: ModelWorker) -> None:
    """It breaks until one at a time is left, and then never again."""
    expected = asyncio.run(together(worker, PROMPTS, max_tokens=100))
    engine: Any = worker._models["tiny"].engine
    alone_from: list[int] = []

    def breaks_it(kwargs: Any) -> bool:
        if engine._limit == 1 and not alone_from:
            alone_from.append(len(sizes))
        return kwargs["cu_seq_lens_q"].shape[0] > 2 and not alone_from

    with broken_forward(worker, breaks_it, MemoryError("full")) as sizes:
        assert asyncio.run(together(worker, PROMPTS, max_tokens=100)) == expected
    assert max(sizes[alone_from[0] :]) > 1, "the bound outlived its cause"


def test_where_no_forward_has_memory_all_fail_with_the_cause_and_later_ones_work(worker: ModelWorker) -> None:
    error = torch.OutOfMemoryError("the device is full")
    with broken_forward(worker, lambda _: True, error):
        assert asyncio.run(together(worker, PROMPTS)) == [error] * len(PROMPTS)
    assert all(isinstance(ids, list) for ids in asyncio.run(together(worker, PROMPTS)))


@pytest.mark.parametrize("early", [False, True], ids=["in the forward", "before it"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_model_that_can_run_no_more_ends_its_worker_and_nobody_is_answered(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, early: bool, count: int
) -> None:
    """After a CUDA error that lasts, what the library does before a step may fail, too. Who was in the making goes on elsewhere."""
    with loaded(model_dir) as worker:
        engine: Any = worker._models["tiny"].engine
        died: Future[Exception] = Future()
        engine.on_death = died.set_result

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("device-side assert")

        async def scene() -> None:
            jobs = [job_of(prompt, max_tokens=100) for prompt in PROMPTS[:count]]
            for job in jobs:
                worker.begin(job)
            for job in jobs:
                await next_id(job)
            if early:
                monkeypatch.setattr(engine._manager.batch_processor, "reset", broken)
            monkeypatch.setattr(model_of(worker), "forward", broken)
            failure = await asyncio.wait_for(asyncio.wrap_future(died), 20)
            assert "device-side assert" in str(failure)
            await asyncio.to_thread(engine.join, 10)
            assert not engine.is_alive()
            late = job_of(PROMPTS[0])
            worker.begin(late)
            await asyncio.to_thread(worker._generator._tokenizing.submit(int).result)
            await asyncio.sleep(0)  # until what was handed over is received
            for job in (*jobs, late):
                made = [job.made.get_nowait() for _ in range(job.made.qsize())]
                assert all(isinstance(each, Delta) for each in made)
                worker.abandon(job)

        asyncio.run(scene())


def test_requests_that_break_the_forward_one_after_the_other_do_not_end_a_model_that_runs(worker: ModelWorker) -> None:
    error = RuntimeError("not with these ids")
    with broken_forward(worker, lambda kwargs: bool((kwargs["input_ids"] == POISON).any()), error):
        for _ in range(8):
            assert asyncio.run(together(worker, [[5, POISON, 6]])) == [error]
    assert worker._models["tiny"].engine.is_alive()


def test_a_suspect_that_is_cancelled_while_the_model_is_probed_holds_nobody_up(worker: ModelWorker) -> None:
    (expected,) = asyncio.run(together(worker, PROMPTS[:1]))
    probed, goes_on = threading.Event(), threading.Event()

    def breaks_it(kwargs: Any) -> bool:
        if bool((kwargs["input_ids"] == POISON).any()):
            return True
        if not probed.is_set():
            probed.set()
            goes_on.wait(20)
        return False

    async def scene() -> None:
        suspect = job_of([5, POISON, 6])
        worker.begin(suspect)
        await asyncio.to_thread(probed.wait, 20)
        other = asyncio.create_task(ids_of(worker, job_of(PROMPTS[0])))
        await asyncio.sleep(0)
        worker.abandon(suspect)
        goes_on.set()
        assert await other == expected
        assert suspect.made.empty()

    with broken_forward(worker, breaks_it, RuntimeError("not with these ids")):
        asyncio.run(scene())


def test_logits_that_no_token_can_be_drawn_from_fail_the_request_alone(worker: ModelWorker) -> None:
    """On a GPU the draw would be an assertion that ends all."""
    expected = asyncio.run(together(worker, PROMPTS[:1]))

    async def both() -> list[Any]:
        bad = job_of(PROMPTS[1], temperature=1.0, repetition_penalty=1e-300)
        return list(await asyncio.gather(ids_of(worker, job_of(PROMPTS[0])), ids_of(worker, bad), return_exceptions=True))

    good, failed = asyncio.run(both())
    assert [good] == expected
    assert isinstance(failed, BackendError)
    assert "not finite" in failed.message


def test_a_request_that_is_cancelled_while_the_batch_is_tried_again_does_not_hold_it_up(worker: ModelWorker) -> None:
    expected = alone(worker)
    broken = iter([True])

    async def scene() -> list[Any]:
        answering = answer_of(worker, job_of(PROMPTS[0]))
        others = asyncio.gather(*(ids_of(worker, job_of(prompt)) for prompt in PROMPTS[1:]))
        async with aclosing(answering) as deltas:
            async for _ in deltas:
                break
        return list(await others)

    with broken_forward(worker, lambda kwargs: kwargs["cu_seq_lens_q"].shape[0] > 3 and next(broken, False), RuntimeError("once")):
        assert asyncio.run(scene()) == expected[1:]


# --- coming and going --------------------------------------------------------------------------


def test_a_cancelled_request_leaves_within_a_step_and_frees_its_memory(worker: ModelWorker) -> None:
    engine: Any = worker._models["tiny"].engine
    cache = engine._manager.batch_processor.cache
    before = cache.compute_free_capacity()

    async def scene() -> None:
        answering = answer_of(worker, job_of([9] * 20, max_tokens=100))
        async with aclosing(answering) as deltas:
            async for _ in deltas:
                break
        made = len(sizes)
        await ids_of(worker, job_of(PROMPTS[0]))
        assert sizes[made + 1 :] == [1] * (len(sizes) - made - 1)

    with broken_forward(worker, lambda _: False, RuntimeError()) as sizes:
        asyncio.run(scene())
    # Whole pages stay, for a prompt that begins alike: 20 tokens are none.
    assert cache.compute_free_capacity() == before


async def next_id(job: AskedJob) -> int:
    """The id of the next delta."""
    delta = await job.made.get()
    assert isinstance(delta, Delta)
    return delta.token_ids[0]


def test_a_job_whose_controller_takes_nothing_waits_outside_the_batch(worker: ModelWorker) -> None:
    """Little piles up for it, others go on, and then it goes on where it was."""
    expected = alone(worker, max_tokens=60)

    async def scene() -> list[int]:
        job = job_of(PROMPTS[0], max_tokens=60)
        job.congested = True
        worker.begin(job)
        ids = [await next_id(job) for _ in range(STAY_TOKENS)]
        assert await ids_of(worker, job_of(PROMPTS[1], max_tokens=60)) == expected[1]
        assert job.made.empty()
        job.congested = False
        return ids + [await next_id(job) for _ in range(60 - STAY_TOKENS)]

    assert asyncio.run(scene()) == expected[0]


def test_a_prompt_that_cannot_fit_keeps_nobody_waiting(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers need seconds for a megabyte, and there is one for all requests."""
    encoded: list[str] = []
    monkeypatch.setattr(Checkpoint, "encode", lambda _, text: encoded.append(text))
    long = "the quick brown fox " * 10_000
    with pytest.raises(ContextOverflow, match=r"a prompt of 200000 characters has at least \d+ tokens") as caught:
        asyncio.run(ids_of(worker, AskedJob(m.Generate(1, "tiny", prompt=long))))
    assert CONTEXT < caught.value.tokens < len(long)
    with pytest.raises(ContextOverflow):
        asyncio.run(worker.count_tokens(m.CountTokens(1, "tiny", prompt=long)))
    with pytest.raises(ContextOverflow, match="a conversation of"):
        asyncio.run(ids_of(worker, AskedJob(m.Generate(1, "tiny", messages=[m.ChatMessage("user", long)]))))
    assert not encoded


def test_choices_share_their_stop_strings(worker: ModelWorker) -> None:
    stop = [f"{number}" * 1024 for number in range(8)]

    def answer(n: int) -> None:
        asyncio.run(ids_of(worker, job_of(PROMPTS[0], n=n, stop=stop, max_tokens=1)))

    one, many = (peak_bytes(partial(answer, n)) for n in (1, 32))
    assert many < 2 * one


class Flickering(AskedJob):
    """Congested whenever it has just got something, and not for long."""

    def emit(self, delta: Delta) -> None:
        super().emit(delta)
        self.congested = True
        asyncio.get_running_loop().call_soon(setattr, self, "congested", False)


def test_a_job_does_not_leave_the_batch_at_every_delta(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """To come back costs as much as some steps."""
    pauses: list[Generation] = []
    own = Generation.pause

    def pause(generation: Generation) -> None:
        pauses.append(generation)
        own(generation)

    monkeypatch.setattr(Generation, "pause", pause)
    (expected,) = asyncio.run(together(worker, PROMPTS[:1], max_tokens=100))
    assert asyncio.run(ids_of(worker, Flickering(job_of(PROMPTS[0], max_tokens=100).request))) == expected
    assert len(pauses) == 99 // STAY_TOKENS


def test_an_abandoned_job_is_not_tokenized(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or those that were cancelled in a hurry would keep the next ones waiting."""
    gate = threading.Event()
    prepared: list[object] = []
    own = LoadedModel.prepare

    def prepare(model: LoadedModel, job: AskedJob, grammar: Any) -> Any:
        prepared.append(job)
        gate.wait(10)
        return own(model, job, grammar)

    monkeypatch.setattr(LoadedModel, "prepare", prepare)

    async def ask() -> None:
        jobs: list[Any] = [job_of(PROMPTS[0]) for _ in range(5)]
        for job in jobs:
            worker.begin(job)
        for job in jobs:
            worker.abandon(job)
        gate.set()
        # Behind them on the tokenizer's thread.
        await worker.count_tokens(m.CountTokens(1, "tiny", prompt="a"))

    asyncio.run(ask())
    assert len(prepared) <= 1


def test_an_abandoned_job_gets_nothing_more(worker: ModelWorker) -> None:
    async def scene() -> None:
        early = job_of(PROMPTS[0])
        worker.begin(early)
        worker.abandon(early)
        late = job_of(PROMPTS[0])
        worker.begin(late)
        await late.made.get()
        worker.abandon(late)
        while not late.made.empty():
            late.made.get_nowait()
        await ids_of(worker, job_of(PROMPTS[1]))
        assert early.made.empty()
        assert late.made.empty()

    asyncio.run(scene())


def test_a_step_that_hangs_shows_and_does_not_keep_the_worker_from_ending(model_dir: Path) -> None:
    goes_on = threading.Event()
    hangs = threading.Event()

    def hang(_: Any) -> bool:
        hangs.set()
        return not goes_on.wait(20)

    async def scene() -> None:
        answering = asyncio.create_task(ids_of(made, job_of(PROMPTS[0])))
        await asyncio.get_running_loop().run_in_executor(None, hangs.wait)
        first = made.step_age_s()
        await asyncio.sleep(0)
        assert made.step_age_s() > first > 0
        engine = made._models["tiny"].engine
        await asyncio.get_running_loop().run_in_executor(None, engine.close, 0.1)
        assert engine.is_alive()
        assert engine.daemon
        goes_on.set()
        with pytest.raises(BackendError, match="stopped before the answer was complete"):
            await answering

    with loaded(model_dir) as made:
        assert made.step_age_s() == 0
        with broken_forward(made, hang, RuntimeError()):
            asyncio.run(scene())
            made._models["tiny"].engine.close()


def test_the_attention_is_the_one_that_was_asked_for(worker: ModelWorker, model_dir: Path) -> None:
    expected = alone(worker)
    with loaded(model_dir, attention="eager") as eager:
        assert model_of(eager).config._attn_implementation == "paged|eager"
        assert asyncio.run(together(eager, PROMPTS)) == expected
        model = model_of(eager)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ModelUnavailable, match="no_such_attention"), loaded(model_dir, attention="no_such_attention"):
        pass


@pytest.mark.parametrize("batches", [True, False], ids=["batch", "turns"])
def test_a_worker_whose_model_runs_no_more_ends_and_its_controller_hears_it(model_dir: Path, batches: bool) -> None:
    """What was in the making has no answer: it goes on elsewhere."""
    with FakeController() as controller:
        config = WorkerConfig(model=str(model_dir), controllers=(controller.endpoint,))
        worker = ModelWorker(config, device="cpu", threads=1)
        with nullcontext() if batches else without_batching(), worker:
            controller.register(timeout_s=60, ttl_ms=600_000)
            error = RuntimeError("device-side assert")
            model = model_of(worker)

            def broken(*_: object, **__: object) -> None:
                raise error

            model.forward = broken
            engine = worker._models["tiny"].engine
            if batches:
                engine._manager.batch_processor.reset = broken
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            controller.request(m.Generate(1, "tiny", token_ids=m.pack_ids(PROMPTS[0]), params=params))
            assert controller.expect(m.FAILED, m.BYE, timeout_s=20).head.kind == m.BYE
            with pytest.raises(BackendError, match="cannot run any more, the worker ends: RuntimeError: device-side assert"):
                worker.wait_ended(20)


# --- models that cannot be batched -------------------------------------------------------------


def test_a_model_that_a_batch_would_get_wrong_takes_turns(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers says of many models nothing, and answers wrongly."""
    from zmqserve.backends import loaded_model, row_sampling

    said = MagicMock()
    monkeypatch.setattr(loaded_model, "log", said)

    choose = row_sampling.RowSampling.__call__

    def wrong(self: Any, ids: Any, scores: Any, arguments: Any) -> Any:
        return choose(self, ids, scores.roll(1, dims=-1), arguments)

    monkeypatch.setattr(row_sampling.RowSampling, "__call__", wrong)
    with loaded(model_dir) as turns:
        assert len(asyncio.run(ids_of(turns, job_of(PROMPTS[0])))) == TOKENS
        assert type(turns._models["tiny"].engine).__name__ == "StepLoop"
    (event,), fields = said.warning.call_args
    assert event.startswith("no batching")
    assert "log probability" in fields["why"]


def test_words_come_out_of_a_batch(worker: ModelWorker) -> None:
    deltas: list[Delta] = []

    async def read() -> None:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        deltas.extend([delta async for delta in answer_of(worker, AskedJob(m.Generate(1, "tiny", prompt=WORDS, params=params)))])

    asyncio.run(read())
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    checkpoint = worker._models["tiny"].checkpoint
    assert "".join(delta.text for delta in deltas) == checkpoint.decode(ids).rstrip("\ufffd")
