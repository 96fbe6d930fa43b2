"""ModelWorker's answers that are held to a form, with a model that says nothing of the kind by itself."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from zmqserve.admission import admit
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import InvalidParameter, WorkerLost
from zmqserve.jobs import Delta
from zmqserve.messages import Generate, Resume, pack_ids
from zmqserve.params import Guided, SamplingParams
from zmqserve.resuming import declared
from zmqserve.worker import WorkerConfig

from .fakes.asked import AskedJob, answer_of
from .fakes.engines import without_batching
from .fakes.lora_adapter import make_adapter
from .fakes.tiny_llama import make_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from zmqserve.backends.generation import STAY_TOKENS  # noqa: E402 - it imports torch
from zmqserve.backends.guided import Grammars  # noqa: E402 - the same

pytestmark = pytest.mark.timeout(300)

PROMPT = [5, 6, 7, 8]
EOS = 2
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 10, "maximum": 99}, "b": {"enum": ["x", "yy"]}}}
PERSON = Guided(json=json.dumps({**SCHEMA, "required": ["a", "b"], "additionalProperties": False}))
LETTERS = Guided(regex="[a-f]{40}")
SAMPLED: dict[str, Any] = {"temperature": 3.0, "seed": 5}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", params=["batch", "turns"])
def worker(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelWorker]:
    adapter = make_adapter(tmp_path_factory.mktemp("adapters") / "poet", str(model_dir))
    made = ModelWorker(WorkerConfig(model=str(model_dir)), device="cpu", threads=1, lora={"poet": str(adapter)})
    with nullcontext() if request.param == "batch" else without_batching():
        made.cards = made.load()
    ask(made, max_tokens=1)
    ask(made, max_tokens=1, guided=LETTERS)  # its threads start now, and not within a test
    yield made
    made.close()


def job_of(prompt: list[int] = PROMPT, model: str = "tiny", **params: Any) -> AskedJob:
    params = {"temperature": 0, "max_tokens": 60, **params}
    return AskedJob(Generate(1, model, token_ids=pack_ids(prompt), params=SamplingParams(**params)))


async def answer(worker: ModelWorker, job: AskedJob) -> list[Delta]:
    return [delta async for delta in answer_of(worker, job)]


def ask(worker: ModelWorker, **asked: Any) -> list[Delta]:
    return asyncio.run(answer(worker, job_of(**asked)))


def text_of(deltas: list[Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in deltas if delta.index == index)


def ids_of(deltas: list[Delta], index: int = 0) -> list[int]:
    return [token_id for delta in deltas if delta.index == index for token_id in delta.token_ids]


# --- an answer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, SAMPLED, {**SAMPLED, "top_k": 3}, {**SAMPLED, "top_p": 0.1, "min_p": 0.5}], ids=str)
def test_an_answer_has_its_form_and_ends_by_itself(worker: ModelWorker, params: dict[str, Any]) -> None:
    deltas = ask(worker, guided=PERSON, **params)
    said = json.loads(text_of(deltas))
    assert set(said) == {"a", "b"}
    assert 10 <= said["a"] <= 99
    assert deltas[-1].finish_reason == "stop"
    assert ids_of(deltas)[-1] == EOS


def test_penalties_do_not_lead_out_of_the_form(worker: ModelWorker) -> None:
    plain = text_of(ask(worker, guided=LETTERS))
    penalized = text_of(ask(worker, guided=LETTERS, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=2.0))
    assert penalized != plain
    assert re.fullmatch("[a-f]{40}", penalized)


def test_a_seed_repeats_an_answer(worker: ModelWorker) -> None:
    first, second, other = (ids_of(ask(worker, guided=LETTERS, temperature=3.0, seed=seed)) for seed in (5, 5, 6))
    assert first == second
    assert first != other


def test_choices_stand_each_at_their_own_place(worker: ModelWorker) -> None:
    deltas = ask(worker, guided=LETTERS, n=3, **SAMPLED)
    texts = [text_of(deltas, index) for index in range(3)]
    assert all(re.fullmatch("[a-f]{40}", text) for text in texts)
    assert len(set(texts)) == 3
    assert texts[0] == text_of(ask(worker, guided=LETTERS, **SAMPLED))


def test_a_form_that_is_cut_ends_with_length(worker: ModelWorker) -> None:
    deltas = ask(worker, guided=LETTERS, max_tokens=4)
    assert deltas[-1].finish_reason == "length"
    assert re.fullmatch("[a-f]+", text_of(deltas))
    assert len(ids_of(deltas)) == 4


def test_an_adapters_answers_have_their_form_too(worker: ModelWorker) -> None:
    texts = {model: text_of(ask(worker, model=model, guided=LETTERS)) for model in ("tiny", "poet")}
    assert all(re.fullmatch("[a-f]{40}", text) for text in texts.values())
    assert len(set(texts.values())) == 2


def test_a_form_holds_the_answer_and_not_the_prompt_before_it(worker: ModelWorker) -> None:
    plain = text_of(ask(worker, guided=LETTERS))
    assert text_of(ask(worker, guided=LETTERS, echo=True)).endswith(plain)
    assert len(text_of(ask(worker, guided=LETTERS, echo=True))) > len(plain)


def test_logprobs_are_among_what_the_form_allows(worker: ModelWorker) -> None:
    deltas = ask(worker, guided=Guided(choice=["ab", "b"]), logprobs=5)
    entries = [entry for delta in deltas for entry in delta.logprobs or ()]
    assert len(entries) == len(ids_of(deltas))
    assert {top.text for top in entries[0].top} == {"a", "b"}
    assert sum(2.718281828**top.logprob for top in entries[0].top) == pytest.approx(1, abs=1e-4)
    assert entries[-1].logprob == pytest.approx(0, abs=1e-6)
    assert [top.token_id for top in entries[-1].top] == [EOS]


# --- its end -----------------------------------------------------------------------------------


def test_min_tokens_holds_off_the_end_while_the_form_goes_on(worker: ModelWorker) -> None:
    assert len(ids_of(ask(worker, guided=Guided(regex="[a-f]{1,40}"), min_tokens=20, **SAMPLED))) >= 20
    deltas = ask(worker, guided=Guided(regex="[a-f]{3}"), min_tokens=20)
    assert deltas[-1].finish_reason == "stop"
    assert re.fullmatch("[a-f]{3}", text_of(deltas))


def test_an_end_that_is_ignored_ends_a_form_that_is_complete(worker: ModelWorker) -> None:
    deltas = ask(worker, guided=Guided(regex="[a-f]{1,30}"), ignore_eos=True, **SAMPLED)
    assert deltas[-1].finish_reason == "stop"
    assert re.fullmatch("[a-f]{30}", text_of(deltas))
    assert ask(worker, guided=Guided(regex="[a-f]*"), ignore_eos=True, **SAMPLED)[-1].finish_reason == "length"


def test_stop_strings_and_stop_ids_end_a_guided_answer(worker: ModelWorker) -> None:
    deltas = ask(worker, guided=LETTERS)
    text, ids = text_of(deltas), ids_of(deltas)
    stopped = ask(worker, guided=LETTERS, stop=[text[5:7]])
    assert text_of(stopped) == text[: text.index(text[5:7])]
    assert stopped[-1].finish_reason == "stop"
    by_id = ask(worker, guided=LETTERS, stop_token_ids=[ids[4]])
    assert ids_of(by_id) == ids[: ids.index(ids[4]) + 1]
    assert by_id[-1].finish_reason == "stop"


# --- beside others -----------------------------------------------------------------------------


def test_others_answers_are_those_they_had_alone(worker: ModelWorker) -> None:
    prompts = [[5, 6, 7 + i, 8, 40 + i] for i in range(3)]
    asked: list[dict[str, Any]] = [{"prompt": prompt, "ignore_eos": True, "max_tokens": 40} for prompt in prompts]
    asked += [{"guided": LETTERS}, {"guided": LETTERS, **SAMPLED}, {"guided": PERSON}]
    alone = [ids_of(ask(worker, **each)) for each in asked]

    async def together() -> list[list[int]]:
        return [ids_of(deltas) for deltas in await asyncio.gather(*(answer(worker, job_of(**each)) for each in asked))]

    assert asyncio.run(together()) == alone


@pytest.mark.parametrize("params", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_that_was_paused_goes_on_at_its_place(worker: ModelWorker, params: dict[str, Any]) -> None:
    """Its controller takes nothing for a while: what was made meanwhile is lost, and made again."""
    expected = ids_of(ask(worker, guided=LETTERS, **params))

    async def scene() -> list[int]:
        job = job_of(guided=LETTERS, **params)
        job.congested = True
        worker.begin(job)
        deltas = [await job.made.get() for _ in range(STAY_TOKENS)]
        await answer(worker, job_of())
        assert job.made.empty()
        job.congested = False
        while (delta := await job.made.get()) is not None:
            deltas.append(delta)
        return ids_of([delta for delta in deltas if isinstance(delta, Delta)])

    assert asyncio.run(scene()) == expected


@pytest.mark.parametrize("worker", ["batch"], indirect=True)
def test_a_batch_that_breaks_after_the_choice_loses_no_place(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen in the step that broke was never taken: it is chosen again, and with another draw."""
    engine: Any = worker._models["tiny"].engine
    call = type(engine._rows).__call__
    chosen: list[int] = []

    def breaks(rows: Any, ids: Any, scores: Any, args: Any) -> Any:
        call(rows, ids, scores, args)
        chosen.append(len(rows.chosen))
        if len(rows.chosen) > 1 and len(chosen) % 4 == 0:
            raise MemoryError("the step broke when all was chosen")
        return scores

    async def scene() -> list[list[Delta]]:
        return list(await asyncio.gather(*(answer(worker, job_of(guided=LETTERS, temperature=3.0)) for _ in range(2))))

    monkeypatch.setattr(type(engine._rows), "__call__", breaks)
    for deltas in asyncio.run(scene()):
        assert re.fullmatch("[a-f]{40}", text_of(deltas))
    assert 2 in chosen[3::4], "no step broke"


