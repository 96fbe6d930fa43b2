"""What a bridge reads as a job, and what it says of what is none."""

from __future__ import annotations

import json
import sys
from typing import Any

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqserve import bridge_results
from zmqserve.asking import Asking
from zmqserve.bridge_jobs import JSON, MSGPACK, Envelope, Job, encoding_of, read
from zmqserve.errors import RequestError, ZmqserveError

LIMIT = 100_000


def refused(job: Any, model: str | None = "m") -> tuple[Envelope, RequestError]:
    payload = job if isinstance(job, bytes) else json.dumps(job).encode()
    envelope, found = read([payload], model, LIMIT)
    assert isinstance(found, RequestError), found
    return envelope, found


def accepted(job: dict[str, Any], model: str | None = "m") -> Job:
    """The job, which both encodings read the same."""
    _, found = read([json.dumps(job).encode()], model, LIMIT)
    _, packed = read([msgpack.packb(job)], model, LIMIT)
    assert isinstance(found, Job), found
    assert found == packed
    return found


def test_a_job_says_what_is_asked_and_how() -> None:
    assert accepted({"prompt": "x"}) == Job("m", "prompt", "x", {}, None, stream=False)
    said = {"prompt": "x", "model": "n", "timeout_s": 2, "priority": -3, "affinity": "k", "trace": "t", "stream": True, "params": {"n": 2}}
    assert accepted(said) == Job("n", "prompt", "x", {"priority": -3, "affinity": "k", "trace": "t", "n": 2}, 2.0, stream=True)
    assert accepted({"token_ids": [1, 2]}).input == [1, 2]
    assert accepted({"texts": ["a"], "params": {"dimensions": 2}}) == Job("m", "texts", ["a"], {"dimensions": 2}, None, stream=False)
    turns = [{"role": "user", "content": "hi"}]
    assert accepted({"messages": turns, "params": {"guided": {"choice": ["a"]}, "stop": "x"}}).input == turns


@pytest.mark.parametrize(
    ("payload", "encoding"),
    [
        (b"{}", JSON),
        (b" \r\n\t{}", JSON),
        (b"", JSON),
        (b"hello", JSON),
        (b"\x80", MSGPACK),
        (b"\xde\0\0", MSGPACK),
        (b"\xdf", MSGPACK),
        (b"\xc1", MSGPACK),
    ],
)
def test_the_first_byte_tells_the_encoding(payload: bytes, encoding: Any) -> None:
    assert encoding_of(payload) is encoding


@pytest.mark.parametrize(
    ("job", "name", "parameter", "words"),
    [
        ({}, "InvalidParameter", "prompt", "this one has none"),
        ({"prompt": "a", "texts": ["b"]}, "InvalidParameter", "texts", "this one has prompt and texts"),
        ({"prompt": ["a"]}, "InvalidParameter", "prompt", "Expected `str | null`, got `array`"),
        (
            {"prompt": "a", "promt": 1},
            "InvalidParameter",
            "promt",
            "'promt' is not a key of a job (did you mean 'prompt'?); known: id, metadata, model, prompt",
        ),
        ({"prompt": "a", "params": {"max_token": 1}}, "InvalidParameter", "max_token", "known: max_tokens"),
        ({"prompt": "a", "params": {"timeout_s": 1}}, "InvalidParameter", "timeout_s", "'timeout_s' is not a parameter"),
        ({"prompt": "a", "params": [1]}, "InvalidParameter", "params", "Expected `object | null`, got `array`"),
        ({"prompt": "a", "params": {"guided": {"jsn": 1}}}, "InvalidParameter", "guided", "unknown field `jsn`"),
        ({"texts": ["a"], "params": {"max_tokens": 1}}, "InvalidParameter", "max_tokens", "known: dimensions"),
        ({"texts": ["a", 1]}, "InvalidParameter", "texts", "texts[1]"),
        ({"texts": ["a"], "stream": True}, "InvalidParameter", "stream", "vectors come in one piece"),
        ({"token_ids": [True]}, "InvalidParameter", "token_ids", "token_ids[0]"),
        ({"prompt": "a", "timeout_s": 0}, "InvalidParameter", "timeout_s", "above 0"),
        ({"prompt": "a", "priority": 1.5}, "InvalidParameter", "priority", "Expected `int | null`"),
        ({"prompt": "a", "model": ""}, "InvalidParameter", "model", "a name of 1 to"),
        ({"prompt": "a" * LIMIT}, "InvalidParameter", "job_bytes", f"at most {LIMIT}"),
    ],
)
def test_what_is_wrong_with_a_job_is_named(job: dict[str, Any], name: str, parameter: str, words: str) -> None:
    labelled = {"id": 4, "metadata": {"a": 1}, **job}
    for payload in (json.dumps(labelled).encode(), msgpack.packb(labelled)):
        envelope, error = refused(payload)
        assert (type(error).__name__, error.data.get("parameter")) == (name, parameter)
        assert words in error.message
        told = envelope.encoding.encode({"id": envelope.id, "metadata": envelope.metadata})
        assert (json.loads(told) if payload[:1] == b"{" else msgpack.unpackb(told)) == {"id": 4, "metadata": {"a": 1}}


