"""What Client, AsyncClient and PolledClient have in common, over real sockets, against a scripted controller."""

from __future__ import annotations

import copy
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from enum import StrEnum
from time import monotonic
from typing import Any

import pytest
import zmq

from tests.fakes.broker import PATIENCE_S, TIMINGS, USAGE, Broker, chunk, done, echo
from tests.fakes.clients import KINDS, Asker, OnLoop
from tests.processes import eventually
from zmqserve import errors
from zmqserve import messages as m
from zmqserve.params import EmbedParams, SamplingParams

Start = Callable[..., tuple[Broker, Asker]]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Callable[..., Asker]:
    return KINDS[request.param]


@pytest.fixture
def start(kind: Callable[..., Asker]) -> Iterator[Start]:
    """Makes a broker and a client of it; both end with the test."""
    with ExitStack() as stack:

        def make(script: Any = None, *, broker: dict[str, Any] | None = None, **options: Any) -> tuple[Broker, Asker]:
            made = stack.enter_context(Broker(script, **(broker or {})))
            return made, stack.enter_context(kind(made.endpoint, **options))

        yield make


class Text(str):
    """As those of numpy and of template engines are."""

    __slots__ = ()

    def __str__(self) -> str:
        return "what it shows"


class Name(StrEnum):
    MODEL = "m"


def read(stream: Any) -> list[Any]:
    return list(iter(stream.next, None))


# --- verbs -------------------------------------------------------------------------------------


def test_a_stream_yields_chunks_and_then_knows_the_whole(start: Start) -> None:
    broker, client = start(echo)
    stream = client.stream("generate", "m", "hello", max_tokens=3, timeout_s=5, priority=2, affinity="k", trace="t")
    assert [(c.text, c.token_ids, c.seq, c.index) for c in read(stream)] == [("t0 ", [0], 0, 0), ("t1 ", [1], 1, 0), ("t2 ", [2], 2, 0)]
    raw = stream.raw
    assert (raw.finish_reason, raw.usage, raw.timings, raw.resumed) == ("length", USAGE, TIMINGS, 0)
    assert (raw.completion.text, raw.completion.token_ids) == ("t0 t1 t2 ", [0, 1, 2])
    asked = broker.expect(m.Generate)
    assert (asked.rid, asked.prompt, asked.priority, asked.affinity, asked.trace) == (raw.rid, "hello", 2, "k", "t")
    assert asked.deadline_ms is not None
    assert 4000 < asked.deadline_ms <= 5000
    assert asked.params == SamplingParams(max_tokens=3)


def test_each_chunk_is_there_before_the_next_was_made(start: Start) -> None:
    broker, client = start()
    stream = client.stream("chat", "m", [{"role": "user", "content": "x"}])
    rid = broker.expect(m.Generate).rid
    for seq in range(3):
        broker.send(chunk(rid, seq))
        piece = stream.next()
        assert piece is not None
        assert piece.seq == seq
    broker.send(done(rid, 3))
    assert read(stream) == []


def test_the_verbs_that_answer_in_one_piece(start: Start) -> None:
    np = pytest.importorskip("numpy")
    card = m.ModelCard("m", context_length=2048, aliases=["mm"])
    status = m.ControllerStatus("c", "0.1", 1, "lottery", 1.0, [], [], [], [])
    vectors = np.arange(6, dtype="<f4").reshape(2, 3)

    def script(asked: Any) -> list[Any]:
        rid = asked.rid
        answers: dict[Any, Any] = {
            m.CountTokens: m.Tokens(rid, 7, 2048),
            m.ModelDetails: m.Details(rid, card),
            m.ListModels: m.Models(rid, [m.ModelStatus(card, "ready", ["w1"], 1, 2, 0, 4)]),
            m.Status: m.StatusReply(rid, status),
            m.Drain: m.DrainReply(rid, "w1", 3),
            m.Embed: m.Embedding(rid, "float32", (2, 3), vectors.tobytes(), USAGE, TIMINGS),
        }
        return [answers[type(asked)]] if type(asked) in answers else echo(asked)

    broker, client = start(script)
    assert client.ask("generate", "m", [1, 2], stream=False, max_tokens=2).text == "t0 t1 "
    assert broker.expect(m.Generate).token_ids == m.pack_ids([1, 2])
    assert client.ask("chat", "m", [m.ChatMessage("user", "hi")], stream=False).text == "t0 t1 t2 "
    assert broker.expect(m.Generate).messages == [m.ChatMessage("user", "hi")]
    assert np.array_equal(client.ask("embed", "m", ["a", "b"], normalize=True), vectors)
    assert client.ask("count_tokens", "m", "a b") == 7
    assert client.ask("model_details", "m") == card
    (model,) = client.ask("models")
    assert (model.name, model.running, model.workers) == ("m", 1, ["w1"])
    assert client.ask("status") == status
    assert client.ask("drain_worker", "w1", grace_s=1.5) == 3
    kinds: list[Any] = [m.Embed, m.CountTokens, m.ModelDetails, m.ListModels, m.Status]
    assert len({broker.expect(each).rid for each in kinds}) == 5
    assert broker.expect(m.Drain).grace_ms == 1500


