"""What a hostile client may try on the clients' socket, message by message."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.errors import DuplicateRequest, InvalidParameter, MalformedMessage, Overloaded, ProtocolMismatch, UnknownModel
from zmqserve.params import SamplingParams

from .site import Honest, Site

pytestmark = pytest.mark.usefixtures("honest")

DEEP = b"\x91" * 100_000
HEADER = b"\x02\x07\xa1m\x00\xc0\xc0\x00\xc0\xc0\xc3"
"""Of a Generate with rid 7: its first ten fields, up to `stream`. The array's head comes before, the prompt behind."""

REFUSED: dict[str, tuple[Any, int, type[Exception]]] = {
    "an empty frame": (b"", 0, MalformedMessage),
    "a byte that msgpack does not have": (b"\xc1", 0, MalformedMessage),
    "text": (b"GET / HTTP/1.1\r\n\r\n", 0, MalformedMessage),
    "a pickle": (b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.", 0, MalformedMessage),
    "nesting of 100,000": (DEEP, 0, MalformedMessage),
    "nesting of 100,000 in a request": (b"\x9b" + HEADER + DEEP, 7, MalformedMessage),
    "nesting of 100,000 behind a Cancel": (b"\x93\x09\x07" + DEEP, 0, MalformedMessage),
    "an array that claims 4 Gi elements": (b"\xdd\xff\xff\xff\xff", 0, MalformedMessage),
    "a prompt that claims 4 GiB": (b"\x9b" + HEADER + b"\xdb\xff\xff\xff\xff", 7, MalformedMessage),
    "rids of a Ping that claim 4 Gi": (b"\x93\x0a\x01\xdd\xff\xff\xff\xff", 0, MalformedMessage),
    "a map where an array is due": (m.encode({"rid": 1}), 0, MalformedMessage),
    "an unknown tag": (m.encode([99, 7]), 7, MalformedMessage),
    "a tag that only a controller sends": (m.encode(m.Chunk(7, 0, 0, "x", b"")), 7, MalformedMessage),
    "a rid of 0": (m.encode([2, 0, "m"]), 0, MalformedMessage),
    "a rid below 0": (m.encode([2, -7, "m"]), 0, MalformedMessage),
    "a rid of 64 bits": (m.encode([2, 2**64 - 1, "m"]), 0, MalformedMessage),
    "a model without a name": (m.Generate(7, ""), 7, MalformedMessage),
    "a model's name of 257 characters": (m.Generate(7, "m" * 257), 7, MalformedMessage),
    "a label of 257 characters": (m.Generate(7, "m", affinity="a" * 257), 7, MalformedMessage),
    "a priority out of range": (m.encode([2, 7, "m", 1000]), 7, MalformedMessage),
    "a deadline of 0": (m.encode([2, 7, "m", 0, 0]), 7, MalformedMessage),
    "text that is no UTF-8": (b"\x93\x02\x07\xa1\xff", 7, MalformedMessage),
    "a Ping with too many rids": (m.encode((10, 3000, [1] * (m.MAX_PINGED + 1))), 0, MalformedMessage),
    "another version": (m.Hello(2), 0, ProtocolMismatch),
    "a model that nobody serves": (m.Generate(7, "no such model"), 7, UnknownModel),
    "no worker of that name to drain": (m.Drain(7, "nobody"), 7, InvalidParameter),
    "an unknown parameter": (b"\x9e" + HEADER + b"\xa2hi\xc0\xc0\x81\xa4evil\x01", 7, InvalidParameter),
    "a parameter out of range": (
        m.encode([2, 7, "m", 0, None, None, 0, None, None, True, "hi", None, None, {"top_p": 7}]),
        7,
        InvalidParameter,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_answered_by_a_typed_error_and_the_connection_goes_on(site: Site, name: str) -> None:
    said, rid, error = REFUSED[name]
    with site.raw_client() as peer:
        answer = peer.answer(said)
        assert isinstance(answer, m.Error), answer
        assert (answer.rid, answer.code, answer.retryable) == (rid, error.code, False)  # type: ignore[attr-defined]
        assert len(answer.message) < 600
        assert peer.is_served()


UNANSWERED: dict[str, Callable[[Honest], Any]] = {
    "Cancel of another's request": lambda honest: m.Cancel(honest.rid),
    "Cancel of nobody's request": lambda honest: m.Cancel(5),
}


@pytest.mark.parametrize("name", UNANSWERED)
def test_what_concerns_nobody_is_dropped_in_silence(site: Site, honest: Honest, name: str) -> None:
    with site.raw_client() as peer:
        peer.say(UNANSWERED[name](honest))
        assert peer.is_served()


def test_anothers_rid_in_a_ping_is_one_that_the_controller_does_not_know(site: Site, honest: Honest) -> None:
    with site.raw_client() as peer:
        assert peer.answer(m.Ping(3000, [honest.rid])).unknown == [honest.rid]


def test_anothers_rid_gets_an_answer_of_its_own_to_who_sent_it(site: Site, honest: Honest) -> None:
    """The same number twice, of two clients: neither sees a token of the other's."""
    with site.raw_client() as peer:
        peer.say(m.Generate(honest.rid, "m", stream=False, prompt="mine only"))
        reply = peer.hear()
        assert (type(reply), reply.rid, reply.choices[0].text) == (m.Reply, honest.rid, "mine only")


def test_a_rid_that_is_in_flight_is_refused_and_what_is_in_flight_goes_on(site: Site) -> None:
    with site.raw_client() as peer:
        request = m.Generate(7, "m", stream=False, prompt="a b c")
        peer.say(request, request)
        refused, reply = peer.hear(), peer.hear()
        assert (refused.code, reply.rid, reply.choices[0].text) == (DuplicateRequest.code, 7, "a b c")


def test_a_replayed_session_is_a_new_session(site: Site) -> None:
    """What ended may be asked again, under its old rid: it is a request like any other, and answered once each time."""
    with site.raw_client() as peer:
        for _ in range(3):
            peer.say(m.Hello(m.PROTOCOL), m.Generate(7, "m", stream=False, prompt="a b"), m.Cancel(8))
            assert isinstance(peer.hear(), m.Welcome)
            assert peer.hear().choices[0].text == "a b"
        assert peer.is_served()


@pytest.mark.parametrize("envelope", [[b""] * 16, [b"x" * 256], [b"a"] * 500])
def test_an_envelope_too_large_is_dropped_and_counted(site: Site, envelope: list[bytes]) -> None:
    before = site.counter("dropped: envelope too large")
    with site.raw_client() as peer:
        peer.send(*envelope, m.encode(m.Hello(m.PROTOCOL)))
        assert peer.is_served()
    assert site.counter("dropped: envelope too large") == before + 1


@pytest.mark.parametrize("envelope", [[], [b""], [b"", b"", b""], [b"x" * 255], [b"\0abcd"] * 15])
def test_an_envelope_comes_back_as_it_was(site: Site, envelope: list[bytes]) -> None:
    with site.raw_client() as peer:
        peer.send(*envelope, b"")
        assert peer.recv()[:-1] == envelope


def test_who_asks_for_more_than_its_share_is_told_to_wait(site: Site) -> None:
    """The worker has 256 slots: it takes so many, 20 wait for this client, and the others are refused at once."""
    with site.raw_client() as peer:
        params = SamplingParams(max_tokens=10_000)
        peer.say(*(m.Generate(rid, "m", prompt="never read", params=params) for rid in range(1, 400)))
        refused: list[m.Error] = []
        while len(refused) < 123:  # between what the others say
            if isinstance(told := peer.hear(), m.Error):
                refused.append(told)
        assert {each.code for each in refused} == {Overloaded.code}
        assert all(each.retry_after_ms is not None for each in refused)
    # Who leaves so takes all of it along.


def test_a_request_larger_than_a_message_may_be_ends_its_senders_connection(site: Site) -> None:
    with site.raw_client() as peer:
        with suppress(OSError):  # ended while it was still being sent
            peer.say(m.Generate(7, "m", prompt="x" * 2**21))
        assert peer.ends(5.0)
