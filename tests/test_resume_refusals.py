"""What cannot go on is a typed error, and its worker stays as it was."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zmqserve import messages as m
from zmqserve.admission import admit
from zmqserve.backends.echo import EchoWorker
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import BackendError, ContextOverflow, InvalidParameter, WorkerLost
from zmqserve.jobs import Delta, GenerateJob
from zmqserve.params import Guided, SamplingParams
from zmqserve.worker import BaseModelWorker, WorkerConfig

from .fakes.controller import FakeController
from .fakes.joins import PATIENCE_S, Asker, asked
from .fakes.tiny_llama import CONTEXT, make_model
from .processes import Served

TTL_MS = 600_000
LIMIT = 20
"""The echo worker's context, in words."""


@pytest.fixture(scope="module")
def echo() -> Iterator[Asker]:
    with FakeController() as controller:
        config = WorkerConfig(model="m", controllers=(controller.endpoint,))
        with EchoWorker(config, context_length=LIMIT, faults=True):
            yield Asker(controller, controller.register(ttl_ms=TTL_MS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    pytest.importorskip("torch")
    directory = make_model(tmp_path_factory.mktemp("models") / "tiny")
    with FakeController() as controller:
        config = WorkerConfig(model=str(directory), controllers=(controller.endpoint,))
        with ModelWorker(config, device="cpu", threads=1):
            asker = Asker(controller, controller.register(timeout_s=PATIENCE_S, ttl_ms=TTL_MS))
            asker.answer(asked("warm up", max_tokens=1))  # its threads start now, and not within a test
            yield asker


@pytest.fixture(scope="module", params=["echo", "model"])
def asker(request: pytest.FixtureRequest) -> Asker:
    found: Asker = request.getfixturevalue(request.param)
    return found


# --- nonsense ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resume", "params", "why"),
    [
        (m.Resume(b"\0\0\0\0\1", 1, 1), {}, "token_ids must be u32, 4 bytes each: got 5 bytes"),
        (m.Resume(b"", 0, 0, b"\1\2\3"), {}, "prompt_token_ids must be u32"),
        (m.Resume(b"", 0, 0, b""), {}, "prompt_token_ids is empty"),
        (m.Resume(m.pack_ids([0]), 0, 0), {}, "next_seq must be 1 or more where something was received, got 0 with 1 ids"),
        (m.Resume(b"", 1, 0), {"echo": True}, "next_seq must be 1 or more"),
        (m.Resume(m.pack_ids([0, 1]), 1000, 2), {}, r"characters is 1000, but the text of the ids received has only \d+"),
        (m.Resume(b"", 2**63 - 1, 2**63 - 1), {"echo": True}, r"the text of the ids received has only \d$"),
        (m.Resume(m.pack_ids([0, 1, 2]), 1, 2), {"max_tokens": 2}, r"holds 3 ids, but the answer was complete \(length\) after 2"),
        (m.Resume(m.pack_ids(range(3)), 1, 2), {"stop_token_ids": [0]}, r"holds 3 ids, but the answer was complete \(stop\) after 1"),
        (m.Resume(m.pack_ids(range(200)), 1, 2), {}, r"holds 200 ids, but the answer was complete"),
    ],
)
def test_a_resume_of_no_answer_is_the_callers_error(asker: Asker, resume: m.Resume, params: dict[str, Any], why: str) -> None:
    failed = asker.failure(asked("a b", resume=resume, **params))
    assert (failed.code, failed.retryable, failed.data["parameter"]) == (InvalidParameter.code, False, "resume")
    assert re.search(why, failed.message), failed.message
    assert asker.answer(asked("still here", max_tokens=2)).usage.completion_tokens == 2


def test_ids_that_the_model_does_not_know_are_named(model: Asker) -> None:
    for name, resume in (
        ("resume.token_ids", m.Resume(m.pack_ids([5, 320]), 0, 1)),
        ("resume.prompt_token_ids", m.Resume(b"", 0, 0, m.pack_ids([320]))),
    ):
        failed = model.failure(asked("the", resume=resume))
        assert (failed.code, failed.data["parameter"]) == (InvalidParameter.code, name)
        assert "holds 320, but the model's ids end at 319" in failed.message


def test_ids_of_another_answer_are_no_beginning_of_an_echo(echo: Asker) -> None:
    failed = echo.failure(asked("a b c", resume=m.Resume(m.pack_ids([0, 2]), 1, 2)))
    assert failed.code == InvalidParameter.code
    assert "must be 0 to 1 here" in failed.message


def test_what_never_fitted_the_context_does_not_fit_with_a_resume(asker: Asker) -> None:
    failed = asker.failure(asked("a b", max_tokens=CONTEXT, resume=m.Resume(m.pack_ids([0]), 1, 1)))
    assert failed.code == ContextOverflow.code


def test_a_resume_without_a_fingerprint_is_refused(asker: Asker) -> None:
    request = asked("a b c", max_tokens=3, resume=m.Resume(m.pack_ids([0]), 1, 1))
    asker.controller.request(msgspec.structs.replace(request, rid=9999, model=asker.card.name))
    (got,) = asker.controller.answer_of(9999)
    assert got.message.code == InvalidParameter.code
    assert "fingerprint" in got.message.message


# --- what cannot go on here --------------------------------------------------------------------


def check_lost(failed: m.Error, text: str) -> None:
    assert (failed.code, failed.retryable) == (WorkerLost.code, False)
    assert text in failed.message


def test_another_fingerprint_is_another_answer(asker: Asker) -> None:
    resume = m.Resume(m.pack_ids([0]), 1, 1)
    request = msgspec.structs.replace(asked("a b c", max_tokens=3, resume=resume), fingerprint="another")
    check_lost(asker.failure(request), "the answer began with 'another'")


def test_several_choices_do_not_go_on(echo: Asker) -> None:
    assert echo.card.resume == {"n": "refused"}
    check_lost(echo.failure(asked("a b c", n=2, resume=m.Resume(m.pack_ids([0]), 1, 1))), "cannot continue one with n")


HONOURS = frozenset({"n", "guided", "temperature", "top_k", "seed"})


def check(card: m.ModelCard, **params: Any) -> m.ModelCard:
    """What admission says of a resume with these parameters."""
    resume = m.Resume(m.pack_ids([0]), 1, 1)
    request = m.Generate(1, "m", fingerprint=card.fingerprint, prompt="a", params=SamplingParams(**params), resume=resume)
    return admit(request, {"m": card}, "some", HONOURS)


@pytest.mark.parametrize(
    ("resume", "params", "refused"),
    [
        ({}, {}, []),
        ({}, {"n": 2}, ["n"]),
        ({"n": "exact", "guided": "exact"}, {"n": 3, "guided": Guided(regex="a")}, ["n", "guided"]),
        ({"top_k": "refused"}, {"top_k": 5}, ["top_k"]),
        ({"top_k": "refused"}, {}, []),
        ({"top_k": "approximate"}, {"top_k": 5}, []),
        ({"greedy": "refused"}, {"temperature": 0}, ["greedy"]),
        ({"greedy": "refused"}, {}, []),
        ({"sampling": "refused"}, {}, ["sampling"]),
        ({"sampling": "refused"}, {"seed": 1}, []),
        ({"sampling": "refused"}, {"temperature": 0}, []),
        ({"seed": "refused", "top_k": "refused"}, {"seed": 1, "top_k": 5}, ["top_k", "seed"]),
    ],
)
def test_what_the_card_calls_refused_is_refused_by_name(resume: dict[str, str], params: dict[str, Any], refused: list[str]) -> None:
    card = m.ModelCard("m", "f", verbs=["generate"], features=["resume"], resume=resume)
    if not refused:
        assert check(card, **params) is card
        return
    with pytest.raises(WorkerLost) as caught:
        check(card, **params)
    assert caught.value.retryable is False
    assert caught.value.data["parameters"] == refused


class Declaring(BaseModelWorker):
    """Resumes, and says so in its class and on its card."""

    backend = "declaring"
    honours = frozenset({"n", "top_k"})
    resumes = {"top_k": "refused", "seed": "exact"}  # noqa: RUF012 - as a backend writes it

    def __init__(self, config: WorkerConfig, card: m.ModelCard) -> None:
        super().__init__(config)
        self.card = card

    def load(self) -> list[m.ModelCard]:
        return [self.card]

    async def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:
        yield Delta("x", (0,), finish_reason="stop")


def test_what_a_class_declares_is_on_its_card() -> None:
    with FakeController() as controller:
        config = WorkerConfig(model="m", controllers=(controller.endpoint,))
        card = m.ModelCard("m", "f", features=["other"], resume={"seed": "approximate"})
        with Declaring(config, card):
            (ready,) = controller.register().models
    assert ready.features == ["other", "resume"]
    assert ready.resume == {"top_k": "refused", "seed": "approximate", "n": "refused"}


@pytest.mark.parametrize(
    ("card", "why"),
    [(m.ModelCard("m"), "needs a fingerprint"), (m.ModelCard("m", "f", resume={"seed": "exactly"}), "must be one of approximate, exact")],
)
def test_a_declaration_that_nobody_could_keep_fails_at_load(card: m.ModelCard, why: str) -> None:
    with FakeController() as controller:
        worker = Declaring(WorkerConfig(model="m", controllers=(controller.endpoint,)), card)
        worker.start()
        try:
            with pytest.raises(InvalidParameter, match=why):
                worker.wait_ready(PATIENCE_S)
        finally:
            worker.stop()


# --- ends of a resumed answer ------------------------------------------------------------------


@pytest.mark.parametrize("delay_s", [0.0, 3600.0])
def test_a_resumed_echo_is_cancelled_like_any_other(delay_s: float) -> None:
    """In the step loop and in a task of its own; what was received is counted."""
    with FakeController() as controller:
        config = WorkerConfig(model="m", controllers=(controller.endpoint,))
        with EchoWorker(config, delay_per_token_s=delay_s):
            asker = Asker(controller, controller.register())
            rid = asker.send(asked("a b c", max_tokens=10**9, resume=m.Resume(m.pack_ids([0, 1, 2]), 5, 3)))
            if not delay_s:
                assert controller.expect(m.FIRST).message.seq == 3
            controller.cancel(rid)
            done = controller.answer_of(rid)[-1].message
            assert done.finish_reasons == ["cancelled"]
            assert done.usage.completion_tokens == done.seq >= 3
            controller.expect(m.LOAD, where=lambda got: got.message.running == 0)


def test_a_resumed_model_answer_is_cancelled_like_any_other(model: Asker) -> None:
    resume = m.Resume(m.pack_ids([5, 6, 7]), 0, 3)
    rid = model.send(asked("the", temperature=0, ignore_eos=True, resume=resume))
    first = model.controller.expect(m.FIRST, timeout_s=PATIENCE_S)
    assert first.message.seq == 3
    model.controller.cancel(rid)
    done = model.controller.answer_of(rid)[-1].message
    assert done.finish_reasons in (["cancelled"], ["length"])
    assert done.usage.completion_tokens == done.seq + (done.last is not None) >= 4


def test_a_delayed_echo_delays_the_rest_by_a_token_only() -> None:
    """The first token has come already: an hour's wait for it would end the test."""
    with FakeController() as controller:
        config = WorkerConfig(model="m", controllers=(controller.endpoint,))
        with EchoWorker(config, delay_first_s=3600, delay_per_token_s=0.001):
            asker = Asker(controller, controller.register())
            rest = asker.answer(asked("a b c", resume=m.Resume(m.pack_ids([0]), 1, 1)))
            assert rest.text == " b c"


def test_a_word_that_fails_its_worker_fails_the_next_one_too(echo: Asker) -> None:
    failed = echo.failure(asked("a b !raise c", resume=m.Resume(m.pack_ids([0, 1]), 3, 2)))
    assert failed.code == BackendError.code


def test_a_word_that_kills_its_worker_kills_the_next_one_too(tmp_path: Path) -> None:
    for resume in (None, m.Resume(m.pack_ids([0, 1]), len("a b"), 2)):
        with FakeController() as controller:
            arguments = ("worker", "echo", "--model", "m", "--faults", "--controller", controller.endpoint)
            with Served(*arguments, env={"TMPDIR": str(tmp_path)}) as served:
                asker = Asker(controller, controller.register(timeout_s=PATIENCE_S))
                asker.send(asked("a b !die c", resume=resume))
                assert served.process.wait(PATIENCE_S) == 70
