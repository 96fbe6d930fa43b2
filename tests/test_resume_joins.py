"""Answers that go on at another worker are the answers that nothing happened to: asked over a worker's wire, cut at every chunk."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqserve import messages as m
from zmqserve.backends.echo import EchoWorker
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.jobs import GenerateJob
from zmqserve.params import SamplingParams
from zmqserve.resuming import reread
from zmqserve.stopping import StopMatcher
from zmqserve.worker import WorkerConfig

from .fakes.controller import FakeController
from .fakes.engines import without_batching
from .fakes.joins import Asker, asked
from .fakes.tiny_llama import WORDS, make_model, make_tokenizer

TTL_MS = 600_000
"""The fake controller of a whole file says nothing between tests."""
MANY_TONGUES = "naïve 日本 😀 👩‍👧 ü end"


@pytest.fixture(scope="module")
def echo() -> Iterator[Asker]:
    with FakeController() as controller, EchoWorker(WorkerConfig(model="m", controllers=(controller.endpoint,))):
        yield Asker(controller, controller.register(ttl_ms=TTL_MS))


@pytest.fixture(scope="module", params=["batch", "turns"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """A Llama with random weights. Its answers repeat nothing, so that any slip of a position shows."""
    pytest.importorskip("torch")
    directory = make_model(tmp_path_factory.mktemp("models") / "tiny")
    with (
        nullcontext() if request.param == "batch" else without_batching(),
        FakeController() as controller,
        ModelWorker(WorkerConfig(model=str(directory), controllers=(controller.endpoint,)), device="cpu", threads=1),
    ):
        asker = Asker(controller, controller.register(timeout_s=60, ttl_ms=TTL_MS))
        asker.answer(asked("warm up", max_tokens=1))  # its threads start now, and not within a test
        yield asker


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the model say given ids: each stands at its position of the answer, whoever made those before it."""
    from zmqserve.backends.sampling import Sampler

    def scripted(script: list[int]) -> None:
        monkeypatch.setattr(Sampler, "pick", lambda self, ids, _: script[ids.shape[1] - self._prompt_tokens])

    return scripted


# --- echo --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"max_tokens": 17},
        {"stop": ["e f"]},
        {"stop": ["zz", " d e", "bb c d e f a bb!"], "max_tokens": 12},
        {"stop_token_ids": [4]},
        {"min_tokens": 9, "stop": ["d"], "stop_token_ids": [2]},
        {"echo": True},
        {"echo": True, "stop": ["d e"], "temperature": 0.5, "seed": 3},
        {"skip_special_tokens": False},
    ],
    ids=str,
)
def test_an_echo_goes_on_wherever_it_was_cut(echo: Asker, params: dict[str, Any]) -> None:
    whole = echo.check_joins(asked("a bb c d e f", **params))
    assert whole.usage == m.Usage(6, len(whole.ids))


def test_an_echo_of_every_script_goes_on(echo: Asker) -> None:
    assert echo.check_joins(asked(MANY_TONGUES, echo=True)).text == f"{MANY_TONGUES} {MANY_TONGUES}"


def test_an_echo_of_a_conversation_or_of_ids_goes_on(echo: Asker) -> None:
    echo.check_joins(asked([m.ChatMessage("system", "a b"), m.ChatMessage("user", "c")], max_tokens=7))
    echo.check_joins(asked([5, 6, 7], max_tokens=7))