def test_a_job_without_a_model_needs_one_of_the_bridge() -> None:
    assert refused({"prompt": "a"}, model=None)[1].message == "the job names no model, and the bridge has no --model"


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "not json"),
        (b'{"id": 1, "prompt": "a"', "truncated"),
        (b'{"id": 1, "prompt": "a"} {}', "trailing"),
        (b'{"id": "\xff", "prompt": "a"}', "neither a msgpack map nor JSON in UTF-8"),
        (b'{"id": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"prompt": "a", "params": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}", "nested too deeply"),
        (b"[1]", "not a map"),
        (b"7", "not a map"),
        (b"\x93\1\2\3", "not a map"),
        (b"\x81\1\2", "not a map with texts as keys"),
        (b"\x81\xa2id", "not msgpack"),
        (b"\x81\xa2id" + b"\x91" * 5000, "nested too deeply"),
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
    ],
)
def test_what_cannot_be_read_is_malformed_and_has_no_id(payload: bytes, words: str) -> None:
    envelope, error = refused(payload)
    assert (type(error).__name__, bytes(envelope.id)) == ("MalformedMessage", bytes(envelope.encoding.null))
    assert words in error.message
    assert b"MalformedMessage" in bridge_results.of_error(envelope, error)


def test_a_label_does_not_keep_the_job_in_memory() -> None:
    payload = b'{"id": 1, "metadata": [2], "texts": ["%s"]}' % (b"x" * 1000)
    before = sys.getrefcount(payload)
    envelope, _ = read([payload], "m", LIMIT)
    assert (bytes(envelope.id), bytes(envelope.metadata)) == (b"1", b"[2]")
    assert sys.getrefcount(payload) == before


def turned_down(job: Job) -> ZmqserveError | None:
    """What the SDK says of it, without sending it."""
    asking = Asking("tcp://127.0.0.1:1", {})
    asks: dict[str, Any] = {"texts": asking.embed, "messages": asking.chat}
    try:
        asks.get(job.ask, asking.generate)(job.model, job.input, job.options)
    except ZmqserveError as error:
        return error
    return None


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_keys = st.sampled_from(
    ["id", "metadata", "prompt", "messages", "token_ids", "texts", "params", "model", "timeout_s", "priority", "affinity", "stream", "x"]
)
_params = st.dictionaries(st.sampled_from(["max_tokens", "stop", "guided", "temperature", "n", "seed", "dimensions"]), _values, max_size=3)
_jobs = st.dictionaries(_keys, _values | _params, max_size=4)


@given(_jobs | _jobs.map(lambda job: {"prompt": "a", **job}) | st.binary(max_size=20))
def test_whatever_comes_is_a_job_or_a_typed_error(job: Any) -> None:
    """What is read as a job may still be turned down by the SDK, with a typed error as well; and each error can be told."""
    for payload in [job] if isinstance(job, bytes) else [msgspec.json.encode(job), msgpack.packb(job)]:
        envelope, found = read([payload], "m", LIMIT)
        error = found if isinstance(found, RequestError) else turned_down(found)
        if error is None:
            continue
        told = bridge_results.of_error(envelope, error)
        decoded = msgspec.json.decode(told) if envelope.encoding is JSON else msgpack.unpackb(told, strict_map_key=False)
        assert decoded["error"]["name"] == type(error).__name__
        if isinstance(job, dict) and "id" in job:
            assert decoded["id"] == job["id"]