@pytest.mark.parametrize(
    ("verb", "args", "options", "parameter"),
    [
        ("generate", ("m", ""), {}, "prompt"),
        ("generate", ("m", "x"), {"max_token": 1}, "max_token"),
        ("generate", ("m", "x"), {"temperature": -1}, "temperature"),
        ("generate", ("m", "a\ud800"), {}, "prompt"),
        ("generate", ("m", "x"), {"stream": "no"}, "stream"),
        ("generate", ("m", bytearray(b"abcd")), {}, "prompt"),
        ("generate", ("m", memoryview(b"abcd")), {}, "prompt"),
        ("generate", ("m", "x"), {"affinity": "\ud800"}, "affinity"),
        ("generate", ("m", "x"), {"stop": [Text("x")]}, "params"),
        ("generate", ("m", "x"), {"params": {"max_tokens": 1}}, "params"),
        ("generate", ("m", "x"), {"params": EmbedParams(), "max_tokens": 1}, "params"),
        ("chat", ("m", [{"role": "user"}]), {}, "messages[0]"),
        ("chat", ("m", b"x"), {}, "messages"),
        ("embed", ("m", "x"), {}, "texts"),
        ("embed", ("m", None), {}, "texts"),
        ("embed", ("m", bytearray(b"x")), {}, "texts"),
        ("count_tokens", ("m", bytearray(b"abcd")), {}, "prompt"),
        ("count_tokens", ("m", [1, 2]), {}, "prompt"),
        ("drain_worker", ("",), {}, "worker"),
        ("drain_worker", ("w",), {"timeout_s": 0}, "timeout_s"),
        ("models", (), {"timeout_s": -1}, "timeout_s"),
        ("status", (), {"timeout_s": "1"}, "timeout_s"),
    ],
)
def test_what_cannot_be_right_is_never_sent(start: Start, verb: str, args: Any, options: Any, parameter: str) -> None:
    broker, client = start()
    with pytest.raises(errors.InvalidParameter) as caught:
        client.ask(verb, *args, **options)
    assert caught.value.parameter == parameter
    assert broker.nothing_arrived()