@given(data=st.data())
def test_whatever_was_received_of_an_echo_the_rest_makes_it_whole(data: st.DataObject) -> None:
    """Any cut, any number of characters still missing, any parameters: one definition of the answer, without sockets."""
    words = data.draw(st.lists(st.text("ab\U0001f600", min_size=1, max_size=4), min_size=1, max_size=6))
    max_tokens = data.draw(st.none() | st.integers(1, 12))
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=data.draw(st.integers(0, max_tokens or 12)),
        stop=data.draw(st.lists(st.text("ab \U0001f600", min_size=1, max_size=5), max_size=3)),
        stop_token_ids=data.draw(st.lists(st.integers(0, 12), max_size=2)),
        echo=data.draw(st.booleans()),
    )

    def deltas(resume: m.Resume | None) -> list[Any]:
        job = GenerateJob(m.Generate(1, "m", prompt=" ".join(words), params=params, resume=resume))

        async def collect() -> list[Any]:
            return [delta async for delta in EchoWorker().generate(job)]

        return asyncio.run(collect())

    whole = deltas(None)
    text = "".join(delta.text for delta in whole)
    cut = data.draw(st.integers(0, len(whole)))
    before = "".join(delta.text for delta in whole[:cut])
    delivered = data.draw(st.integers(0, len(before)))
    rest = deltas(m.Resume(m.pack_ids(i for delta in whole[:cut] for i in delta.token_ids), delivered, cut))
    assert text[:delivered] + "".join(delta.text for delta in rest) == text
    assert [i for delta in rest for i in delta.token_ids] == [i for delta in whole[cut:] for i in delta.token_ids]
    assert rest[-1].finish_reason == whole[-1].finish_reason


# --- a model -----------------------------------------------------------------------------------


GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
SEEDED: dict[str, Any] = {"temperature": 4.0, "max_tokens": 20, "ignore_eos": True, "seed": 7}


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        {**GREEDY, "repetition_penalty": 1.7},
        {**GREEDY, "echo": True},
        {**GREEDY, "skip_special_tokens": False},
        {**GREEDY, "min_tokens": 12, "ignore_eos": False},
        SEEDED,
        {**SEEDED, "top_k": 50, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.2},
        {**SEEDED, "min_tokens": 15, "ignore_eos": False, "echo": True},
    ],
    ids=str,
)
def test_an_answer_goes_on_with_the_tokens_that_would_have_come(model: Asker, params: dict[str, Any]) -> None:
    whole = model.check_joins(asked("the quick brown", **params))
    assert len(set(whole.ids)) > 10, "a model that repeats itself shows nothing"
    assert whole.usage.completion_tokens == len(whole.ids)


def test_other_seeds_give_other_answers(model: Asker) -> None:
    drawn = [model.answer(asked("the quick brown", **{**SEEDED, "seed": seed})).ids for seed in range(4)]
    assert len({tuple(ids) for ids in drawn}) == 4


def test_a_penalty_counts_what_was_received(model: Asker) -> None:
    """The case above would pass with a penalty that changes nothing."""
    plain = model.answer(asked("the quick brown", **GREEDY))
    assert model.answer(asked("the quick brown", **GREEDY, repetition_penalty=1.7)).ids != plain.ids


def test_a_conversation_and_bare_ids_go_on(model: Asker) -> None:
    model.check_joins(asked([m.ChatMessage("user", "the fox?")], **GREEDY))
    model.check_joins(asked([5, 6, 7], **GREEDY))


