"""What goes wrong with a request stays with that request."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.backends.echo import EchoWorker
from zmqserve.errors import (
    BackendError,
    ContextOverflow,
    GoingAway,
    InvalidParameter,
    MalformedMessage,
    OutOfMemory,
    Unauthenticated,
    UnknownModel,
    Unsupported,
    WorkerLost,
)
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.params import EmbedParams, SamplingParams

from .fakes.controller import FakeController, text_of
from .fakes.workers import ScriptWorker, config, endless, generate, serving


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with FakeController() as fake:
        yield fake


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ValueError("bad"), BackendError.code, "ValueError: bad"),
        (ValueError("long" * 1000), BackendError.code, "ValueError: longlong"),
        (KeyError(), BackendError.code, "KeyError"),
        (asyncio.CancelledError(), BackendError.code, "CancelledError"),
        (MemoryError(), OutOfMemory.code, "MemoryError"),
        (OutOfMemoryError("CUDA"), OutOfMemory.code, "OutOfMemoryError: CUDA"),
        (ContextOverflow("too long", data={"tokens": 9}), ContextOverflow.code, "too long"),
        (BackendError("half a character \ud800"), BackendError.code, "half a character ?"),
    ],
)
def test_a_request_that_raises_fails_alone(controller: FakeController, error: BaseException, code: int, text: str) -> None:
    async def fail(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("a")
        yield Delta("b")
        if job.request.prompt == "fail":
            raise error
        await asyncio.Event().wait()

    with serving(ScriptWorker(config(controller), fail), controller):
        controller.request(generate(1, "go on"))
        controller.expect(m.FIRST)
        controller.expect(m.MORE)
        controller.request(generate(2, "fail"))
        got = controller.answer_of(2)
        assert [each.head.kind for each in got] == [m.FIRST, m.MORE, m.FAILED]
        failed = got[-1].message
        assert (got[-1].head.code, failed.rid, failed.code) == (code, 2, code)
        assert failed.message.startswith(text)
        assert len(failed.message) <= 500
        assert failed.data == getattr(error, "data", {})
        controller.cancel(1)
        assert controller.expect(m.DONE).head.rid == 1


@pytest.mark.parametrize(
    "error",
    [
        BackendError("odd", data={"flag": True}),
        BackendError("odd", data={"ids": [1, 2]}),  # type: ignore[list-item]
        BackendError("odd", data={1: "a"}),  # type: ignore[dict-item]
        BackendError("odd", data=None),
        BackendError("odd", retry_after_ms=1.5),  # type: ignore[arg-type]
        BackendError(404),  # type: ignore[arg-type]
        Unauthenticated("odd: this is of the backend's own client"),
        GoingAway("odd: and so is this"),
    ],
    ids=str,
)
def test_an_error_that_no_client_could_read_or_may_be_told_is_made_into_one(controller: FakeController, error: Exception) -> None:
    async def fail(job: GenerateJob) -> AsyncIterator[Delta]:
        if job.request.rid:
            raise error
        yield Delta("")

    with serving(ScriptWorker(config(controller), fail), controller):
        controller.request(generate(1, "fail"))
        (failed,) = controller.answer_of(1)
        assert (failed.head.kind, failed.head.code, failed.message.code) == (m.FAILED, BackendError.code, BackendError.code)
        assert str(error.args[0]) in failed.message.message


def test_text_that_cannot_be_sent_spoils_no_other_stream(controller: FakeController) -> None:
    async def half(job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("a")
        yield Delta("\ud83d" if job.request.prompt == "bad" else "fine")

    with serving(ScriptWorker(config(controller), half), controller):
        for rid, prompt in ((1, "bad"), (2, "good")):
            controller.request(generate(rid, prompt))
        got = [*controller.answer_of(1), *controller.answer_of(2)]
        assert (text_of(got, 1), text_of(got, 2)) == ("a?", "afine")


@pytest.mark.parametrize(
    ("request_", "kind", "text"),
    [
        (m.Generate(1, "other", prompt="a"), UnknownModel, "only m"),
        (m.Generate(1, "m", prompt=""), InvalidParameter, "prompt is empty"),
        (m.Generate(1, "m"), InvalidParameter, "exactly one of"),
        (m.Generate(1, "m", prompt="a", params=SamplingParams(temperature=0.5)), Unsupported, "temperature .* script backend"),
        (m.Generate(1, "m", token_ids=m.pack_ids([1])), Unsupported, "token_ids"),
        (m.Generate(1, "m", messages=[m.ChatMessage("user", "a")]), Unsupported, "does not chat"),
        (m.Generate(1, "m", prompt="a", resume=m.Resume(b"", 0, 0)), WorkerLost, "cannot continue"),
        (m.Embed(1, "m", texts=["a"]), Unsupported, "does not embed; it can: generate, model_details"),
        (m.CountTokens(1, "m", prompt="a"), Unsupported, "does not count_tokens"),
    ],
)
def test_what_it_cannot_do_is_a_typed_error(controller: FakeController, request_: m.Request, kind: type[Any], text: str) -> None:
    with serving(ScriptWorker(config(controller), endless), controller):
        controller.request(request_)
        failed = controller.expect(m.FAILED).message
        assert failed.code == kind.code
        assert failed.retryable is False
        assert re.search(text, failed.message), failed.message


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        (m.Embed(1, "m", texts=["a"], params=EmbedParams(dimensions=10_000)), InvalidParameter),
        (m.Generate(1, "m", prompt="a", params=SamplingParams(logprobs=1)), Unsupported),
        (m.Generate(1, "m", prompt="a", fingerprint="other", resume=m.Resume(b"", 0, 0)), WorkerLost),
        (m.Generate(1, "m", prompt="a", params=SamplingParams(n=2), resume=m.Resume(b"", 0, 0)), WorkerLost),
        (m.Generate(1, "m", prompt="a !raise"), BackendError),
    ],
)
def test_what_the_echo_backend_refuses(controller: FakeController, request_: m.Request, kind: type[Any]) -> None:
    with serving(EchoWorker(config(controller), faults=True), controller):
        controller.request(request_)
        assert controller.answer_of(1)[-1].message.code == kind.code


def test_garbage_of_a_controller_costs_at_most_the_request(controller: FakeController) -> None:
    with serving(EchoWorker(config(controller)), controller) as worker:
        controller.socket.send_multipart([controller.worker, b"\xc1", b""])
        controller.socket.send_multipart([controller.worker, b"one frame"])
        controller.socket.send_multipart([controller.worker, b"three", b"frames", b"here"])
        controller.send(m.ControllerHead(99, controller.epoch + 1, 1, 50), m.encode(generate(50)))
        for rid, payload in enumerate((b"", b"\xc1", b"\x91" * 100_000, m.encode(m.Ping(1)), m.encode(generate(77))), 1):
            controller.request_bytes(payload, rid)
            got = controller.expect(m.FAILED)
            assert (got.head.rid, got.message.rid, got.message.code) == (rid, rid, MalformedMessage.code)
        controller.request(generate(9, "still here"))
        assert text_of(controller.answer_of(9), 9) == "still here"
        assert worker._links is not None
        (link,) = worker._links.workload.links
        assert (link.bad_frames, link.stale_frames) == (3, 1)
