"""ModelWorker, on a tiny Llama with random weights: small enough to be made here, real enough to be compared with transformers."""

from __future__ import annotations

import argparse
import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import ContextOverflow, InvalidParameter, Unsupported
from zmqserve.jobs import Delta
from zmqserve.messages import ChatMessage, CountTokens, Generate, ModelCard, pack_ids
from zmqserve.params import SamplingParams
from zmqserve.worker import WorkerConfig

from .fakes.asked import AskedJob, answer_of
from .fakes.controller import FakeController
from .fakes.engines import without_batching
from .fakes.tiny_llama import CONTEXT, WORDS, make_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from zmqserve.backends.sampling import draw_seed  # noqa: E402 - it imports torch

pytestmark = pytest.mark.timeout(300)

SAMPLED = SamplingParams(temperature=4.0, max_tokens=30, seed=1, ignore_eos=True)
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def make_worker(directory: Path, **options: Any) -> ModelWorker:
    return ModelWorker(WorkerConfig(model=str(directory)), **{"device": "cpu", "threads": 1, **options})


@pytest.fixture(scope="module", params=["batch", "turns"])
def worker(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[ModelWorker]:
    made = make_worker(model_dir)
    with nullcontext() if request.param == "batch" else without_batching():
        made.cards = made.load()
    ask(made, "warm up", replace_params(GREEDY, max_tokens=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(model_dir)


def replace_params(params: SamplingParams, **changes: Any) -> SamplingParams:
    fields = {name: getattr(params, name) for name in params.__struct_fields__}
    return SamplingParams(**{**fields, **changes})


def job_of(prompt: str | list[int] | list[ChatMessage], params: SamplingParams) -> AskedJob:
    kinds: dict[str, Any] = {"prompt": None, "messages": None, "token_ids": None}
    if isinstance(prompt, str):
        kinds["prompt"] = prompt
    elif isinstance(prompt[0], ChatMessage):
        kinds["messages"] = prompt
    else:
        kinds["token_ids"] = pack_ids(prompt)
    return AskedJob(Generate(1, "tiny", params=params, **kinds))


async def answer(worker: ModelWorker, job: AskedJob) -> list[Delta]:
    return [delta async for delta in answer_of(worker, job)]


def ask(worker: ModelWorker, prompt: str | list[int] | list[ChatMessage], params: SamplingParams) -> list[Delta]:
    return asyncio.run(answer(worker, job_of(prompt, params)))


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token_id for delta in deltas for token_id in delta.token_ids]


def generate_with_transformers(reference: Any, ids: list[int], **options: Any) -> list[int]:
    options = {"max_new_tokens": 30, "do_sample": False, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **options}
    out = reference.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **options)
    return list(out[0, len(ids) :].tolist())


# --- tokens ------------------------------------------------------------------------------------


def test_greedy_is_what_transformers_generates_token_by_token(worker: ModelWorker, reference: Any, tokenizer: Any) -> None:
    for prompt in ("the quick", "a fox and", "Hello! 12 ünïcödé"):
        deltas = ask(worker, prompt, GREEDY)
        expected = generate_with_transformers(reference, tokenizer.encode(prompt))
        assert len(set(expected)) > 5, "the model of this test must not repeat itself"
        assert ids_of(deltas) == expected
        assert [len(delta.token_ids) for delta in deltas] == [1] * 30


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.2},
        {"repetition_penalty": 3.0},
        {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.1},
    ],
    ids=str,
)
def test_sampling_draws_what_transformers_draws_from_the_same_seeds(
    worker: ModelWorker, reference: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    """The reference is seeded for each token, and gets the option: a worker that ignored it would draw other tokens."""
    params = replace_params(SAMPLED, **options)
    ids = tokenizer.encode("the small model")
    expected: list[int] = []
    for position in range(30):
        torch.manual_seed(draw_seed(SAMPLED.seed or 0, position))
        options = {"temperature": SAMPLED.temperature, **options}
        expected += generate_with_transformers(reference, ids + expected, do_sample=True, max_new_tokens=1, **options)
    drawn = ids_of(ask(worker, "the small model", params))
    assert drawn == expected
    assert drawn != ids_of(ask(worker, "the small model", SAMPLED))


@pytest.mark.parametrize("options", [{"presence_penalty": 2.0}, {"frequency_penalty": 1.5}, {"presence_penalty": -2.0}], ids=str)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_penalties_count_what_was_answered_and_not_the_prompt(
    worker: ModelWorker, reference: Any, params: SamplingParams, options: dict[str, float]
) -> None:
    """As OpenAI defines them, worked out here for each token of the answer."""
    prompt = [5, 6, 7, 5]
    # Hotter, and chance would hide them.
    params = replace_params(params, temperature=min(params.temperature, 1.5))
    ids: list[int] = []
    for position in range(30):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + ids])).logits[0, -1].float()
        for token_id in set(ids):
            logits[token_id] -= options.get("presence_penalty", 0) + options.get("frequency_penalty", 0) * ids.count(token_id)
        if params.temperature:
            generator = torch.Generator().manual_seed(draw_seed(SAMPLED.seed or 0, position))
            ids.append(int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator)))
        else:
            ids.append(int(logits.argmax()))
    assert ids_of(ask(worker, prompt, replace_params(params, **options))) == ids
    assert ids_of(ask(worker, prompt, params)) != ids