def test_a_form_that_takes_long_to_compile_keeps_nobody_waiting(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    own = Grammars.compile

    def compiled(grammars: Grammars, guided: Guided) -> Any:
        assert gate.wait(30)
        return own(grammars, guided)

    monkeypatch.setattr(Grammars, "compile", compiled)

    async def scene() -> str:
        waiting = asyncio.create_task(answer(worker, job_of(guided=LETTERS)))
        assert len(ids_of(await answer(worker, job_of(ignore_eos=True, max_tokens=5)))) == 5
        assert not waiting.done()
        gate.set()
        return text_of(await waiting)

    assert re.fullmatch("[a-f]{40}", asyncio.run(scene()))


def test_one_that_is_given_up_before_its_form_was_compiled_is_not_compiled(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    compiled: list[Guided] = []
    own = Grammars.compile

    def compiling(grammars: Grammars, guided: Guided) -> Any:
        compiled.append(guided)
        assert gate.wait(30)
        return own(grammars, guided)

    monkeypatch.setattr(Grammars, "compile", compiling)

    async def scene() -> None:
        first = asyncio.create_task(answer(worker, job_of(guided=LETTERS)))
        given_up = job_of(guided=PERSON)
        worker.begin(given_up)
        worker.abandon(given_up)
        gate.set()
        await first
        await answer(worker, job_of(guided=Guided(choice=["a"])))

    asyncio.run(scene())
    assert PERSON not in compiled


@pytest.mark.parametrize("guided", [Guided(json="{"), Guided(regex="("), Guided(grammar="?"), Guided(json='{"not": {}}')], ids=repr)
def test_a_form_that_is_none_fails_its_request_alone(worker: ModelWorker, guided: Guided) -> None:
    with pytest.raises(InvalidParameter, match="guided"):
        ask(worker, guided=guided)
    assert json.loads(text_of(ask(worker, guided=PERSON)))


def test_what_goes_wrong_on_the_way_fails_its_request_alone(worker: ModelWorker) -> None:
    async def scene() -> list[Any]:
        bomb = job_of(guided=Guided(regex="(([a-f]{1,100}){1,100}){1,100}"), max_tokens=100, ignore_eos=True)
        asked = [answer(worker, bomb), answer(worker, job_of(guided=LETTERS))]
        return list(await asyncio.gather(*asked, return_exceptions=True))

    failure, good = asyncio.run(scene())
    assert isinstance(failure, InvalidParameter)
    assert failure.data["parameter"] == "guided.regex"
    assert re.fullmatch("[a-f]{40}", text_of(good))


def test_a_guided_answer_does_not_go_on_elsewhere(worker: ModelWorker) -> None:
    card = declared(worker.cards[0], worker.resumes, worker.honours)
    resume = Resume(pack_ids([5]), 1, 1)
    asked = Generate(1, "tiny", prompt="a", params=SamplingParams(guided=PERSON), resume=resume, fingerprint=card.fingerprint)
    with pytest.raises(WorkerLost, match="guided") as caught:
        admit(asked, {"tiny": card}, worker.backend, worker.honours)
    assert not caught.value.retryable