def test_what_was_received_is_taken_in_pieces_like_a_prompt(model: Asker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqserve.backends.single_steps.PROMPT_PIECE", 5)
    model.check_joins(asked(WORDS, **GREEDY))


def test_a_stop_string_is_found_across_the_join(model: Asker) -> None:
    text = model.answer(asked("the quick", **GREEDY)).text
    stop = text[5:13]
    whole = model.check_joins(asked("the quick", **GREEDY, stop=["never seen", stop]))
    assert (whole.text, whole.reasons) == (text[: text.index(stop)], ["stop"])
    assert any(not piece.text for piece in whole.pieces), "none of its beginning was held back at a cut"


def test_what_only_began_like_a_stop_string_arrives_after_the_join(model: Asker) -> None:
    text = model.answer(asked("the quick", **GREEDY)).text
    whole = model.check_joins(asked("the quick", **GREEDY, stop=[text[-9:] + "never"]))
    assert (whole.text, whole.reasons) == (text, ["length"])


def test_a_stop_id_ends_the_rest_too(model: Asker) -> None:
    ids = model.answer(asked("the quick", **GREEDY)).ids
    end = next(i for i in ids[8:] if i not in ids[:8])
    whole = model.check_joins(asked("the quick", **GREEDY, stop_token_ids=[end]))
    assert (whole.ids[-1], whole.reasons) == (end, ["stop"])
    later = model.check_joins(asked("the quick", **GREEDY, stop_token_ids=[ids[0]], min_tokens=6))
    assert ids[0] not in later.ids[:6]


@pytest.mark.parametrize("params", [{}, {"stop": ["本 😀 👩‍👧 ü END"]}, {"stop": ["‍👧 ü"]}, {"echo": True}], ids=str)
def test_a_character_cut_by_the_join_arrives_whole(model: Asker, says: Any, params: dict[str, Any]) -> None:
    ids = make_tokenizer().encode(MANY_TONGUES).ids
    says(ids)
    whole = model.check_joins(asked("the", max_tokens=len(ids), **params))
    if "stop" not in params:
        assert whole.text.removeprefix("the") == MANY_TONGUES
    assert sum(not piece.text for piece in whole.pieces) > 10, "no character was cut"


def test_text_that_the_client_does_not_have_yet_comes_first(model: Asker, echo: Asker) -> None:
    """Also inside the echo, and before there is any token."""
    for asker, params in ((model, {**GREEDY, "echo": True}), (echo, {"echo": True, "max_tokens": 9})):
        request = asked("the quick brown", **params)
        whole = asker.answer(request)
        for characters in range(len("the quick brown") + 1):
            rest = asker.answer(msgspec.structs.replace(request, resume=m.Resume(b"", characters, 3)))
            assert (whole.text[:characters] + rest.text, rest.ids, rest.seq) == (whole.text, whole.ids, whole.seq + 3)
        for cut in (1, 4):
            withheld = len(whole.pieces[0].text) if cut == 1 else 2
            rest = asker.answer(msgspec.structs.replace(request, resume=whole.resume(cut, withheld=withheld)))
            delivered = sum(len(piece.text) for piece in whole.pieces[:cut]) - withheld
            assert (whole.text[:delivered] + rest.text, rest.ids) == (whole.text, whole.ids[cut:])


def test_a_known_prompt_is_not_made_into_ids_again(model: Asker) -> None:
    """The ids may be of a template that names the day: they are taken as they are."""
    whole = model.answer(asked([5, 6, 7, 8], **GREEDY))
    for cut in (1, 10):
        known = msgspec.structs.replace(whole.resume(cut), prompt_token_ids=m.pack_ids([5, 6, 7, 8]))
        rest = model.answer(asked("another text", resume=known, **GREEDY))
        assert rest == whole._replace(pieces=whole.pieces[cut:])


def test_a_resumed_answer_tells_its_fingerprint_again(model: Asker, echo: Asker) -> None:
    for asker, params in ((model, GREEDY), (echo, {"max_tokens": 9})):
        whole = asker.answer(asked("the quick brown", **params))
        got = asker.received(asked("the quick brown", resume=whole.resume(3), **params))
        assert got[0].message.fingerprint == asker.card.fingerprint


def test_without_stream_the_rest_is_one_reply(model: Asker) -> None:
    whole = model.answer(asked("the quick", **GREEDY))
    (got,) = model.received(asked("the quick", resume=whole.resume(7), stream=False, **GREEDY))
    assert got.message.choices == [m.Choice("".join(p.text for p in whole.pieces[7:]), m.pack_ids(whole.ids[7:]), "length")]
    assert got.message.usage == whole.usage


# --- an answer that is complete already --------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "reason"), [({}, "length"), ({"stop": ["语"]}, "length"), ({"stop": ["本語"]}, "stop"), ({"stop_token_ids": [-1]}, "stop")]
)
@pytest.mark.parametrize("withheld", [0, 1])
def test_a_complete_answer_ends_at_once(
    model: Asker, says: Any, monkeypatch: pytest.MonkeyPatch, params: dict[str, Any], reason: str, withheld: int
) -> None:
    """Its Done brings the text that is missing, and no token is made."""
    ids = make_tokenizer().encode("naïve 日本語").ids
    says(ids)
    if "stop_token_ids" in params:
        params = {"stop_token_ids": [ids[-1]]}
    request = asked("the", max_tokens=len(ids), **params)
    whole = model.answer(request)
    assert whole.reasons == [reason]

    def opened(*_: Any) -> None:
        raise AssertionError("a token was asked for")

    monkeypatch.setattr("zmqserve.backends.generation.TokenSequence", opened)
    resume = whole.resume(len(whole.pieces), withheld=withheld)
    (got,) = model.received(msgspec.structs.replace(request, resume=resume))
    done = got.message
    assert (done.finish_reasons, done.usage, done.seq) == ([reason], whole.usage, len(whole.pieces))
    assert (done.last.text, done.last.token_ids) == (whole.text[len(whole.text) - withheld :], b"")


