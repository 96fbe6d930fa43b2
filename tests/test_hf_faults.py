"""What a hosted API can do wrong, and what its worker's clients are told of it."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from zmqserve.backends import hf_client, hf_retries
from zmqserve.backends.hf_retries import pause_s, retry_after_s
from zmqserve.errors import (
    ContextOverflow,
    DeadlineExceeded,
    InvalidParameter,
    Overloaded,
    UpstreamError,
    ZmqserveError,
)

from .fakes.hosted import HELLO, hosted, serving
from .fakes.upstream import Exchange, FakeUpstream, Handler, piece, status, words

pytest.importorskip("huggingface_hub")

SECRET = "hf_SecretThatNobodyMaySee0123456789"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries again at once."""
    monkeypatch.setattr(hf_retries, "BASE_S", 0.001)


def ask(upstream: FakeUpstream, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    with serving(hosted(upstream.url, **(settings or {}))) as client:
        return client.chat("m", HELLO, stream=False, **options)


def fault(*handlers: Handler, settings: dict[str, Any] | None = None, **options: Any) -> tuple[ZmqserveError, int]:
    """The error that comes of these handlers, and how many requests were made."""
    with FakeUpstream(*handlers) as upstream:
        with pytest.raises(ZmqserveError) as caught:
            ask(upstream, settings, **options)
        return caught.value, len(upstream.seen)


async def hang(exchange: Exchange) -> None:
    await exchange.gone()


async def hang_after_head(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.gone()


async def hang_after_one(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(piece("one"))
    await exchange.gone()


async def slow_head(exchange: Exchange) -> None:
    await exchange.raw(b"HTTP/1.1 200 OK\r\ncontent-type: text/ev")
    await exchange.gone()


async def cut_before_one(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(piece(""))
    exchange.cut()


async def cut_after_one(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.event(piece("one"))
    exchange.cut()


async def stop_after_one(exchange: Exchange) -> None:
    """A regular end, without a finish reason."""
    await exchange.begin()
    await exchange.event(piece("one"))
    await exchange.end()


def lines(data: bytes, kind: str = "text/event-stream") -> Handler:
    async def handle(exchange: Exchange) -> None:
        await exchange.begin(kind)
        await exchange.chunk(data)
        await exchange.end()

    return handle


# --- tried again -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first", [status(429, retry_after="0"), status(500), status(503), cut_before_one, lambda exchange: asyncio.sleep(0, exchange.cut())]
)
def test_what_fails_before_the_first_token_is_tried_again(first: Handler) -> None:
    with FakeUpstream(first, first, words()) as upstream:
        assert ask(upstream).text == "one two"
        assert len(upstream.seen) == 3


def test_tries_end_with_the_last_ones_error() -> None:
    error, made = fault(status(500), settings={"retries": 2})
    assert isinstance(error, UpstreamError)
    assert (made, error.retryable, error.data["status"]) == (3, True, 500)


def test_retry_after_is_honoured() -> None:
    with FakeUpstream(status(429, retry_after="0.4"), words()) as upstream:
        assert ask(upstream).text == "one two"
        first, second = upstream.seen
        assert second.came_s - first.came_s >= 0.4


def test_no_try_is_made_after_the_deadline() -> None:
    error, made = fault(status(429, retry_after="30"), timeout_s=5)
    assert isinstance(error, Overloaded)
    assert (made, error.retry_after_ms, error.retryable) == (1, 30_000, True)


def test_a_long_retry_after_is_the_clients_to_wait_for() -> None:
    error, made = fault(status(429, retry_after="3600"), settings={"retries": 9})
    assert (type(error), made, error.retry_after_ms) == (Overloaded, 1, 3_600_000)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422, 501])
def test_what_will_not_change_is_not_tried_again(code: int) -> None:
    error, made = fault(status(code))
    assert (made, error.retryable) == (1, False)


@pytest.mark.parametrize(("handler", "text"), [(cut_after_one, "broke off"), (stop_after_one, "finish_reason")])
def test_after_the_first_token_a_break_is_an_error(handler: Handler, text: str) -> None:
    error, made = fault(handler)
    assert isinstance(error, UpstreamError)
    assert (made, error.retryable) == (1, True)
    assert text in error.message


def test_an_upstream_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with serving(hosted(url, retries=1)) as client, pytest.raises(UpstreamError, match=f"cannot reach {url}") as caught:
            client.chat("m", HELLO, stream=False)
    assert caught.value.retryable


def test_retry_after_in_all_its_forms() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert retry_after_s("120") == 120
    assert retry_after_s(" 1.5 ") == 1.5
    assert retry_after_s("-3") == 0
    assert retry_after_s(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90
    assert retry_after_s("Thu, 01 Jan 2026 11:00:00 GMT", now) == 0
    assert [retry_after_s(text, now) for text in (None, "", "soon", "nan", "inf", "Thu, 99 Jan")] == [None] * 6


def test_pauses_grow_with_full_jitter_and_have_an_end() -> None:
    def longest(low: float, high: float) -> float:
        assert low == 0
        return high

    base_s = hf_retries.BASE_S
    assert [pause_s(k, None, None, longest) for k in (1, 2, 3, 40)] == [
        base_s,
        2 * base_s,
        4 * base_s,
        min(hf_retries.CAP_S, 1024 * base_s),
    ]
    assert pause_s(1, 10.0, None, lambda low, high: low) == 10.0
    assert pause_s(1, 10.0, 9.0, longest) is None
    assert pause_s(1, hf_retries.LONGEST_S + 1, None, longest) is None


# --- timeouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "key"),
    [
        (hang, "first_token_timeout_s"),
        (hang_after_head, "first_token_timeout_s"),
        (slow_head, "first_token_timeout_s"),
        (hang_after_one, "token_timeout_s"),
    ],
)
def test_silence_ends_as_an_error_that_names_the_setting(handler: Handler, key: str) -> None:
    error, made = fault(handler, settings={key: 0.3})
    assert isinstance(error, UpstreamError)
    assert (made, error.retryable, error.data["timeout"], error.data["seconds"]) == (1, True, key, 0.3)


def test_requests_of_a_dead_upstream_end_by_themselves_and_free_their_slots() -> None:
    with FakeUpstream(hang) as dead, FakeUpstream(words()) as alive:
        models = hosted(dead.url, first_token_timeout_s=0.5, slots=2), hosted(alive.url, name="alive", slots=1)
        with serving(*models) as client:
            streams = [client.chat("m", HELLO) for _ in range(6)]
            for stream in streams:
                with pytest.raises(UpstreamError, match="first_token_timeout_s"):
                    stream.text()
            assert client.chat("alive", HELLO, stream=False).text == "one two"


def test_the_deadline_counts_before_all() -> None:
    error, _ = fault(hang, timeout_s=0.3)
    assert isinstance(error, DeadlineExceeded)


# --- what an upstream says ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "body", "kind", "text"),
    [
        (429, {"error": "slow down"}, Overloaded, "slow down"),
        (401, {"error": {"message": "bad key"}}, UpstreamError, "wants a token .*bad key"),
        (404, {"message": "nothing here"}, UpstreamError, "no model 'org/m'.*/v1/chat/completions: nothing here"),
        (400, {"detail": "temperature: too hot"}, InvalidParameter, "too hot"),
        (422, b"plain words", InvalidParameter, "plain words"),
        (502, b"<html>\n<b>Bad\x00Gateway", UpstreamError, "<html> <b>Bad Gateway"),
        (503, {}, UpstreamError, "503 at"),
    ],
)
def test_statuses_become_errors_with_the_upstreams_words(code: int, body: object, kind: type[ZmqserveError], text: str) -> None:
    error, _ = fault(status(code, body), settings={"retries": 0, "model": "org/m"})
    assert type(error) is kind
    assert re.search(text, error.message), error.message
    assert error.data["status"] == code


@pytest.mark.parametrize(
    ("body", "context_length", "tokens"),
    [
        ("This model's maximum context length is 512 tokens. However, your prompt contains at least 513 input tokens", 512, 513),
        ("max_tokens=3000 cannot be greater than max_model_len=512. Please request fewer output tokens.", 512, 3000),
        ("This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.", 4097, 5000),
        (
            "maximum context length is 512 tokens. However, you requested 612 tokens (200 in the messages, 412 in the completion)",
            512,
            612,
        ),
        ("`inputs` tokens + `max_new_tokens` must be <= 2048. Given: 2000 `inputs` tokens and 100 `max_new_tokens`", 2048, 2100),
        ("Input validation error: `inputs` must have less than 512 tokens. Given: 600", 512, 600),
    ],
)
def test_a_request_over_the_context_is_an_overflow_with_both_numbers(body: str, context_length: int, tokens: int) -> None:
    error, made = fault(status(400, {"error": {"message": body}}))
    assert isinstance(error, ContextOverflow)
    assert (made, error.context_length, error.tokens) == (1, context_length, tokens)


def test_a_giant_body_of_an_error_is_cut() -> None:
    async def giant(exchange: Exchange) -> None:
        await exchange.raw(b"HTTP/1.1 400 Bad\r\ncontent-type: text/plain\r\ncontent-length: 100000000000\r\n\r\n")
        while True:
            await exchange.raw(b"x" * 65536)

    error, _ = fault(giant)
    assert len(error.message) < 1000


@pytest.mark.parametrize(
    ("handler", "text"),
    [
        (lines(b"data: {broken\n\n"), "JSONDecodeError"),
        (lines(b"data: 5\n\n"), "AttributeError"),
        (lines(b'data: {"choices": 5}\n\n'), "TypeError"),
        (lines(b'data: {"choices": [{"index": 7, "delta": {"content": "a"}}]}\n\n'), "index 7"),
        (lines(b'data: {"choices": [{"index": 0, "delta": {"content": 5}}]}\n\n'), "no text"),
        (lines(b'data: {"choices": [{"index": 0, "delta": "a"}]}\n\n'), "AttributeError"),
        (lines(b"data: \xff\xfe\n\n"), "UTF-8"),
        (lines(b'{"id": "whole answer"}', "application/json"), "application/json"),
        (lines(b"<html>please log in", "text/html"), "text/html.*please log in"),
        (lines(b""), "finish_reason"),
        (lines(b"data: [DONE]\n\n"), "finish_reason"),
        (status(307, b"", location="http://127.0.0.1:9/elsewhere"), "redirects are not followed"),
        (status(301, b"", location="http://127.0.0.1:9/elsewhere"), "redirects are not followed"),
    ],
)
def test_nonsense_is_an_error_that_says_what_came(handler: Handler, text: str) -> None:
    error, _ = fault(handler, settings={"retries": 0})
    assert type(error) is UpstreamError
    assert re.search(text, error.message), error.message


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ({"message": "engine died", "code": 500}, UpstreamError),
        ({"message": "too many logprobs", "code": 400}, InvalidParameter),
        ("out of memory", UpstreamError),
        ({"message": "later", "code": 429}, Overloaded),
    ],
)
def test_an_error_in_the_stream_is_the_answers(said: Any, kind: type[ZmqserveError]) -> None:
    error, _ = fault(lines(b"data: " + json.dumps({"error": said}).encode() + b"\n\n"), settings={"retries": 0})
    assert type(error) is kind
    assert (said if isinstance(said, str) else said["message"]) in error.message


def test_a_line_without_end_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_client, "MOST_BYTES", 100_000)

    async def endless(exchange: Exchange) -> None:
        await exchange.begin()
        while True:
            await exchange.chunk(b"x" * 4096)

    error, _ = fault(endless, settings={"retries": 0})
    assert "a line of the stream has more than 100000 bytes" in error.message


def test_a_failing_request_fails_alone() -> None:
    fails = asyncio.Event()

    async def choose(exchange: Exchange) -> None:
        if exchange.body["messages"][0]["content"] == "fail":
            await exchange.begin()
            exchange.cut()
            fails.set()
        else:
            await exchange.begin()
            await exchange.event(piece("one"))
            await fails.wait()
            await exchange.event(piece(" two", finish="stop"))
            await exchange.end()

    with FakeUpstream(choose) as upstream, serving(hosted(upstream.url, retries=0)) as client:
        with client.chat("m", HELLO) as stream:
            next(iter(stream))
            with pytest.raises(UpstreamError):
                client.chat("m", [{"role": "user", "content": "fail"}], stream=False)
            assert stream.text() == "one two"
