"""No bytes at all make the Broker raise."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from zmqserve import messages as m
from zmqserve.broker import CONTROL_BYTES
from zmqserve.config import ControllerConfig
from zmqserve.errors import InvalidParameter, MalformedMessage, RequestError

from .fakes.network import Network


@pytest.mark.parametrize(
    ("payload", "rid"),
    [
        (b"", 0),
        (b"\xc1", 0),
        (b"hello", 0),
        (b"\x91" * 100_000, 0),
        (m.encode([2, 7]), 7),
        (m.encode([2, 7, ""]), 7),
        (m.encode([2, 7, "m", 1000]), 7),
        (m.encode([2, -7, "m"]), 0),
        (m.encode([2, 2**64 - 1, "m"]), 0),
        (m.encode([99, 7]), 7),
        (m.encode([9]), 0),
        (m.encode([10, 0, []]), 0),
        (m.encode({"rid": 1}), 0),
        (b"\x93\x02\x07\xa1\xff", 7),
        (m.encode([2, 7, "m", 0, None, None, 0, None, None]) + b"x", 7),
        (b"\xdc\x00\x09\x02\xcd\x01\x00", 256),
        (b"\xdd\xff\xff\xff\xff\x02\xce\x00\x00\x01\x00" + b"\xc0" * 2**20, 256),
        (b"\x99\x02\xcf\x00\x00", 0),
        (b"\x99\x02\xa1m", 0),
    ],
)
def test_what_is_no_message_is_answered_with_an_error_that_names_the_rid_if_it_can(payload: bytes, rid: int) -> None:
    network = Network()
    client = network.client()
    network.worker()
    client.send(payload)
    (error,) = client.got
    assert (type(error), error.rid, error.retryable) == (m.Error, rid, False)
    network.assert_clean()


@pytest.mark.parametrize(
    ("message", "kind", "limit"),
    [
        (m.encode([2, 7, "m"]) + b"\xc0" * CONTROL_BYTES, MalformedMessage, CONTROL_BYTES),
        (m.encode([8, 7, "x" * CONTROL_BYTES]), MalformedMessage, CONTROL_BYTES),
        (m.encode([2, 7, "m"]) + b"\xc0" * ControllerConfig().request_bytes, InvalidParameter, ControllerConfig().request_bytes),
        (m.encode([8, 7, "x" * ControllerConfig().request_bytes]), InvalidParameter, ControllerConfig().request_bytes),
    ],
    ids=["a long request with a bad end", "a long message", "too long a request with a bad end", "too long a message"],
)
def test_what_is_long_and_no_request_is_refused_by_its_size(message: bytes, kind: type[RequestError], limit: int) -> None:
    network = Network()
    client = network.client()
    client.send(message)
    (error,) = client.got
    assert (error.rid, error.code, error.data["limit"]) == (7, kind.code, limit)
    network.assert_clean()


@hypothesis_settings(max_examples=1000)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.one_of(st.integers(-5, 110), st.text(max_size=5), st.none(), st.binary(max_size=5), st.floats()), max_size=12).map(
            m.encode
        ),
        st.tuples(st.integers(0, 40), st.binary(max_size=30)).map(lambda pair: b"\x9b" + bytes([pair[0]]) + pair[1]),
    )
)
def test_no_bytes_at_all_make_the_broker_raise(data: bytes) -> None:
    network = Network()
    client, worker = network.client(), network.worker()
    client.send(data)
    network.broker.from_worker(network.now, worker.identity, data, data)
    network.broker.from_worker(network.now, b"\0strange", data, data, certain=False)
    worker.say(m.READY, data, epoch=0)
    worker.say(m.LOAD, data)
    network.check()


def test_a_message_cut_anywhere_is_an_error_or_nothing() -> None:
    network = Network()
    client = network.client()
    network.worker()
    whole = m.encode(m.Generate(7, "m", prompt="hello", affinity="k", trace="t"))
    for end in range(len(whole)):
        client.send(whole[:end])
    assert {type(message) for message in client.got} == {m.Error}
    assert msgspec.msgpack.decode(whole, type=m.Generate).prompt == "hello"


def test_outcomes_that_a_worker_makes_up_are_counted_as_one() -> None:
    """Counters are for good: what they are called must not be up to a peer."""
    network = Network()
    client, worker = network.client(), network.worker(slots=50)
    for rid in range(1, 51):
        client.generate(rid)
        worker.task(rid).done(outcome=f"made up {rid}")
    counters = network.broker.counters
    assert counters["ended: other"] == 50
    assert not any("made up" in name for name in counters)


def test_a_ping_with_too_many_rids_is_refused_unread() -> None:
    network = Network()
    client = network.client()
    client.send(m.encode((10, 3000, [1] * (m.MAX_PINGED + 1))))
    assert "Ping.rids" in client.error(0).message