def test_the_models_end_token_completes_an_answer(model: Asker, says: Any) -> None:
    eos = 2
    says([5, 6, eos])
    whole = model.check_joins(asked("the", max_tokens=10))
    assert (whole.ids, whole.reasons) == ([5, 6, eos], ["stop"])
    rest = model.answer(asked("the", max_tokens=10, resume=whole.resume(3)))
    assert (rest.text, rest.ids, rest.reasons, rest.usage) == ("", [], ["stop"], whole.usage)
    says([5, 6, eos, 7])
    onward = model.answer(asked("the", max_tokens=4, ignore_eos=True, resume=whole.resume(3)))
    assert (onward.ids, onward.reasons) == ([7], ["length"])


@pytest.mark.parametrize(
    ("params", "reason"), [({"max_tokens": 4}, "length"), ({}, "stop"), ({"stop": ["c"]}, "stop"), ({"stop_token_ids": [2]}, "stop")]
)
def test_a_complete_echo_ends_at_once(echo: Asker, params: dict[str, Any], reason: str) -> None:
    request = asked("a b c", echo=True, **params)
    whole = echo.answer(request)
    (got,) = echo.received(msgspec.structs.replace(request, resume=whole.resume(len(whole.pieces))))
    assert (got.message.finish_reasons, got.message.usage) == ([reason], whole.usage)
    assert (got.message.last.text, got.message.last.token_ids) == ("", b"")


# --- reading again -----------------------------------------------------------------------------

pieces = st.lists(st.text("ab\U0001f600", max_size=5), max_size=12)
stops = st.lists(st.text("ab\U0001f600", min_size=1, max_size=6), max_size=4)


@given(pieces, stops, st.data())
def test_a_matcher_that_reads_again_takes_over_from_another(pieces: list[str], stop: list[str], data: st.DataObject) -> None:
    """Ids stand for pieces. What was delivered, what is late and what comes are together what one matcher lets through."""

    def reader(matcher: StopMatcher) -> Any:
        def read(token_id: int) -> tuple[str, str | None]:
            text, stopped = matcher.feed(pieces[token_id])
            return text, "stop" if stopped else None

        return read

    read = reader(StopMatcher(stop))
    whole: list[str] = []
    for token_id in range(len(pieces)):
        text, reason = read(token_id)
        whole.append(text)
        if reason is not None:
            break
    cut = data.draw(st.integers(0, len(whole)))
    delivered = data.draw(st.integers(0, len("".join(whole[:cut]))))
    again = StopMatcher(stop)
    late, reason = reread(m.Resume(m.pack_ids(range(cut)), delivered, cut), reader(again))
    rest = [] if reason else [reader(again)(token_id)[0] for token_id in range(cut, len(whole))]
    assert "".join(whole)[:delivered] + late + "".join(rest) == "".join(whole)


def test_an_answer_of_nothing_received_begins(echo: Asker) -> None:
    whole = echo.answer(asked("a b c"))
    rest = echo.answer(asked("a b c", resume=m.Resume(b"", 0, 0)))
    assert rest == whole


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_a_real_model_goes_on_wherever_it_was_cut() -> None:
    """With emoji in its answer, which its tokenizer cuts into bytes."""
    with (
        FakeController() as controller,
        ModelWorker(WorkerConfig(model="smollm2-135m", controllers=(controller.endpoint,)), device="cpu", threads=1),
    ):
        asker = Asker(controller, controller.register(timeout_s=120, ttl_ms=TTL_MS))
        turns = [m.ChatMessage("user", "Repeat exactly: 😀 日本 👩‍👩‍👧 done")]
        for params in ({"temperature": 0}, {"temperature": 0.8, "seed": 1}):
            whole = asker.check_joins(asked(turns, max_tokens=16, ignore_eos=True, **params))
            assert not whole.text.isascii(), "no character was cut"
            assert len(whole.ids) == 16
