"""What a worker sends for the requests that it takes: streams, other verbs, slots, cancels and deadlines."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import zmq

from zmqserve import messages as m
from zmqserve.answers import Job
from zmqserve.backends.echo import EchoWorker
from zmqserve.errors import (
    BackendError,
    DeadlineExceeded,
    InvalidParameter,
)
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.sockets import SocketLimits
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .fakes.controller import FakeController, chunks_of, text_of
from .fakes.workers import ScriptWorker, config, endless, generate, serving, until


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with FakeController() as fake:
        yield fake


def test_a_stream_is_first_more_done_and_its_seq_has_no_gap(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller) as worker:
        controller.request(generate(7, "a b c", max_tokens=50), client=3, queue_ms=12.5)
        got = controller.answer_of(7)
        kinds = [each.head.kind for each in got]
        assert kinds == [m.FIRST, *[m.MORE] * (len(got) - 2), m.DONE]
        assert {(each.head.epoch, each.head.client) for each in got} == {(controller.epoch, 3)}
        assert {each.head_bytes for each in got[1:-1]} == {m.more_head(controller.epoch, 3)}
        chunks = chunks_of(got, 7)
        assert [chunk.seq for chunk in chunks] == list(range(50))
        assert m.unpack_ids(b"".join(chunk.token_ids for chunk in chunks)) == list(range(50))
        done = got[-1].message
        assert done.seq == done.last.seq == 49
        assert done.finish_reasons == ["length"]
        assert done.usage == m.Usage(3, 50)
        assert (done.timings.worker, done.timings.queue_ms) == (worker.name, 12.5)
        assert 0 < done.timings.first_ms <= done.timings.total_ms
        assert got[-1].head == m.WorkerHead(m.DONE, controller.epoch, 3, 7, "length", 0, 3, 50)


def test_an_answer_of_one_chunk_is_one_message(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller):
        controller.request(generate(7, "hello"))
        (got,) = controller.answer_of(7)
        assert got.message.last == m.Chunk(7, 0, 0, "hello", m.pack_ids([0]))
        assert got.message.finish_reasons == ["stop"]


def test_a_generator_that_just_ends_means_stop(controller: FakeController) -> None:
    async def two(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("a", (1, 2))
        yield Delta("b", (3,))

    with serving(ScriptWorker(config(controller), two), controller):
        controller.request(generate(1))
        got = controller.answer_of(1)
        assert [each.head.kind for each in got] == [m.FIRST, m.MORE, m.DONE]
        assert got[-1].message == m.Done(1, 2, ["stop"], m.Usage(0, 3), got[-1].message.timings)


def test_what_is_made_in_one_step_leaves_as_one_message_per_client(controller: FakeController) -> None:
    streams, tokens = 8, 20
    begun: list[GenerateJob] = []
    all_begun: list[asyncio.Event] = []

    async def in_step(job: GenerateJob) -> AsyncIterator[Delta]:
        if not all_begun:
            all_begun.append(asyncio.Event())
        begun.append(job)
        if len(begun) == streams:
            all_begun[0].set()
        await all_begun[0].wait()
        for k in range(tokens):
            yield Delta(f"{k} ", (k,))
            await asyncio.sleep(0)

    with serving(ScriptWorker(config(controller, slots=streams), in_step), controller):
        for rid in range(1, streams + 1):
            controller.request(generate(rid), client=rid % 2)
        got = [controller.expect(m.FIRST, m.MORE, m.DONE) for _ in range(streams)]
        while sum(each.head.kind == m.DONE for each in got) < streams:
            got.append(controller.expect(m.FIRST, m.MORE, m.DONE))
        for rid in range(1, streams + 1):
            assert [chunk.seq for chunk in chunks_of(got, rid)] == list(range(tokens))
            assert [each.head.kind for each in got if each.head.rid == rid] == [m.FIRST, m.DONE]
        more = [each for each in got if each.head.kind == m.MORE]
        assert len(more) <= 2 * tokens
        for each in more:
            assert {chunk.rid % 2 for chunk in getattr(each.message, "chunks", [each.message])} == {each.head.client}


def test_choices_share_one_count_and_end_together(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller):
        controller.request(generate(1, "a b", n=3))
        got = controller.answer_of(1)
        chunks = chunks_of(got, 1)
        assert [chunk.seq for chunk in chunks] == list(range(6))
        assert {index: "".join(c.text for c in chunks if c.index == index) for index in range(3)} == dict.fromkeys(range(3), "a b")
        assert got[-1].message.finish_reasons == ["stop"] * 3
        assert got[-1].message.usage == m.Usage(2, 6)


def test_without_stream_there_is_one_reply(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller):
        controller.request(generate(1, "a b", stream=False, n=2, max_tokens=3))
        (got,) = controller.answer_of(1)
        choice = m.Choice("a b a", m.pack_ids([0, 1, 2]), "length")
        assert got.message == m.Reply(1, [choice, choice], m.Usage(2, 6), got.message.timings)
        assert got.head.outcome == "length"


def test_a_resumed_answer_goes_on_where_it_was(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller):
        request = m.Generate(1, "m", fingerprint="echo-1", prompt="a b c", resume=m.Resume(m.pack_ids([0]), 1, 5))
        controller.request(request)
        got = controller.answer_of(1)
        assert text_of(got, 1) == " b c"
        assert [chunk.seq for chunk in chunks_of(got, 1)] == [5, 6]
        assert got[-1].message.usage == m.Usage(3, 3)


def test_a_backend_with_its_own_step_loop_needs_no_task_per_request(controller: FakeController) -> None:
    class Stepper(ScriptWorker):
        """Makes three steps for all jobs, each in one callback."""

        def __init__(self, config: WorkerConfig) -> None:
            super().__init__(config, endless)
            self.jobs: list[Job] = []
            self.abandoned: list[Job] = []

        def begin(self, job: Job) -> None:
            self.jobs.append(job)
            if len(self.jobs) == 2:
                asyncio.get_running_loop().call_soon(self.step, 0)

        def abandon(self, job: Job) -> None:
            self.abandoned.append(job)

        def step(self, k: int) -> None:
            for job in self.jobs:
                job.emit(Delta(str(k), (k,), finish_reason="length" if k == 2 else None))
                if k == 2:
                    job.finish()
            if k < 2:
                asyncio.get_running_loop().call_soon(self.step, k + 1)
            else:
                self.jobs.clear()

    stepper = Stepper(config(controller))
    with serving(stepper, controller):
        controller.request(generate(1))
        controller.request(generate(2))
        got = [controller.expect(m.FIRST, m.MORE, m.DONE) for _ in range(5)]
        assert [each.head.kind for each in got] == [m.FIRST, m.FIRST, m.MORE, m.DONE, m.DONE]
        assert [chunk.rid for chunk in got[2].message.chunks] == [1, 2]
        assert text_of(got, 1) == text_of(got, 2) == "012"
        controller.request(generate(3))
        controller.cancel(3)
        assert controller.expect(m.DONE).message.finish_reasons == ["cancelled"]
        assert [job.request.rid for job in stepper.abandoned] == [3]


@pytest.mark.parametrize("backend", ["task", "step loop"])
def test_while_the_controller_does_not_read_generation_pauses_and_nothing_is_lost(backend: str) -> None:
    jobs: list[Job] = []
    tokens = 4000

    class Noting(EchoWorker):
        """Remembers its jobs."""

        def begin(self, job: Job) -> None:
            jobs.append(job)
            if backend == "task":
                BaseModelWorker.begin(self, job)
            else:
                super().begin(job)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    settings = WorkerConfig(
        model="m", controllers=("inproc://workers",), context=context, outbox_bytes=50_000, limits=SocketLimits(pipe_messages=10)
    )
    with FakeController("inproc://workers", context=context) as controller, serving(Noting(settings), controller):
        controller.request(generate(1, "x" * 1000, max_tokens=tokens))
        until(lambda: bool(jobs) and jobs[0].congested)
        got = controller.answer_of(1)
        assert [chunk.seq for chunk in chunks_of(got, 1)] == list(range(tokens))
    context.term()


def test_embeds_counts_and_describes(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller), dimensions=8), controller):
        controller.request(m.Embed(1, "m", texts=["a b", "c"]))
        got = controller.expect(m.DONE)
        assert (got.message.dtype, got.message.shape, len(got.message.data)) == ("float32", (2, 8), 64)
        assert (got.message.usage, got.head.outcome, got.head.prompt_tokens) == (m.Usage(3, 0), "ok", 3)
        controller.request(m.CountTokens(2, "m", prompt="a b c"))
        assert controller.expect(m.DONE).message == m.Tokens(2, 3, 0)
        controller.request(m.ModelDetails(3, "m"))
        details = controller.expect(m.DONE).message
        assert (details.card.name, details.card.fingerprint, details.card.embedding_dim) == ("m", "echo-1", 8)


def test_an_answer_over_the_message_limit_is_an_error_and_not_a_lost_connection(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller, limits=SocketLimits(message_bytes=1000))), controller):
        controller.request(m.Embed(1, "m", texts=["a"]))
        assert "over the limit of 1000 bytes" in controller.expect(m.FAILED).message.message
        controller.request(generate(2, "a"))
        controller.expect(m.DONE)


@pytest.mark.parametrize("own", [True, False])
def test_a_piece_over_the_message_limit_ends_its_own_answer_only(controller: FakeController, own: bool) -> None:
    async def pieces(job: GenerateJob) -> AsyncIterator[Delta]:
        for size in job.request.prompt.split() if job.request.prompt else ():
            yield Delta("\N{SNOWMAN}" * int(size), (1,))
            await asyncio.sleep(0)

    limits = SocketLimits(message_bytes=10_000) if own else SocketLimits()
    controller.message_bytes = 0 if own else 10_000
    with serving(ScriptWorker(config(controller, limits=limits), pieces), controller):
        for rid, prompt, kinds in ((1, "4000", [m.FAILED]), (2, "1 4000 1", [m.FIRST, m.FAILED]), (3, "1 3000", [m.FIRST, m.MORE, m.DONE])):
            controller.request(generate(rid, prompt))
            got = controller.answer_of(rid)
            assert [each.head.kind for each in got] == kinds
            if kinds[-1] == m.FAILED:
                assert got[-1].message.code == BackendError.code
                assert "over the limit of 10000 bytes" in got[-1].message.message


@pytest.mark.parametrize("what", ["texts", "ids", "logprobs"])
def test_a_whole_answer_is_given_up_as_soon_as_it_is_over_the_message_limit(controller: FakeController, what: str) -> None:
    deltas = {
        "texts": Delta("x" * 1000),
        "ids": Delta("", (1,) * 250),
        "logprobs": Delta("", (), logprobs=[m.TokenLogprob(1, "x" * 500, -1.0, [m.TopLogprob(1, "y" * 500, -1.0)])]),
    }
    made: list[int] = []

    async def pieces(job: GenerateJob) -> AsyncIterator[Delta]:
        for k in range(int(job.request.prompt or "")):
            made.append(k)
            yield deltas[what]

    controller.message_bytes = 11_900
    with serving(ScriptWorker(config(controller), pieces), controller):
        controller.request(generate(1, "11", stream=False))
        assert isinstance(controller.expect(m.DONE).message, m.Reply)
        made.clear()
        controller.request(generate(2, "1000", stream=False))
        failed = controller.expect(m.FAILED).message
        assert (failed.code, len(made)) == (BackendError.code, 12)
        assert "over the limit of 11900 bytes" in failed.message


def test_an_error_over_the_message_limit_is_shortened(controller: FakeController) -> None:
    async def fail(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("first")
        raise InvalidParameter("x" * 50_000)

    with serving(ScriptWorker(config(controller, limits=SocketLimits(message_bytes=10_000)), fail), controller):
        controller.request(generate(1))
        failed = controller.answer_of(1)[-1].message
        assert (failed.code, failed.message) == (InvalidParameter.code, "x" * 497 + "...")


@pytest.mark.parametrize("logprobs", [False, True])
def test_what_one_turn_makes_leaves_in_messages_under_the_limit(controller: FakeController, logprobs: bool) -> None:
    entries = [m.TokenLogprob(1, "\N{SNOWMAN}" * 50, -1.0, [m.TopLogprob(2, "x" * 100, -2.0)] * 5)] if logprobs else None

    async def one_turn(job: GenerateJob) -> AsyncIterator[Delta]:
        for k in range(300):
            yield Delta("\N{SNOWMAN}" * 100, (k,), logprobs=entries)

    limit = 20_000
    controller.message_bytes = limit
    with serving(ScriptWorker(config(controller), one_turn), controller):
        controller.request(generate(1))
        got = controller.answer_of(1)
        assert [chunk.seq for chunk in chunks_of(got, 1)] == list(range(300))
        sizes = [len(m.encode(each.message)) for each in got]
        assert max(sizes) <= limit
        assert len(sizes) < 200, "they still leave together"


def test_a_backend_that_never_pauses_is_paused_once_its_controller_takes_no_more(controller: FakeController) -> None:
    made: list[int] = []

    async def endless_turn(job: GenerateJob) -> AsyncIterator[Delta]:
        for k in range(10**9):
            made.append(k)
            yield Delta("x" * 10_000, (k,))

    with serving(ScriptWorker(config(controller, outbox_bytes=100_000), endless_turn), controller):
        controller.request(generate(1))
        controller.expect(m.FIRST)
        controller.cancel(1)
        got = controller.answer_of(1)
        assert got[-1].head.outcome == "cancelled"
        assert len(chunks_of(got, 1)) + 1 == len(made)


def test_more_than_its_slots_is_busy_but_questions_need_no_slot(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller, slots=2), endless), controller):
        controller.request(generate(1))
        controller.request(generate(2))
        controller.request(generate(3))
        got = [controller.expect(m.FIRST, m.BUSY) for _ in range(3)]
        assert [each.head.rid for each in got if each.head.kind == m.BUSY] == [3]
        controller.request(m.ModelDetails(4, "m"))
        assert controller.expect(m.DONE).head.rid == 4
        controller.cancel(1)
        assert controller.expect(m.DONE).head.rid == 1
        controller.request(generate(5))
        assert controller.expect(m.FIRST).head.rid == 5


def test_cancel_ends_the_generation_at_once_and_is_idempotent(controller: FakeController) -> None:
    ended = threading.Event()
    made: list[int] = []

    async def steady(job: GenerateJob) -> AsyncIterator[Delta]:
        try:
            for k in range(10**9):
                made.append(k)
                yield Delta("x", (k,))
                await asyncio.sleep(0.001)
        finally:
            ended.set()

    with serving(ScriptWorker(config(controller), steady), controller):
        controller.request(generate(1), client=4)
        controller.expect(m.FIRST)
        for rid, client in ((1, 5), (2, 4), (1, 4), (1, 4)):
            controller.cancel(rid, client=client)
        got = controller.answer_of(1)
        assert ended.is_set()
        assert got[-1].head.outcome == "cancelled"
        assert got[-1].message.finish_reasons == ["cancelled"]
        assert got[-1].message.usage.completion_tokens == len(made), "every token made was sent"
        controller.cancel(1, client=4)
        controller.request(m.ModelDetails(9, "m"))
        assert controller.expect(m.DONE).head.rid == 9


def test_cancelled_before_it_began_it_ends_too(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller), endless), controller):
        for rid in range(1, 20):
            controller.request(generate(rid, stream=rid % 2 == 0))
            controller.cancel(rid)
            assert controller.answer_of(rid)[-1].head.outcome == "cancelled"


def test_a_deadline_ends_a_request_and_no_other(controller: FakeController) -> None:
    with serving(ScriptWorker(config(controller), endless), controller):
        controller.request(generate(1), deadline_ms=30)
        controller.request(generate(2))
        got = [controller.expect(m.FIRST, m.FAILED) for _ in range(3)]
        assert got[-1].head.kind == m.FAILED
        assert got[-1].message.code == DeadlineExceeded.code
        assert "30 ms" in got[-1].message.message
        controller.cancel(2)
        controller.expect(m.DONE)


def test_a_token_per_turn_however_often_streams_were_closed_and_opened(controller: FakeController) -> None:
    """Each close leaves a step that is due already: another loop beside it would make two tokens in a turn."""
    turns: list[int] = []

    class Counting(EchoWorker):
        """Notes how many of its steps run in each turn of the event loop."""

        def begin(self, job: Job) -> None:
            for _ in range(20):
                super().begin(job)
                self.abandon(job)
            super().begin(job)
            asyncio.get_running_loop().call_soon(self.turn, job, 0)

        def turn(self, job: Job, before: int) -> None:
            turns.append(job.completion_tokens - before)
            if not job.answer.ended:
                asyncio.get_running_loop().call_soon(self.turn, job, job.completion_tokens)

    with serving(Counting(config(controller)), controller):
        controller.request(generate(1, max_tokens=50))
        controller.answer_of(1)
    assert max(turns) == 1