@pytest.mark.parametrize(("params", "top"), [(GREEDY, 0), (GREEDY, 5), (SAMPLED, 3), (replace_params(SAMPLED, top_k=1), 2)])
def test_logprobs_are_of_the_logits_as_the_model_gave_them(
    worker: ModelWorker, reference: Any, tokenizer: Any, params: SamplingParams, top: int
) -> None:
    """Before temperature, penalties and limits; in float32 within rounding."""
    prompt = tokenizer.encode("the quick")
    deltas = ask(worker, prompt, replace_params(params, logprobs=top))
    ids = ids_of(deltas)
    with torch.inference_mode():
        expected = reference(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float().log_softmax(dim=-1)
    entries = [entry for delta in deltas for entry in delta.logprobs or []]
    assert [entry.token_id for entry in entries] == ids
    assert [entry.text for entry in entries] == [tokenizer.decode([i]) for i in ids]
    assert [entry.logprob for entry in entries] == pytest.approx([float(row[i]) for row, i in zip(expected, ids, strict=True)], abs=1e-4)
    for entry, row in zip(entries, expected, strict=True):
        values, likeliest = row.topk(top)
        assert [other.token_id for other in entry.top] == likeliest.tolist()
        assert [other.logprob for other in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
        assert [other.text for other in entry.top] == [tokenizer.decode([i]) for i in likeliest.tolist()]
    assert ids == ids_of(ask(worker, prompt, params))


def test_the_text_of_one_token_is_decoded_once(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 tokens a step, on the event loop, most were told of before."""
    tokenizer = worker._models["tiny"].checkpoint.tokenizer
    params = replace_params(GREEDY, logprobs=20)
    first = ask(worker, "the quick", params)
    decoded: list[list[int]] = []

    def decode(ids: list[int], **options: Any) -> str:
        decoded.append(ids)
        return str(type(tokenizer).decode(tokenizer, ids, **options))

    monkeypatch.setattr(tokenizer, "decode", decode)
    assert ask(worker, "the quick", params) == first
    plain = len(decoded)
    assert ask(worker, "the quick", GREEDY)
    assert plain == len(decoded) - plain, "no more than the text itself needs"


def test_without_logprobs_there_are_none(worker: ModelWorker) -> None:
    assert [delta.logprobs for delta in ask(worker, "the", replace_params(GREEDY, max_tokens=2))] == [None, None]


def test_choices_differ_repeat_and_begin_with_the_single_answer(worker: ModelWorker) -> None:
    """Each has its own seed, made of the request's; the first has that itself."""
    params = replace_params(SAMPLED, n=3, echo=True, max_tokens=12)
    job = job_of("the quick", params)
    deltas = asyncio.run(answer(worker, job))
    choices = [[delta for delta in deltas if delta.index == index] for index in range(3)]
    drawn = [ids_of(choice) for choice in choices]
    assert [len(ids) for ids in drawn] == [12] * 3
    assert len({tuple(ids) for ids in drawn}) == 3
    assert [choice[-1].finish_reason for choice in choices] == ["length"] * 3
    assert all(text_of(choice).startswith("the quick") for choice in choices)
    alone = ask(worker, "the quick", replace_params(params, n=1))
    assert (ids_of(alone), text_of(alone)) == (drawn[0], text_of(choices[0]))
    again = ask(worker, "the quick", params)
    assert [ids_of([delta for delta in again if delta.index == index]) for index in range(3)] == drawn


def test_choices_end_each_for_itself(worker: ModelWorker) -> None:
    whole = [ids_of([d for d in ask(worker, "the quick", replace_params(SAMPLED, n=3)) if d.index == index]) for index in range(3)]
    end = next(i for i in whole[1][3:10] if i not in whole[0] + whole[2] + whole[1][:3])
    deltas = ask(worker, "the quick", replace_params(SAMPLED, n=3, stop_token_ids=[end]))
    reasons = [[d.finish_reason for d in deltas if d.index == index][-1] for index in range(3)]
    assert reasons == ["length", "stop", "length"]
    assert ids_of([d for d in deltas if d.index == 1]) == whole[1][: whole[1].index(end) + 1]


def test_a_temperature_that_would_overflow_is_greedy(worker: ModelWorker) -> None:
    assert ids_of(ask(worker, "the", replace_params(GREEDY, temperature=1e-30))) == ids_of(ask(worker, "the", GREEDY))


@pytest.mark.parametrize("seeds", [[7], range(40)], ids=["one answer", "many answers"])
def test_draws_from_hashed_seeds_are_as_likely_as_the_model_says(seeds: Sequence[int]) -> None:
    """Pearson's statistic over 4 tokens, 4000 draws: above 16.3 once in a thousand tries with a good generator."""
    from zmqserve.backends.sampling import Sampler

    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    drawn = torch.zeros(4)
    for seed in seeds:
        sampler = Sampler(SamplingParams(seed=seed), 0, (), torch.device("cpu"))
        for position in range(4000 // len(seeds)):
            drawn[sampler.pick(torch.zeros((1, position), dtype=torch.long), logits)] += 1
    expected = 4000 * logits[0].softmax(dim=-1)
    assert float(((drawn - expected) ** 2 / expected).sum()) < 16.3


def test_without_a_seed_answers_differ(worker: ModelWorker) -> None:
    params = replace_params(SAMPLED, seed=None)
    assert ids_of(ask(worker, "the", params)) != ids_of(ask(worker, "the", params))


def test_a_seed_gives_the_same_answer_whatever_else_runs(worker: ModelWorker) -> None:
    prompts = ["the quick", "a fox", "dog", "hat and hat"]
    alone = [ids_of(ask(worker, prompt, replace_params(SAMPLED, seed=seed))) for seed, prompt in enumerate(prompts)]

    async def together() -> list[list[Delta]]:
        jobs = [job_of(prompt, replace_params(SAMPLED, seed=seed)) for seed, prompt in enumerate(prompts)]
        return list(await asyncio.gather(*(answer(worker, job) for job in jobs)))

    assert [ids_of(deltas) for deltas in asyncio.run(together())] == alone


def test_token_ids_in_are_the_prompt(worker: ModelWorker, tokenizer: Any) -> None:
    assert ids_of(ask(worker, tokenizer.encode("a fox"), GREEDY)) == ids_of(ask(worker, "a fox", GREEDY))


def test_token_ids_that_the_model_does_not_know_are_refused(worker: ModelWorker, reference: Any) -> None:
    size = reference.config.vocab_size
    with pytest.raises(InvalidParameter, match=rf"holds {size}, but the model's ids end at {size - 1}"):
        ask(worker, [1, size], GREEDY)


def test_a_long_prompt_is_taken_in_pieces_and_answered_alike(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ids_of(ask(worker, WORDS, GREEDY))
    monkeypatch.setattr("zmqserve.backends.single_steps.PROMPT_PIECE", 5)
    assert ids_of(ask(worker, WORDS, GREEDY)) == whole


# --- where it ends -----------------------------------------------------------------------------


def test_max_tokens_ends_with_length_and_counts_exactly(worker: ModelWorker, tokenizer: Any) -> None:
    job = job_of("the quick", replace_params(GREEDY, max_tokens=4))
    deltas = asyncio.run(answer(worker, job))
    assert len(ids_of(deltas)) == 4
    assert [delta.finish_reason for delta in deltas] == [None, None, None, "length"]
    assert job.prompt_tokens == len(tokenizer.encode("the quick"))


def test_without_max_tokens_the_answer_fills_the_context(worker: ModelWorker, tokenizer: Any) -> None:
    deltas = ask(worker, "the quick", replace_params(GREEDY, max_tokens=None))
    assert len(ids_of(deltas)) == CONTEXT - len(tokenizer.encode("the quick"))
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize(("length", "max_tokens", "needed"), [(100, 29, 129), (128, None, 129), (500, 1, 501)])
def test_what_does_not_fit_the_context_is_refused_with_both_numbers(
    worker: ModelWorker, length: int, max_tokens: int | None, needed: int
) -> None:
    with pytest.raises(ContextOverflow) as caught:
        ask(worker, [5] * length, replace_params(GREEDY, max_tokens=max_tokens))
    assert (caught.value.context_length, caught.value.tokens) == (CONTEXT, needed)
    assert str(needed) in caught.value.message


def test_what_just_fits_the_context_is_answered(worker: ModelWorker) -> None:
    assert len(ids_of(ask(worker, [5] * 100, replace_params(GREEDY, max_tokens=28)))) == 28


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(worker: ModelWorker) -> None:
    whole = text_of(ask(worker, "the quick", GREEDY))
    stop = whole[7:12]
    deltas = ask(worker, "the quick", replace_params(GREEDY, stop=["never seen", stop]))
    assert text_of(deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish_reason == "stop"


def test_text_that_only_began_like_a_stop_string_arrives_in_the_end(worker: ModelWorker) -> None:
    whole = text_of(ask(worker, "the quick", GREEDY))
    deltas = ask(worker, "the quick", replace_params(GREEDY, stop=[whole[-3:] + "never"]))
    assert text_of(deltas) == whole
    assert deltas[-1].finish_reason == "length"


def test_a_stop_id_ends_the_answer_and_has_no_text(worker: ModelWorker, tokenizer: Any) -> None:
    ids = ids_of(ask(worker, "the quick", GREEDY))
    end = next(i for i in ids[4:] if i not in ids[:4])
    deltas = ask(worker, "the quick", replace_params(GREEDY, stop_token_ids=[end]))
    assert ids_of(deltas) == ids[: ids.index(end) + 1]
    assert (deltas[-1].finish_reason, deltas[-1].token_ids) == ("stop", (end,))
    assert text_of(deltas) == tokenizer.decode(ids[: ids.index(end)]).rstrip("\ufffd")


def test_min_tokens_keeps_stop_ids_and_stop_strings_off(worker: ModelWorker) -> None:
    ids = ids_of(ask(worker, "the quick", GREEDY))
    deltas = ask(worker, "the quick", replace_params(GREEDY, stop_token_ids=[ids[0]], min_tokens=6))
    assert ids[0] not in ids_of(deltas)[:6]
    assert len(ids_of(deltas)) > 6
    whole = text_of(ask(worker, "the quick", GREEDY))
    assert len(ids_of(ask(worker, "the quick", replace_params(GREEDY, stop=[whole[:1]], min_tokens=6)))) > 6
    assert len(ids_of(ask(worker, "the quick", replace_params(GREEDY, stop=[whole[:1]])))) < 6


def test_the_models_own_end_token_ends_the_answer_unless_ignored(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(ask(worker, [5, 6, 7], GREEDY))
    end = next(i for i in ids[3:] if i not in ids[:3])
    model = worker._models["tiny"]
    monkeypatch.setitem(worker._models, "tiny", replace(model, checkpoint=replace(model.checkpoint, eos=frozenset({end}))))
    for ignore_eos, expected in ((False, ids[: ids.index(end) + 1]), (True, ids)):
        assert ids_of(ask(worker, [5, 6, 7], replace_params(GREEDY, ignore_eos=ignore_eos))) == expected


# --- text --------------------------------------------------------------------------------------


def test_echo_begins_with_the_prompt_and_is_not_counted(worker: ModelWorker) -> None:
    deltas = ask(worker, "the quick", replace_params(GREEDY, echo=True))
    plain = ask(worker, "the quick", GREEDY)
    assert text_of(deltas) == "the quick" + text_of(plain)
    assert ids_of(deltas) == ids_of(plain)


def test_the_pieces_of_the_text_are_the_text_of_the_tokens(worker: ModelWorker, tokenizer: Any) -> None:
    deltas = ask(worker, "the quick", replace_params(GREEDY, max_tokens=100))
    assert text_of(deltas) == tokenizer.decode(ids_of(deltas)).rstrip("\ufffd")


# --- conversations -----------------------------------------------------------------------------


def test_a_conversation_goes_through_the_tokenizers_own_template(worker: ModelWorker, tokenizer: Any) -> None:
    turns = [ChatMessage("user", "the fox?")]
    ids = tokenizer.encode("<s>user\nthe fox?</s>\n<s>assistant\n")
    assert ids_of(ask(worker, turns, GREEDY)) == ids_of(ask(worker, ids, GREEDY))
    assert asyncio.run(worker.count_tokens(CountTokens(1, "tiny", messages=turns))) == len(ids)
    assert asyncio.run(worker.count_tokens(CountTokens(1, "tiny", prompt="the fox?"))) == len(tokenizer.encode("the fox?"))


def test_messages_that_the_template_refuses_are_the_callers_error(worker: ModelWorker) -> None:
    with pytest.raises(InvalidParameter, match="no system prompts"):
        ask(worker, [ChatMessage("system", "x")], GREEDY)


def test_a_model_without_a_template_does_not_claim_chat(tmp_path: Path) -> None:
    bare = make_worker(make_model(tmp_path / "tiny", template=None))
    (card,) = bare.load()
    try:
        assert "chat" not in card.verbs
        with pytest.raises(Unsupported, match="no chat template"):
            ask(bare, [ChatMessage("user", "x")], GREEDY)
    finally:
        bare.close()


# --- one among others --------------------------------------------------------------------------


def test_closing_an_answer_stops_it_within_one_token(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    from zmqserve.backends import sampling

    pick = sampling.Sampler.pick
    permits = threading.Semaphore(1)
    picks: list[int] = []

    def counted(self: sampling.Sampler, ids: Any, logits: Any) -> int:
        assert permits.acquire(timeout=10)
        picks.append(ids.shape[1])
        return int(pick(self, ids, logits))

    monkeypatch.setattr(sampling.Sampler, "pick", counted)

    async def scene() -> None:
        answering = answer_of(worker, job_of([5] * 50, replace_params(SAMPLED, max_tokens=None)))
        async with aclosing(answering) as deltas:
            async for _ in deltas:
                break
        permits.release(100)
        await answer(worker, job_of([5] * 10, replace_params(SAMPLED, max_tokens=3)))

    asyncio.run(scene())
    assert [length for length in picks if length < 50] == [10, 11, 12]
    assert [length for length in picks if length >= 50] in ([50], [50, 51])


def test_a_request_that_fails_in_the_engine_fails_alone(worker: ModelWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    from zmqserve.backends import sampling

    expected = ids_of(ask(worker, "the quick", GREEDY))
    pick = sampling.Sampler.pick

    def broken(self: sampling.Sampler, ids: Any, logits: Any) -> int:
        if not self.greedy:
            raise RuntimeError("probability tensor contains nan")
        return int(pick(self, ids, logits))

    monkeypatch.setattr(sampling.Sampler, "pick", broken)

    async def both() -> list[Any]:
        jobs = job_of("the", SAMPLED), job_of("the quick", GREEDY)
        return list(await asyncio.gather(*(answer(worker, job) for job in jobs), return_exceptions=True))

    failed, good = asyncio.run(both())
    assert isinstance(failed, RuntimeError)
    assert ids_of(good) == expected


# --- loading -----------------------------------------------------------------------------------


def test_the_card_says_what_is_served(worker: ModelWorker, model_dir: Path) -> None:
    (card,) = worker.cards
    verbs = ["generate", "chat", "count_tokens", "model_details"]
    expected = ModelCard("tiny", card.fingerprint, context_length=CONTEXT, verbs=verbs, source=str(model_dir))
    assert card == expected
    assert len(card.fingerprint) == 32


@pytest.mark.parametrize(
    ("dtype", "grades"),
    [
        ("float32", {"sampling": "approximate", "guided": "refused", "n": "refused"}),
        ("bfloat16", {"sampling": "approximate", "greedy": "approximate", "seed": "approximate", "guided": "refused", "n": "refused"}),
    ],
)
def test_the_card_says_how_answers_go_on_elsewhere(model_dir: Path, dtype: str, grades: dict[str, str]) -> None:
    with FakeController() as controller:
        config = WorkerConfig(model=str(model_dir), controllers=(controller.endpoint,))
        with ModelWorker(config, device="cpu", dtype=dtype, threads=1):
            (card,) = controller.register(timeout_s=60).models
    assert (card.features, card.resume) == (["resume"], grades)


@pytest.mark.parametrize(
    ("model", "name"),
    [("smollm2-135m", "smollm2-135m"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"), ("/a/b/c/", "c")],
)
def test_the_served_name_is_the_last_part_of_the_model(model: str, name: str) -> None:
    assert ModelWorker(WorkerConfig(model=model)).model_name == name
    assert ModelWorker(WorkerConfig(model=model, served_name="mine")).model_name == "mine"


def test_it_can_say_its_name_when_its_working_directory_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    worker = ModelWorker(WorkerConfig(model="models/m"))
    before = worker.registration("loading", 0)
    gone.rmdir()
    assert worker.registration("loading", 0) == before


def test_the_command_line_has_all_options() -> None:
    parser = argparse.ArgumentParser()
    ModelWorker.add_arguments(parser.add_argument_group())
    given = ["--device", "cpu", "--dtype", "bfloat16", "--revision", "r", "--trust-remote-code", "--threads", "0"]
    assert ModelWorker.from_arguments(WorkerConfig(model="m"), parser.parse_args([])).model_name == "m"
    with pytest.raises(InvalidParameter, match="threads must be"):
        ModelWorker.from_arguments(WorkerConfig(model="m"), parser.parse_args(given))


def test_no_model_and_no_threads_are_refused_at_once() -> None:
    with pytest.raises(InvalidParameter, match="model is empty"):
        ModelWorker(WorkerConfig())
    with pytest.raises(InvalidParameter, match="threads must be"):
        ModelWorker(WorkerConfig(model="m"), threads=0)
