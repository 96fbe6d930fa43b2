"""HuggingfaceApiWorker through a real network, in front of a scripted API: what is asked for, and what comes of the answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import pytest

from zmqserve.backends.hf_choices import ChatReader
from zmqserve.backends.hf_registry import HostedModel
from zmqserve.errors import ContextOverflow, InvalidParameter, Unsupported, UpstreamError
from zmqserve.jobs import GenerateJob
from zmqserve.messages import Generate
from zmqserve.params import Guided, SamplingParams

from .fakes.hosted import HELLO, hosted, serving
from .fakes.traced import peak_bytes
from .fakes.upstream import Exchange, FakeUpstream, Handler, chat, piece, token, usage, words

np = pytest.importorskip("numpy")
pytest.importorskip("huggingface_hub")

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def answered(handler: Handler, asked: dict[str, Any], **settings: Any) -> tuple[Any, Exchange]:
    """The completion of a chat with these parameters, and what the upstream was asked."""
    with FakeUpstream(handler) as upstream, serving(hosted(upstream.url, **settings)) as client:
        completion = client.chat("m", HELLO, stream=False, **asked)
        return completion, upstream.seen[-1]


# --- answers -----------------------------------------------------------------------------------


def test_a_chat_is_streamed_with_usage_and_reason() -> None:
    with FakeUpstream(words("one two three", prompt_tokens=7)) as upstream, serving(hosted(upstream.url)) as client:
        with client.chat("m", HELLO) as stream:
            texts = [chunk.text for chunk in stream]
        completion = stream.completion
    assert [text for text in texts if text] == ["one", " two", " three"]
    assert (completion.text, completion.finish_reason, completion.token_ids) == ("one two three", "stop", [])
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (7, 3)
    assert upstream.seen[0].target == "/v1/chat/completions"
    assert upstream.seen[0].body["messages"] == HELLO


def test_a_piece_is_passed_on_before_the_next_one_is_made() -> None:
    received = threading.Event()

    async def one_by_one(exchange: Exchange) -> None:
        await exchange.begin()
        await exchange.event(piece("one"))
        await asyncio.to_thread(received.wait, 10)
        await exchange.event(piece(" two", finish="stop"))
        await exchange.end()

    with FakeUpstream(one_by_one) as upstream, serving(hosted(upstream.url)) as client, client.chat("m", HELLO) as stream:
        assert next(iter(stream)).text == "one"
        received.set()
        assert stream.text() == "one two"


@pytest.mark.parametrize(("told", "reason"), [("stop", "stop"), ("length", "length"), ("eos_token", "stop")])
def test_finish_reasons_are_the_networks_own(told: str, reason: str) -> None:
    completion, _ = answered(chat(piece("a", finish=told)), {})
    assert completion.finish_reason == reason
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (0, 0)


@pytest.mark.parametrize("told", ["content_filter", "tool_calls", "abort"])
def test_an_answer_that_was_not_made_to_its_end_is_an_error(told: str) -> None:
    with pytest.raises(UpstreamError, match=told):
        answered(chat(piece("a"), piece(finish=told)), {})


def test_characters_that_end_lines_elsewhere_are_part_of_the_text() -> None:
    text = "é😀 \u2028 \u0085 \x1c 日本"
    completion, _ = answered(chat(piece(text), piece("\n", finish="stop")), {})
    assert completion.text == text + "\n"


def test_a_character_cut_by_the_network_comes_whole() -> None:
    async def halves(exchange: Exchange) -> None:
        await exchange.begin()
        data = f"data: {json.dumps(piece('日本😀', finish='stop'), ensure_ascii=False)}\r\n\r\n".encode()
        for k in range(len(data)):
            await exchange.chunk(data[k : k + 1])
        await exchange.end()

    completion, _ = answered(halves, {})
    assert completion.text == "日本😀"


def test_several_answers_carry_their_index() -> None:
    handler = chat(
        piece("b", index=1), piece("a"), piece(" end", finish="stop"), piece("c", index=1), piece(index=1, finish="length"), usage(2, 5)
    )
    completion, asked = answered(handler, {"n": 2})
    assert [choice.text for choice in completion.choices] == ["a end", "bc"]
    assert [choice.finish_reason for choice in completion.choices] == ["stop", "length"]
    assert asked.body["n"] == 2


def test_several_answers_share_their_stop_strings() -> None:
    def reader(n: int) -> ChatReader:
        params = SamplingParams(n=n, stop=[f"{number}" * 1024 for number in range(8)])
        return ChatReader(GenerateJob(Generate(1, "m", prompt="a", params=params)), MagicMock(), 0)

    one, many = (peak_bytes(partial(reader, n)) for n in (1, 128))
    assert many < 2 * one


def test_greedy_answers_of_vllm_are_asked_for_once_and_are_equal() -> None:
    completion, asked = answered(words("one two"), {"n": 3, "temperature": 0}, server="vllm")
    assert [(choice.text, choice.finish_reason) for choice in completion.choices] == [("one two", "stop")] * 3
    assert ("n" in asked.body, completion.usage.completion_tokens, completion.usage.prompt_tokens) == (False, 6, 3)


def test_an_answer_that_ends_inside_a_character_ends_before_it() -> None:
    completion, _ = answered(chat(piece("one"), piece("\ufffd", finish="length")), {})
    assert completion.text == "one"


def test_fewer_answers_than_asked_for_is_an_error() -> None:
    with pytest.raises(UpstreamError, match="finish_reason"):
        answered(chat(piece("a", finish="stop")), {"n": 2})


def test_stop_strings_never_leave_even_if_the_upstream_sends_them() -> None:
    completion, asked = answered(chat(piece("one S"), piece("TO"), piece("P two"), piece(finish="length")), {"stop": ["STOP"]})
    assert (completion.text, completion.finish_reason) == ("one ", "stop")
    assert asked.body["stop"] == ["STOP"]


def test_what_looked_like_the_beginning_of_a_stop_string_is_kept() -> None:
    completion, _ = answered(chat(piece("one S"), piece("TO", finish="stop")), {"stop": ["STOP"]})
    assert completion.text == "one STO"


def test_log_probabilities_come_with_their_tokens() -> None:
    entry = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": t, "logprob": -k} for k, t in enumerate("abc")]}
    completion, asked = answered(chat(piece("a", logprobs={"content": [entry]}), piece(finish="stop")), {"logprobs": 2})
    (told,) = completion.logprobs
    assert (told.text, told.logprob, [top.text for top in told.top]) == ("a", -0.5, ["a", "b"])
    assert (asked.body["logprobs"], asked.body["top_logprobs"]) == (True, 2)


def test_log_probabilities_that_do_not_come_are_an_error() -> None:
    with pytest.raises(Unsupported, match="logprobs") as caught:
        answered(words(), {"logprobs": 0})
    assert caught.value.data["parameter"] == "logprobs"


def test_an_answer_cut_where_the_context_was_full_is_an_overflow() -> None:
    handler = chat(piece("a", finish="length"), usage(90, 10))
    with pytest.raises(ContextOverflow) as caught:
        answered(handler, {"max_tokens": 50}, context_length=100)
    assert (caught.value.context_length, caught.value.tokens) == (100, 140)
    assert answered(handler, {"max_tokens": 10}, context_length=100)[0].finish_reason == "length"


def test_cancel_closes_the_upstreams_connection() -> None:
    with FakeUpstream() as upstream:

        async def endless(exchange: Exchange) -> None:
            await exchange.begin()
            await exchange.event(piece("one"))
            await upstream.until_gone()(exchange)

        upstream.handlers = [endless, words("next")]
        with serving(hosted(upstream.url, slots=1)) as client:
            with client.chat("m", HELLO) as stream:
                next(iter(stream))
            assert upstream.hung_up.wait(10)
            assert client.chat("m", HELLO, stream=False).text == "next"


# --- what is asked for -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "settings", "sent"),
    [
        ({}, {}, {"temperature": 1.0, "top_p": 1.0, "max_tokens": None, "seed": None, "n": None, "stop": None, "logprobs": None}),
        ({"temperature": 0}, {}, {"temperature": 0}),
        (
            {"temperature": 0.5, "top_p": 0.25, "max_tokens": 9, "seed": 4},
            {},
            {"temperature": 0.5, "top_p": 0.25, "max_tokens": 9, "seed": 4},
        ),
        ({"presence_penalty": 1.5, "frequency_penalty": -1.0}, {}, {"presence_penalty": 1.5, "frequency_penalty": -1.0}),
        ({"stop": "x"}, {}, {"stop": ["x"]}),
        ({}, {"server": "tgi"}, {"top_p": None, "temperature": 1.0}),
        ({}, {"server": "vllm"}, {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "min_tokens": None}),
        ({"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}, {"server": "vllm"}, {"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1}),
        ({"min_tokens": 2, "ignore_eos": True}, {"server": "vllm"}, {"min_tokens": 2, "ignore_eos": True}),
        ({"stop_token_ids": [5], "skip_special_tokens": False}, {"server": "vllm"}, {"stop_token_ids": [5], "skip_special_tokens": False}),
        ({"top_k": 3}, {"extra": ["top_k"]}, {"top_k": 3, "min_p": None}),
        ({"guided": Guided(choice=["a", "b"])}, {"server": "vllm"}, {"structured_outputs": {"choice": ["a", "b"]}}),
        ({"guided": Guided(regex="a+")}, {"server": "tgi"}, {"response_format": {"type": "regex", "value": "a+"}}),
        ({"guided": Guided(json=json.dumps(SCHEMA))}, {"server": "tgi"}, {"response_format": {"type": "json_object", "value": SCHEMA}}),
        (
            {"guided": Guided(json=json.dumps(SCHEMA))},
            {},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}},
        ),
    ],
)
def test_a_chats_parameters_are_sent_in_the_servers_own_terms(
    asked: dict[str, Any], settings: dict[str, Any], sent: dict[str, Any]
) -> None:
    _, exchange = answered(words(), asked, **settings)
    assert {name: exchange.body.get(name) for name in sent} == sent
    assert exchange.body["stream_options"] == {"include_usage": True}


VALUES: dict[str, Any] = {
    "min_tokens": 1,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 1.0,
    "repetition_penalty": 2.0,
    "stop_token_ids": [1],
    "n": 2,
    "echo": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
}


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({}, {*VALUES} - {"presence_penalty", "n"}),
        ({"server": "tgi"}, {*VALUES}),
        ({"server": "vllm"}, {"echo"}),
        ({"api": "text_generation"}, {"min_tokens", "min_p", "presence_penalty", "stop_token_ids", "n", "ignore_eos"}),
    ],
)
def test_what_an_api_cannot_carry_is_refused_by_name(settings: dict[str, Any], refused: set[str]) -> None:
    with FakeUpstream(words()) as upstream, serving(hosted(upstream.url, **settings)) as client:
        for name in sorted(refused):
            ask = client.generate if settings.get("api") else client.chat
            with pytest.raises(Unsupported, match=name) as caught:
                ask("m", "x" if settings.get("api") else HELLO, stream=False, params=SamplingParams(**{name: VALUES[name]}))  # type: ignore[call-overload]
            assert caught.value.data["parameter"] == name
        assert upstream.seen == []


@pytest.mark.parametrize(
    ("guided", "settings"),
    [(Guided(regex="a"), {}), (Guided(choice=["a"]), {"server": "tgi"}), (Guided(grammar="a"), {"server": "tgi"})],
)
def test_a_kind_of_guided_decoding_that_cannot_be_asked_for_is_refused(guided: Guided, settings: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=r"guided\."):
        answered(words(), {"guided": guided}, **settings)


def test_a_schema_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidParameter, match=r"guided\.json"):
        answered(words(), {"guided": Guided(json="[1")})


def test_the_wrong_verb_says_which_is_right() -> None:
    models = hosted("http://127.0.0.1:9"), HostedModel(name="t", base_url="http://127.0.0.1:9", api="text_generation")
    with serving(*models) as client:
        with pytest.raises(Unsupported, match=r"send messages \(client\.chat\)"):
            client.generate("m", "prompt", stream=False)
        with pytest.raises(Unsupported, match=r"send a prompt \(client\.generate\)"):
            client.chat("t", HELLO, stream=False)
        with pytest.raises(Unsupported, match="token_ids"):
            client.generate("t", [1, 2], stream=False)
        with pytest.raises(Unsupported, match="count_tokens"):
            client.count_tokens("m", "x")


def test_max_tokens_that_no_prompt_leaves_room_for() -> None:
    with serving(hosted("http://127.0.0.1:9", context_length=100)) as client, pytest.raises(ContextOverflow) as caught:
        client.chat("m", HELLO, stream=False, max_tokens=100)
    assert (caught.value.context_length, caught.value.tokens) == (100, 101)


# --- text generation ---------------------------------------------------------------------------


@pytest.fixture
def tgi() -> Iterator[FakeUpstream]:
    top = [{"id": 9, "text": "x", "logprob": -1.0, "special": False}]
    with FakeUpstream(
        chat(token("one", 1, top=top), token(" two", 2), token("</s>", 3, special=True, finish="eos_token", input_length=4))
    ) as upstream:
        yield upstream


def test_text_generation_has_ids_usage_and_no_special_text(tgi: FakeUpstream) -> None:
    with serving(hosted(tgi.url, api="text_generation")) as client:
        completion = client.generate("m", "prompt", stream=False, max_tokens=8, temperature=0.5, top_k=4, seed=1, logprobs=1)
        assert (completion.text, completion.token_ids, completion.finish_reason) == ("one two", [1, 2, 3], "stop")
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (4, 3)
        assert completion.logprobs is not None
        assert [(each.token_id, len(each.top)) for each in completion.logprobs] == [(1, 1), (2, 0), (3, 0)]
        asked = tgi.seen[0].body
        assert (asked["inputs"], asked["stream"]) == ("prompt", True)
        sent = {"max_new_tokens": 8, "temperature": 0.5, "top_k": 4, "seed": 1, "top_n_tokens": 1, "do_sample": True, "details": True}
        assert asked["parameters"] == {**sent, "return_full_text": False}
        echoed = client.generate("m", "prompt ", stream=False, echo=True, skip_special_tokens=False, temperature=0, stop=["prompt"])
        assert echoed.text == "prompt one two</s>"
        greedy = tgi.seen[1].body["parameters"]
        assert (greedy["do_sample"], greedy["stop"], "temperature" in greedy) == (False, ["prompt"], False)


def test_text_generations_other_parameters_are_sent(tgi: FakeUpstream) -> None:
    guided = Guided(json=json.dumps(SCHEMA))
    with serving(hosted(tgi.url, api="text_generation")) as client:
        client.generate("m", "x", stream=False, top_p=0.5, repetition_penalty=1.5, frequency_penalty=0.5, guided=guided)
        client.generate("m", "x", stream=False, guided=Guided(regex="a+"))
    sent = tgi.seen[0].body["parameters"]
    assert (sent["top_p"], sent["repetition_penalty"], sent["frequency_penalty"]) == (0.5, 1.5, 0.5)
    assert sent["grammar"] == {"type": "json", "value": SCHEMA}
    assert tgi.seen[1].body["parameters"] == {
        "details": True,
        "do_sample": True,
        "grammar": {"type": "regex", "value": "a+"},
        "return_full_text": False,
        "temperature": 1.0,
    }


# --- several models ----------------------------------------------------------------------------


def test_one_worker_serves_several_models_by_all_their_names() -> None:
    with FakeUpstream(words()) as upstream:
        models = [
            hosted(upstream.url, model="org/chat", aliases=["c", "d"], slots=2, context_length=10),
            HostedModel(name="e", base_url=upstream.url, api="feature_extraction", slots=3),
        ]
        with serving(*models) as client:
            assert client.chat("d", HELLO, stream=False).text == "one two"
            assert upstream.seen[-1].body["model"] == "org/chat"
            cards = {model.name: model.card for model in client.models()}
            assert (cards["m"].context_length, cards["m"].verbs, cards["m"].aliases) == (10, ["chat", "model_details"], ["c", "d"])
            assert (cards["e"].verbs, client.model_details("e").source) == (["embed", "model_details"], "e")
            assert client.status().workers[0].slots == 5


def test_a_model_gets_no_more_requests_at_once_than_its_slots() -> None:
    asked = threading.Semaphore(0)
    go_on = threading.Event()

    async def hold(exchange: Exchange) -> None:
        if exchange.body["model"] == "m":
            asked.release()
            await asyncio.to_thread(go_on.wait, 10)
        await words()(exchange)

    with FakeUpstream(hold) as upstream:
        with serving(hosted(upstream.url, slots=1), hosted(upstream.url, name="other"), slots=8) as client:
            streams = [client.chat("m", HELLO) for _ in range(3)]
            assert asked.acquire(timeout=10)
            # What was sent before this has come when this is answered.
            assert client.chat("other", HELLO, stream=False).text == "one two"
            assert [each.body["model"] for each in upstream.seen] == ["m", "other"]
            go_on.set()
            assert [stream.text() for stream in streams] == ["one two"] * 3