@pytest.mark.parametrize("parameter", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("shape", [(0,), (2,), (2, 2)])
def test_an_array_that_is_no_list_is_named(start: Start, parameter: str, shape: tuple[int, ...]) -> None:
    np = pytest.importorskip("numpy")
    _, client = start()
    with pytest.raises(errors.InvalidParameter) as caught:
        client.ask("generate", "m", "x", stream=False, **{parameter: np.zeros(shape, np.int64)})
    assert caught.value.parameter == parameter


def test_what_is_derived_from_a_text_is_a_text(kind: Callable[..., Asker]) -> None:
    numpys = pytest.importorskip("numpy").str_

    def script(asked: Any) -> list[Any]:
        return [m.Tokens(asked.rid, 7, 2048)] if isinstance(asked, m.CountTokens) else echo(asked)

    with Broker(script) as broker, kind(broker.endpoint, name=Text("n")) as client:
        for prompt in (Text("a"), numpys("a")):
            client.ask("generate", Text("m"), prompt, stream=False, affinity=Text("k"), trace=numpys("t"))
            asked = broker.expect(m.Generate)
            assert (asked.model, asked.prompt, asked.affinity, asked.trace) == ("m", "a", "k", "t")
        for turn in ({"role": Text("user"), "content": Text("a")}, m.ChatMessage(numpys("user"), numpys("a"))):
            client.ask("chat", Name.MODEL, [turn], stream=False)
            asked = broker.expect(m.Generate)
            assert (asked.model, asked.messages) == ("m", [m.ChatMessage("user", "a")])
        assert client.ask("count_tokens", numpys("m"), Text("a")) == 7
        assert broker.expect(m.CountTokens).prompt == "a"


def test_vectors_are_those_of_the_texts_that_were_sent(start: Start) -> None:
    """Whatever the caller's list is by then."""
    pytest.importorskip("numpy")
    texts = ["a", "b"]

    def script(asked: Any) -> list[Any]:
        texts.append("later")
        return [m.Embedding(asked.rid, "float32", (2, 3), bytes(24), USAGE, TIMINGS)]

    broker, client = start(script)
    assert client.ask("embed", "m", texts).shape == (2, 3)
    assert broker.expect(m.Embed).texts == ["a", "b"]


def test_a_wrong_option_of_a_client_is_named(kind: Callable[..., Asker]) -> None:
    with pytest.raises(errors.InvalidParameter, match="'retry' is not an option of a client"):
        kind("tcp://127.0.0.1:1", retry=3)


@pytest.mark.parametrize(("given", "meant"), [("timeout", "timeout_s"), ("max_token", "max_tokens"), ("temprature", "temperature")])
def test_a_name_that_is_nearly_right_is_told_the_right_one(start: Start, given: str, meant: str) -> None:
    _, client = start()
    with pytest.raises(errors.InvalidParameter, match=f"did you mean '{meant}'"):
        client.ask("generate", "m", "x", **{given: 1})


@pytest.mark.parametrize("endpoints", [5, [5], b"tcp://127.0.0.1:1", ["tcp://127.0.0.1:1", None]])
def test_what_is_no_endpoint_is_said(kind: Callable[..., Asker], endpoints: Any) -> None:
    with pytest.raises(errors.InvalidParameter) as caught:
        kind(endpoints)
    assert caught.value.parameter == "endpoints"


@pytest.mark.parametrize("name", [5, "x" * 257, "\ud800"])
def test_a_name_that_no_controller_takes_is_said_before_the_first_request(kind: Callable[..., Asker], name: Any) -> None:
    with pytest.raises(errors.InvalidParameter) as caught:
        kind("tcp://127.0.0.1:1", name=name)
    assert caught.value.parameter == "name"


@pytest.mark.parametrize(("verb", "args"), [("models", ()), ("status", ()), ("drain_worker", ("w",)), ("model_details", ("m",))])
def test_every_verb_may_have_a_deadline(start: Start, verb: str, args: Any) -> None:
    _, client = start()  # a controller that greets, and says no more
    with pytest.raises(errors.DeadlineExceeded, match=r"within the deadline of 0\.05 s"):
        client.ask(verb, *args, timeout_s=0.05)


# --- ends --------------------------------------------------------------------------------------


def test_errors_are_typed_and_come_after_what_came_before_them(start: Start) -> None:
    _, client = start(lambda a: [chunk(a.rid, 0), m.Error(a.rid, 40303, "too long", data={"context_length": 8, "tokens": 9})])
    stream = client.stream("generate", "m", "x")
    piece = stream.next()
    assert piece is not None
    assert piece.text == "t0 "
    with pytest.raises(errors.ContextOverflow) as caught:
        stream.next()
    assert (caught.value.context_length, caught.value.tokens) == (8, 9)
    assert stream.next() is None
    with pytest.raises(errors.ContextOverflow):
        client.ask("generate", "m", "x", stream=False)


def test_retries_and_deadlines(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqserve.session.DEADLINE_GRACE_S", 0.05)
    seen: list[int] = []

    def script(asked: Any) -> list[Any]:
        if not isinstance(asked, m.Generate) or asked.model == "mute":
            return []
        seen.append(asked.rid)
        return echo(asked) if len(seen) == 3 else [m.Error(asked.rid, 42903, "full", retryable=True, retry_after_ms=20)]

    _, client = start(script)
    assert client.ask("generate", "m", "x", stream=False, retries=2).text == "t0 t1 t2 "
    assert len(set(seen)) == 1
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.1 s"):
        client.ask("generate", "mute", "x", stream=False, timeout_s=0.1)
    with pytest.raises(errors.DeadlineExceeded):
        client.ask("count_tokens", "mute", "x", timeout_s=0.1)


@pytest.mark.parametrize("way", ["close", "forget"])
def test_leaving_a_stream_cancels_it_once(start: Start, way: str) -> None:
    broker, client = start(lambda asked: [m.Tokens(asked.rid, 1)] if isinstance(asked, m.CountTokens) else [])
    stream: Any = client.stream("generate", "m", "x")
    rid = broker.expect(m.Generate).rid
    broker.send(chunk(rid, 0))
    assert stream.next().seq == 0
    if way == "close":
        stream.close()
        stream.close()
        assert stream.next() is None
    del stream
    assert client.ask("count_tokens", "m", "x") == 1
    # A forgotten one is given up when the client does something next, in whatever order.
    late = [broker.expect(object), broker.expect(object)]
    assert [message.rid for message in late if isinstance(message, m.Cancel)] == [rid]
    assert client.ask("count_tokens", "m", "x") == 1
    broker.expect(m.CountTokens)
    assert broker.nothing_arrived()


def test_an_unread_stream_ends_only_above_its_bound_and_blocks_nobody(start: Start) -> None:
    """16 MiB by default. What had come of it can still be read."""
    broker, client = start()
    slow, other = client.stream("generate", "m", "slow"), client.stream("generate", "m", "x")
    rids = [broker.expect(m.Generate).rid for _ in range(2)]
    piece = "x" * 2**20
    for seq in range(17):
        broker.send(m.Chunks([chunk(rids[0], seq, piece), chunk(rids[1], seq)]))
        taken = other.next()
        assert taken is not None
        assert taken.seq == seq
        if seq < 15:
            assert slow.raw._call.end is None
    assert broker.expect(m.Cancel).rid == rids[0]
    assert [len(slow.next().text) for _ in range(15)] == [2**20] * 15  # type: ignore[union-attr]
    with pytest.raises(errors.SlowConsumer, match=str(16 * 2**20)):
        slow.next()
    other.close()


def test_an_answer_goes_on_at_the_next_controller(start: Start, kind: Callable[..., Asker]) -> None:
    broker, _ = start()
    other, _ = start()
    with kind([broker.endpoint, other.endpoint]) as client:
        stream = client.stream("generate", "m", "x")
        rid = broker.expect(m.Generate).rid
        broker.send(m.FirstChunk(rid, 0, 0, "t0 ", m.pack_ids([0]), None, "f"))
        assert stream.next() is not None
        broker.close()
        threading.Thread(target=lambda: other.send(done(other.expect(m.Generate).rid, 1, last=chunk(rid, 1)))).start()
        assert [piece.seq for piece in read(stream)] == [1]
        assert (stream.raw.completion.text, stream.raw.resumed) == ("t0 t1 ", 1)


def test_an_idle_client_whose_connection_leads_nowhere_any_more_makes_another(start: Start) -> None:
    """As after a proxy has lost what was behind it: nothing tells either end."""
    broker, client = start(echo, broker={"limits": m.Limits(ttl_ms=50)})
    assert client.ask("generate", "m", "x", stream=False).text == "t0 t1 t2 "
    heard_s = monotonic()
    broker.deaf_to.add(broker.last_peer)
    eventually(lambda: monotonic() - heard_s > 0.1, PATIENCE_S, "the controller was heard too long ago")
    assert client.ask("generate", "m", "x", stream=False).text == "t0 t1 t2 "


def test_nobody_there_is_said_soon(kind: Callable[..., Asker]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with kind(f"tcp://127.0.0.1:{taken.getsockname()[1]}") as client:
            with pytest.raises(errors.ControllerUnreachable):
                client.ask("status")
            with pytest.raises(errors.ControllerUnreachable):
                read(client.stream("generate", "m", "x"))


def test_a_closed_client_says_so(start: Start) -> None:
    broker, client = start()
    stream = client.stream("generate", "m", "x")
    rid = broker.expect(m.Generate).rid
    client.close()
    client.close()
    assert broker.expect(m.Cancel).rid == rid
    with pytest.raises(errors.ConnectionFailed, match="closed"):
        read(stream)
    with pytest.raises(errors.ConnectionFailed, match="closed"):
        client.ask("models")


def test_a_given_context_is_shared_and_left_alone(kind: Callable[..., Asker]) -> None:
    with zmq.Context() as context, Broker(echo, endpoint="inproc://clients", context=context) as broker:
        with kind(broker.endpoint, context=context) as client:
            assert client.ask("generate", "m", "x", stream=False).text == "t0 t1 t2 "
        assert not context.closed


def test_a_context_ended_under_a_client_closes_it(kind: Callable[..., Asker]) -> None:
    context: zmq.Context[Any] = zmq.Context()
    with Broker() as broker, kind(broker.endpoint, context=context) as client:
        stream = client.stream("generate", "m", "x")
        broker.expect(m.Generate)
        ender = threading.Thread(target=context.term)
        ender.start()
        with pytest.raises(errors.ConnectionFailed, match="closed"):
            stream.next()
        ender.join(10)
        assert not ender.is_alive()


# --- what is left ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["closed", "forgotten"])
def test_no_descriptor_is_left(kind: Callable[..., Asker], way: str) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Broker(echo) as broker:

        def use() -> None:
            client = kind(broker.endpoint, connect_timeout_s=20.0)
            assert client.ask("generate", "m", "x", stream=False).text
            client.stream("generate", "m", "y")
            if way == "closed":
                client.close()
            if isinstance(client, OnLoop):
                client.runner.close()

        use()
        before = descriptors()
        for _ in range(5):
            use()
        eventually(lambda: descriptors() <= before, PATIENCE_S, "no more descriptors than before")


def test_none_can_be_pickled_or_copied(start: Start) -> None:
    _, client = start(echo)
    stream = client.stream("generate", "m", "x")
    for what in (client.raw, stream.raw):
        with pytest.raises(TypeError, match=rf"{type(what).__name__} .* make one in each process"):
            pickle.dumps(what)
        with pytest.raises(TypeError, match="make one in each process"):
            copy.copy(what)
    read(stream)
