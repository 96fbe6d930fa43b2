"""The client over real sockets, against a scripted controller."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest
import zmq

from tests.fakes.broker import PATIENCE_S, TIMINGS, USAGE, Broker, chunk, done, echo
from zmqserve import errors
from zmqserve import messages as m
from zmqserve.client import Client
from zmqserve.connection import _Seat
from zmqserve.params import EmbedParams, SamplingParams
from zmqserve.peer import State
from zmqserve.requests import EmbedFields, Sampling, Turn
from zmqserve.results import Completion, ServedModel

Start = Callable[..., tuple[Broker, Client]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes a broker and a client of it; both end with the test."""
    with ExitStack() as stack:

        def make(script: Any = None, *, broker: dict[str, Any] | None = None, **options: Any) -> tuple[Broker, Client]:
            made = stack.enter_context(Broker(script, **(broker or {})))
            return made, stack.enter_context(Client(made.endpoint, **options))

        yield make


# --- answers -----------------------------------------------------------------------------------


def test_a_stream_yields_chunks_and_then_knows_the_whole(start: Start) -> None:
    broker, client = start(echo)
    with client.generate("m", "hello", max_tokens=3, temperature=0, timeout_s=5, priority=2, affinity="k", trace="t") as stream:
        assert [(c.text, c.token_ids, c.seq, c.index) for c in stream] == [("t0 ", [0], 0, 0), ("t1 ", [1], 1, 0), ("t2 ", [2], 2, 0)]
        assert (stream.finish_reason, stream.usage, stream.timings) == ("length", USAGE, TIMINGS)
        assert list(stream) == []
    assert stream.completion == Completion(stream.completion.choices, USAGE, TIMINGS)
    assert (stream.completion.text, stream.completion.token_ids, stream.completion.resumed) == ("t0 t1 t2 ", [0, 1, 2], 0)
    asked = broker.expect(m.Generate)
    assert (asked.prompt, asked.stream, asked.priority, asked.affinity, asked.trace) == ("hello", True, 2, "k", "t")
    assert asked.deadline_ms is not None
    assert 4000 < asked.deadline_ms <= 5000, "what the greeting took is gone"
    assert asked.params == SamplingParams(max_tokens=3, temperature=0)
    assert asked.rid == stream.rid


def test_a_chunk_is_there_before_the_next_was_made(start: Start) -> None:
    broker, client = start()
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    for seq in range(3):
        broker.send(chunk(rid, seq))
        assert next(stream).seq == seq
    broker.send(done(rid, 3))
    assert stream.text() == "t0 t1 t2 "


def test_without_stream_the_whole_is_returned(start: Start) -> None:
    _, client = start(echo)
    answer = client.generate("m", "x", stream=False, max_tokens=2)
    assert (answer.text, answer.token_ids, answer.finish_reason, answer.usage) == ("t0 t1 ", [0, 1], "length", USAGE)


def test_several_choices(start: Start) -> None:
    def script(asked: Any) -> list[Any]:
        pieces = [chunk(asked.rid, 0, "a"), chunk(asked.rid, 1, "b", index=1), chunk(asked.rid, 2, "c")]
        return [m.Chunks(pieces), m.Done(asked.rid, 3, ["stop", "length"], USAGE, TIMINGS)]

    _, client = start(script)
    answer = client.generate("m", "x", stream=False, n=2)
    assert [(choice.text, choice.finish_reason) for choice in answer.choices] == [("ac", "stop"), ("b", "length")]


def test_prompts_may_be_texts_ids_or_messages(start: Start) -> None:
    broker, client = start(echo)
    client.generate("m", [1, 2, 2**32 - 1], stream=False)
    assert broker.expect(m.Generate).token_ids == m.pack_ids([1, 2, 2**32 - 1])
    turns: list[Turn] = [{"role": "system", "content": "be brief"}, m.ChatMessage("user", "hi")]
    assert client.chat("m", turns, stream=False).text == "t0 t1 t2 "
    assert broker.expect(m.Generate).messages == [m.ChatMessage("system", "be brief"), m.ChatMessage("user", "hi")]
    assert client.chat("m", turns, params=SamplingParams(max_tokens=9), max_tokens=1, stop="x").text() == "t0 "
    assert broker.expect(m.Generate).params == SamplingParams(max_tokens=1, stop=["x"])


def test_the_other_verbs(start: Start) -> None:
    card = m.ModelCard("m", context_length=2048, aliases=["mm"])
    status = m.ControllerStatus("c", "0.1", 1, "lottery", 1.0, [], [], [], [])

    def script(asked: Any) -> list[Any]:
        rid = asked.rid
        answers: dict[Any, Any] = {
            m.CountTokens: m.Tokens(rid, 7, 2048),
            m.ModelDetails: m.Details(rid, card),
            m.ListModels: m.Models(rid, [m.ModelStatus(card, "ready", ["w1"], 1, 2, 0, 4)]),
            m.Status: m.StatusReply(rid, status),
            m.Drain: m.DrainReply(rid, "w1", 3),
        }
        return [answers[type(asked)]]

    broker, client = start(script)
    assert client.count_tokens("m", "a b") == 7
    assert client.count_tokens("m", [{"role": "user", "content": "hi"}]) == 7
    assert client.model_details("m") == card
    (model,) = client.models()
    assert model == ServedModel(card, "ready", ["w1"], 1, 2, 4)
    assert (model.name, model.context_length, model.aliases) == ("m", 2048, ["mm"])
    assert client.status() == status
    assert client.drain_worker("w1", grace_s=1.5) == 3
    kinds: list[Any] = [m.CountTokens, m.CountTokens, m.ModelDetails, m.ListModels, m.Status]
    assert len({broker.expect(kind).rid for kind in kinds}) == 5
    assert broker.expect(m.Drain).grace_ms == 1500


def test_embeddings_are_arrays(start: Start) -> None:
    np = pytest.importorskip("numpy")
    wanted = np.arange(6, dtype="<f4").reshape(2, 3)
    _, client = start(lambda asked: [m.Embedding(asked.rid, "float32", (2, 3), wanted.tobytes(), USAGE, TIMINGS)])
    vectors = client.embed("e", ["a", "b"], normalize=True)
    assert vectors.dtype == np.float32
    assert np.array_equal(vectors, wanted)
    vectors[0, 0] = 5
    with pytest.raises(errors.MalformedMessage, match="3 texts"):
        client.embed("e", ["a", "b", "c"])


def test_without_numpy_embed_says_what_to_install(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    broker, client = start()
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(errors.Unsupported, match=r"pip install .*embeddings"):
        client.embed("e", ["a"])
    assert broker.nothing_arrived()


# --- what is refused before anything is sent ----------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "parameter"),
    [
        (lambda c: c.generate("m", ""), "prompt"),
        (lambda c: c.generate("m", []), "prompt"),
        (lambda c: c.generate("m", [1, -1]), "prompt"),
        (lambda c: c.generate("m", [1, "a"]), "prompt"),
        (lambda c: c.generate("m", 5), "prompt"),
        (lambda c: c.generate("m", b"x"), "prompt"),
        (lambda c: c.generate("m", {1}), "prompt"),
        (lambda c: c.generate("m", {"role": "user"}), "prompt"),
        (lambda c: c.generate("m", "a\ud800"), "prompt"),
        (lambda c: c.generate("", "x"), "model"),
        (lambda c: c.generate("m" * 300, "x"), "model"),
        (lambda c: c.generate("m", "x", max_tokens=-1), "max_tokens"),
        (lambda c: c.generate("m", "x", max_token=1), "max_token"),
        (lambda c: c.generate("m", "x", timeout_s=0), "timeout_s"),
        (lambda c: c.generate("m", "x", timeout_s=float("nan")), "timeout_s"),
        (lambda c: c.generate("m", "x", priority=101), "priority"),
        (lambda c: c.generate("m", "x", affinity="a" * 300), "affinity"),
        (lambda c: c.generate("m", "x", retries=-1), "retries"),
        (lambda c: c.generate("m", "x", retries=True), "retries"),
        (lambda c: c.generate("m", "x", resume=1), "resume"),
        (lambda c: c.chat("m", "x"), "messages"),
        (lambda c: c.chat("m", {1}), "messages"),
        (lambda c: c.chat("m", 5), "messages"),
        (lambda c: c.chat("m", []), "prompt"),
        (lambda c: c.chat("m", [{"role": "user"}]), "messages[0]"),
        (lambda c: c.chat("m", [{"role": "user", "content": "x", "name": "y"}]), "messages[0]"),
        (lambda c: c.chat("m", [{"role": "user", "content": None}]), "messages[0].content"),
        (lambda c: c.embed("m", "x"), "texts"),
        (lambda c: c.embed("m", []), "texts"),
        (lambda c: c.embed("m", 5), "texts"),
        (lambda c: c.embed("m", {"x"}), "texts"),
        (lambda c: c.embed("m", ["x", 3]), "texts[1]"),
        (lambda c: c.count_tokens("m", [1, 2]), "prompt"),
        (lambda c: c.drain_worker(""), "worker"),
        (lambda c: c.drain_worker("w", -1), "grace_s"),
    ],
)
def test_what_cannot_be_right_is_never_sent(start: Start, ask: Callable[[Client], Any], parameter: str) -> None:
    broker, client = start()
    with pytest.raises(errors.InvalidParameter) as caught:
        ask(client)
    assert caught.value.parameter == parameter
    assert broker.nothing_arrived()


@pytest.mark.parametrize("endpoints", ["localhost:5570", "tcp://127.0.0.1:0", "tcp://127.0.0.1:99999", [], ["tcp://a:1", "x"]])
def test_a_bad_endpoint_is_said_at_once(endpoints: Any) -> None:
    with pytest.raises(errors.InvalidParameter):
        Client(endpoints)


@pytest.mark.parametrize("endpoint", ["tcp://*:5570", "tcp://a!b:5570", "tcp://-a:5570", "tcp://é:5570"])
def test_an_endpoint_that_no_socket_can_connect_to_is_said_at_once(endpoint: str) -> None:
    with pytest.raises(errors.InvalidEndpoint, match="is not a usable endpoint"):
        Client(endpoint)


@pytest.mark.parametrize("endpoint", ["tcp://a_b:1", "tcp://model-1.example:5570", "tcp://10.0.0.1:5570", "tcp://[::1]:5570", "ipc:///c"])
def test_an_endpoint_that_may_be_there_is_taken(endpoint: str) -> None:
    with Client(endpoint) as client:
        assert client.endpoints == (endpoint,)


def test_endpoints_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZMQSERVE_CONTROLLER", "tcp://a:1, tcp://b:2")
    with Client() as client:
        assert client.endpoints == ("tcp://a:1", "tcp://b:2")


def test_an_empty_variable_names_no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a file of settings hands on what nobody has set."""
    monkeypatch.setenv("ZMQSERVE_CONTROLLER", "")
    with Client() as client:
        assert client.endpoints == ("tcp://127.0.0.1:5570",)


def test_keywords_are_those_of_the_params() -> None:
    """What type checkers offer is what may be given."""
    assert set(Sampling.__annotations__) == set(SamplingParams.__struct_fields__)
    assert set(EmbedFields.__annotations__) == set(EmbedParams.__struct_fields__)


# --- cancelling --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["close", "with", "break", "collected"])
def test_leaving_a_stream_cancels_it_once(start: Start, way: str) -> None:
    broker, client = start()
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    broker.send(chunk(rid, 0))
    if way == "close":
        assert next(stream).seq == 0
        stream.close()
        stream.close()
    elif way == "with":
        with stream:
            next(stream)
    elif way == "break":
        for _ in stream:
            break
    del stream
    gc.collect()
    assert broker.expect(m.Cancel).rid == rid
    broker.send(m.Chunks([chunk(rid, 1)]))
    broker.send(done(rid, 2, "cancelled"))
    # Late chunks disturb nobody.
    again = client.generate("m", "y")
    rid = broker.expect(m.Generate).rid
    broker.send(done(rid, 0, last=chunk(rid, 0, "ok")))
    assert again.text() == "ok"
    assert broker.nothing_arrived()


def test_a_finished_stream_is_not_cancelled(start: Start) -> None:
    broker, client = start(echo)
    with client.generate("m", "x") as stream:
        stream.text()
    client.generate("m", "x", stream=False)
    broker.expect(m.Generate)
    broker.expect(m.Generate)
    assert broker.nothing_arrived()


def test_a_closed_or_running_stream_has_no_completion(start: Start) -> None:
    _, client = start()
    stream = client.generate("m", "x")
    with pytest.raises(RuntimeError, match="not ended yet"):
        _ = stream.usage
    stream.close()
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="closed before its end"):
        stream.text()


def test_closing_a_client_ends_what_other_threads_wait_for(start: Start) -> None:
    broker, client = start()
    with ThreadPoolExecutor(6) as pool:
        waiting: list[Future[Any]] = [pool.submit(client.generate("m", "x").text) for _ in range(5)]
        waiting.append(pool.submit(client.count_tokens, "m", "x"))
        rids = {broker.expect(m.Generate | m.CountTokens).rid for _ in range(6)}  # type: ignore[arg-type]
        client.close()
        for future in waiting:
            with pytest.raises(errors.ConnectionFailed, match="closed"):
                future.result(PATIENCE_S)
    assert {broker.expect(m.Cancel).rid for _ in range(6)} == rids
    with pytest.raises(errors.ConnectionFailed, match="closed"):
        client.models()
    client.close()


def test_closing_an_unused_client() -> None:
    Client("tcp://127.0.0.1:5999").close()


# --- what goes wrong ----------------------------------------------------------------------------


def test_a_gap_is_an_error_after_what_came_before_it(start: Start) -> None:
    _, client = start(lambda asked: [chunk(asked.rid, 0), chunk(asked.rid, 2)] if isinstance(asked, m.Generate) else [])
    stream = client.generate("m", "x")
    assert next(stream).seq == 0
    with pytest.raises(errors.StreamGap, match="expected seq 1, got 2"):
        next(stream)
    assert list(stream) == []
    with pytest.raises(errors.StreamGap):
        stream.text()


def test_a_chunk_that_comes_twice_is_an_error(start: Start) -> None:
    broker, client = start(lambda asked: [chunk(asked.rid, 0), chunk(asked.rid, 0)] if isinstance(asked, m.Generate) else [])
    with pytest.raises(errors.StreamGap, match="twice"):
        client.generate("m", "x", stream=False)
    rid = broker.expect(m.Generate).rid
    assert broker.expect(m.Cancel).rid == rid


def test_errors_are_typed_and_carry_data(start: Start) -> None:
    def script(asked: Any) -> list[Any]:
        if asked.model == "full":
            return [m.Error(asked.rid, 42903, "the queue is full", retryable=True, retry_after_ms=120)]
        return [chunk(asked.rid, 0), m.Error(asked.rid, 40303, "too long", data={"context_length": 8, "tokens": 9})]

    _, client = start(script)
    with pytest.raises(errors.Overloaded, match="the queue is full") as full:
        client.generate("full", "x", stream=False)
    assert (full.value.retryable, full.value.retry_after_ms) == (True, 120)
    stream = client.generate("m", "x")
    assert next(stream).text == "t0 "
    with pytest.raises(errors.ContextOverflow) as over:
        next(stream)
    assert (over.value.context_length, over.value.tokens) == (8, 9)


@pytest.mark.parametrize("ask", [lambda c: c.generate("m", "x").text(), lambda c: c.models(), lambda c: c.status()])
def test_a_controller_that_is_not_there_is_said_soon(ask: Callable[[Client], Any]) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.unbind(f"tcp://127.0.0.1:{port}")
    began_s = monotonic()
    with Client(f"tcp://127.0.0.1:{port}") as client, pytest.raises(errors.ControllerUnreachable, match=rf"tcp://127\.0\.0\.1:{port}"):
        ask(client)
    assert monotonic() - began_s < PATIENCE_S, "long before the deadline"


def test_a_listener_that_does_not_answer_is_unreachable(start: Start) -> None:
    _, client = start(broker={"greets": False}, connect_timeout_s=0.1)
    with pytest.raises(errors.ControllerUnreachable):
        client.models()


def test_the_next_endpoint_is_tried(start: Start) -> None:
    mute, _ = start(broker={"greets": False})
    broker, _ = start(echo)
    with Client([mute.endpoint, broker.endpoint], connect_timeout_s=0.1) as client:
        assert client.generate("m", "x", stream=False, max_tokens=1).text == "t0 "


def test_another_protocol_version_is_refused(start: Start) -> None:
    broker, client = start(broker={"protocol": 7})
    with pytest.raises(errors.ProtocolMismatch, match=r"protocol 7 .* protocol 1; upgrade the client"):
        client.generate("m", "x", stream=False)
    assert broker.nothing_arrived()


def test_a_controller_that_falls_silent_is_lost_after_the_ttl(start: Start) -> None:
    broker, client = start(broker={"pongs": False}, ttl_s=0.3)
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    broker.send(chunk(rid, 0))
    assert next(stream).seq == 0
    with pytest.raises(errors.ControllerLost, match="silent") as lost:
        next(stream)
    assert lost.value.retryable


def test_what_a_restarted_controller_does_not_know_is_sent_again(start: Start) -> None:
    broker, client = start(ttl_s=1.0)
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    broker.controller, broker.unknown = "fake-2", [rid]
    assert broker.expect(m.Generate).rid == rid
    broker.unknown = []
    broker.send(done(rid, 0, last=chunk(rid, 0, "again")))
    assert stream.text() == "again"


def test_what_came_before_a_connection_broke_is_read_before_it_is_lost(start: Start) -> None:
    broker, client = start(broker={"linger_ms": 5000})
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    for seq in range(300):
        broker.send(chunk(rid, seq))
    broker.send(done(rid, 300))
    broker.close()
    assert [piece.seq for piece in stream] == list(range(300))
    assert stream.resumed == 0


def test_a_retry_is_the_same_request_again(start: Start) -> None:
    def script(asked: Any) -> list[Any]:
        seen.append(asked.rid)
        return echo(asked) if len(seen) == 3 else [m.Error(asked.rid, 42903, "full", retryable=True, retry_after_ms=20)]

    seen: list[int] = []
    _, client = start(script, retries=2)
    assert client.generate("m", "x", stream=False).text == "t0 t1 t2 "
    assert len(set(seen)) == 1
    seen.clear()
    with pytest.raises(errors.Overloaded):
        client.generate("m", "x", stream=False, retries=1)


@pytest.mark.parametrize("resume", [True, False])
def test_an_answer_goes_on_at_the_next_controller(start: Start, resume: bool) -> None:
    broker, _ = start()
    other, _ = start()
    with Client([broker.endpoint, other.endpoint], resume=resume) as client:
        stream = client.generate("m", "x")
        rid = broker.expect(m.Generate).rid
        broker.send(m.FirstChunk(rid, 0, 0, "t0 ", m.pack_ids([0]), None, "f"))
        assert next(stream).seq == 0
        broker.close()
        if resume:
            assert other.expect(m.Generate).resume == m.Resume(m.pack_ids([0]), 3, 1)
            other.send(done(rid, 1, last=chunk(rid, 1)))
            assert (stream.text(), stream.completion.resumed) == ("t0 t1 ", 1)
        else:
            with pytest.raises(errors.ControllerLost, match="broke"):
                next(stream)
            assert other.nothing_arrived()


def test_an_interrupt_in_a_failover_cancels(start: Start) -> None:
    broker, client = start()
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        broker.expect(m.Generate)
        broker.close()
        session = client._connection._pump.session
        until_s = monotonic() + PATIENCE_S
        while session.state is not State.GREETING:
            assert monotonic() < until_s
            threading.Event().wait(0.001)
        signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        sender = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            client.generate("m", "x", stream=False)
        sender.result(PATIENCE_S)
    assert client._connection._pump.session.calls == {}


def test_after_a_loss_the_client_works_again(start: Start) -> None:
    """Whether it is seen as lost or as unreachable depends on whether the connection's end was noticed before the request left."""
    broker, client = start(echo, ttl_s=1.0)
    assert client.generate("m", "x", stream=False).text
    endpoint = broker.endpoint
    broker.close()
    with pytest.raises((errors.ControllerLost, errors.ControllerUnreachable)):
        client.generate("m", "x", stream=False)
    with Broker(echo, endpoint=endpoint, controller="second"):
        assert client.generate("m", "x", stream=False).text == "t0 t1 t2 "


def test_a_deadline_holds_even_if_the_controller_forgets_it(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqserve.session.DEADLINE_GRACE_S", 0.1)
    broker, client = start(timeout_s=0.1)
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.1 s"):
        client.generate("m", "x", stream=False)
    asked = broker.expect(m.Generate)
    assert asked.deadline_ms is not None
    assert asked.deadline_ms <= 100
    assert broker.expect(m.Cancel).rid == asked.rid
    with pytest.raises(errors.DeadlineExceeded):
        client.status()


def test_garbage_from_the_controller_hurts_nobody(start: Start) -> None:
    broker, client = start()
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    for garbage in (b"", b"\xc1", b"\x91" * 100_000, m.encode((99, 1)), bytes(range(256))):
        broker.send(garbage)
    broker.send(done(rid, 0, last=chunk(rid, 0, "fine")))
    assert stream.text() == "fine"


def test_an_unread_stream_is_bounded_and_others_go_on(start: Start) -> None:
    broker, client = start(buffer_bytes=20_000)
    slow = client.generate("m", "slow")
    slow_rid = broker.expect(m.Generate).rid
    other = client.generate("m", "x")
    other_rid = broker.expect(m.Generate).rid
    for seq in range(100):
        broker.send(m.Chunks([chunk(slow_rid, seq, "x" * 500), chunk(other_rid, seq)]))
        assert next(other).seq == seq
    assert broker.expect(m.Cancel).rid == slow_rid
    read: list[Any] = []
    with pytest.raises(errors.SlowConsumer, match="20000"):
        read.extend(slow)
    other.close()


# --- threads -------------------------------------------------------------------------------------


def test_many_threads_share_one_client(start: Start) -> None:
    _, client = start(echo)

    def work(number: int) -> int:
        for round_ in range(10):
            count = 1 + (number * 7 + round_) % 40
            if round_ % 3:
                assert [c.seq for c in client.generate("m", "x", max_tokens=count)] == list(range(count))
            else:
                assert len(client.generate("m", "x", max_tokens=count, stream=False).token_ids) == count
        return number

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(work, range(24), timeout=30)) == list(range(24))


def test_each_waiting_thread_gets_its_own_chunk_at_once(start: Start) -> None:
    """Whoever leads hands on what is not its own, and the lead when it has what it wants."""
    broker, client = start()
    count = 8
    turns = threading.Barrier(count + 1, timeout=PATIENCE_S)

    def read() -> list[int]:
        stream = client.generate("m", "x")
        seqs = []
        for piece in stream:
            seqs.append(piece.seq)
            turns.wait()
        return seqs

    with ThreadPoolExecutor(count) as pool:
        readers = [pool.submit(read) for _ in range(count)]
        rids = [broker.expect(m.Generate).rid for _ in range(count)]
        for seq in range(20):
            order = rids[seq % count :] + rids[: seq % count]
            for rid in order:
                broker.send(chunk(rid, seq))
            # All threads have theirs before any gets more, or this breaks.
            turns.wait()
        for rid in rids:
            broker.send(done(rid, 20))
        assert [reader.result(PATIENCE_S) for reader in readers] == [list(range(20))] * count


def test_requests_of_other_threads_get_through_while_one_waits(start: Start) -> None:
    broker, client = start(lambda asked: [m.Tokens(asked.rid, 1)] if isinstance(asked, m.CountTokens) else [])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate("m", "x").text)
        rid = broker.expect(m.Generate).rid
        for _ in range(200):
            assert client.count_tokens("m", "x") == 1
            broker.expect(m.CountTokens)
        broker.send(done(rid, 0, last=chunk(rid, 0, "late")))
        assert waiting.result(PATIENCE_S) == "late"


def test_pings_go_out_while_nobody_reads(start: Start) -> None:
    broker, client = start(ttl_s=1.0)
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    for _ in range(5):
        assert broker.pings.get(timeout=PATIENCE_S) == m.Ping(1000, [rid])
    broker.send(done(rid, 0, last=chunk(rid, 0, "ok")))
    assert stream.text() == "ok"


def test_the_ttl_is_said_soon_although_nobody_reads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both for the first request of all, which waits for the Welcome, and for one of a client that was idle."""
    monkeypatch.setattr("zmqserve.connection.NAP_S", 10 * PATIENCE_S)  # a keeper's own round
    broker, client = start(ttl_s=60.0)
    for _ in range(2):
        stream = client.generate("m", "x")
        rid = broker.expect(m.Generate).rid
        assert broker.pings.get(timeout=PATIENCE_S) == m.Ping(60_000, [rid])
        broker.send(done(rid, 0, last=chunk(rid, 0, "ok")))
        assert stream.text() == "ok"


def test_models_status_and_drain_keep_the_clients_timeout(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller answers Pings and nothing else. Only the client knows of this deadline, so nothing is waited for after it."""
    monkeypatch.setattr("zmqserve.session.DEADLINE_GRACE_S", 10 * PATIENCE_S)
    _, client = start(timeout_s=0.2)
    for ask in (client.models, client.status, lambda: client.drain_worker("w")):
        began = monotonic()
        with pytest.raises(errors.DeadlineExceeded, match=r"0\.2 s"):
            ask()
        assert 0.2 <= monotonic() - began < PATIENCE_S


def await_waiting(stream: Any) -> None:
    """Until a thread waits for this stream."""
    until_s = monotonic() + PATIENCE_S
    while stream._call.waiter is None:
        assert monotonic() < until_s, "nobody waits for it"
        threading.Event().wait(0.001)


@pytest.mark.parametrize("leads", [True, False])
def test_an_interrupt_leaves_streams_and_client_usable(start: Start, leads: bool) -> None:
    broker, client = start()
    stream, other = client.generate("m", "x"), client.generate("m", "y")
    rids = [broker.expect(m.Generate).rid for _ in range(2)]
    readers: list[Future[str]] = []
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(pool: ThreadPoolExecutor) -> None:
        await_waiting(stream)
        if leads:
            readers.append(pool.submit(other.text))
            await_waiting(other)
        signal.pthread_kill(main, signal.SIGINT)

    with ThreadPoolExecutor(2) as pool:
        if not leads:
            readers.append(pool.submit(other.text))
            await_waiting(other)
        sender = pool.submit(interrupt, pool)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        sender.result(PATIENCE_S)
        for rid in rids:
            broker.send(done(rid, 0, last=chunk(rid, 0, "ok")))
        assert readers[0].result(PATIENCE_S) == "ok"
        assert stream.text() == "ok"


def test_a_lead_that_an_interrupt_tore_away_is_taken_up_again(start: Start) -> None:
    """As if KeyboardInterrupt had hit between taking the lead and the guard that returns it."""
    broker, client = start(ttl_s=1.0)
    stream = client.generate("m", "x")
    rid = broker.expect(m.Generate).rid
    connection: Any = client._connection
    with connection._mutex:
        connection._leader = _Seat(stream._open)
        connection._leader.thread = 0
        connection._leader_s = monotonic() - 10
    broker.send(done(rid, 0, last=chunk(rid, 0, "ok")))
    assert stream.text() == "ok"


TORN = """
import itertools, sys, threading
from zmqserve import Client

class Interrupt(BaseException):
    pass

steps = comes_at = 0  # of the finalizer, in the client's code

def step(frame, event, arg):
    global steps
    if "zmqserve" in frame.f_code.co_filename:
        steps += 1
        if steps == comes_at:
            raise Interrupt
    return step

sys.unraisablehook = lambda _: None  # nobody gets what a finalizer raises
with Client(sys.argv[1]) as client:
    for comes_after in itertools.count(1):
        stream = client.generate("m", "no answer")
        comes_at = steps + comes_after
        sys.settrace(step)
        del stream
        sys.settrace(None)
        told = []
        for ask in (lambda run: run(), lambda run: threading.Thread(target=run, daemon=True).start()):
            answered = threading.Event()
            ask(lambda: (told.append(client.generate("m", "x", stream=False).text), answered.set()))
            assert answered.wait(5), f"interrupted in step {comes_after}, the client answers nobody any more"
        assert told == ["ok", "ok"]
        if steps < comes_at:
            break
print("interrupted", comes_after > 3)
"""


def test_a_client_outlives_an_interrupt_anywhere_in_a_streams_finalizer(start: Start) -> None:
    broker, _ = start(lambda asked: [done(asked.rid, 0, last=chunk(asked.rid, 0, "ok"))] if getattr(asked, "prompt", "") == "x" else [])
    program = [sys.executable, "-c", TORN, broker.endpoint]
    ended = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert (ended.stdout, ended.stderr) == ("interrupted True\n", "")


# --- ends ----------------------------------------------------------------------------------------


def test_a_drain_ends_in_time_while_another_thread_reads(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """That one sleeps, and has nothing to do itself for a long time."""
    monkeypatch.setattr("zmqserve.connection.NAP_S", 10 * PATIENCE_S)
    broker, client = start(ttl_s=60, broker={"limits": m.Limits(ttl_ms=60_000), "pongs": False})
    stream = client.generate("m", "x")
    broker.expect(m.Generate)
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(stream.text)
        broker.pings.get(timeout=PATIENCE_S)
        began_s = monotonic()
        assert not client.drain(0.1)
        assert 0.1 <= monotonic() - began_s < PATIENCE_S
        with pytest.raises(errors.ConnectionFailed, match="closed"):
            reader.result(PATIENCE_S)


def test_a_program_that_ends_with_open_streams_ends(start: Start) -> None:
    broker, _ = start()
    program = (
        "import sys, threading; from zmqserve.client import Client; client = Client(sys.argv[1])\n"
        "stream = client.generate('m', 'x'); other = client.generate('m', 'y')\n"
        "threading.Thread(target=other.text, daemon=True).start(); print(next(stream).text)"
    )
    with subprocess.Popen([sys.executable, "-c", program, broker.endpoint], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        for _ in range(2):
            broker.send(chunk(broker.expect(m.Generate).rid, 0))
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, b"t0 \n", b"")


def test_a_given_context_is_shared_and_left_alone() -> None:
    with zmq.Context() as context, Broker(echo, endpoint="inproc://clients", context=context) as broker:
        with Client(broker.endpoint, context=context) as client:
            assert client.generate("m", "x", stream=False, max_tokens=1).text == "t0 "
        assert not context.closed


def test_a_context_ended_under_a_client_closes_it() -> None:
    context: zmq.Context[Any] = zmq.Context()
    with Broker() as broker, Client(broker.endpoint, context=context) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate("m", "x").text)
        broker.expect(m.Generate)
        context.term()
        with pytest.raises(errors.ConnectionFailed, match="closed"):
            waiting.result(PATIENCE_S)


def test_a_forgotten_client_leaves_no_thread() -> None:
    with Broker(echo) as broker:
        before = set(threading.enumerate())
        client: Client | None = Client(broker.endpoint)
        assert client is not None
        client.generate("m", "x", stream=False)
        (keeper,) = set(threading.enumerate()) - before
        client = None
        gc.collect()
        keeper.join(PATIENCE_S)
        assert not keeper.is_alive()


COLLECTED = """
import gc, zmq
from zmqserve import Client
from zmqserve.errors import ControllerUnreachable

made = [zmq.Context()]  # older than all else of the client: the collector comes to it first
zmq.Context = made.pop
client = Client("tcp://127.0.0.1:1", connect_timeout_s=0.02)
try:
    client.status()
except ControllerUnreachable:
    pass
del client  # its error's traceback refers to it still: that is a cycle
gc.collect()
print("collected")
"""


COLLECTED_ANYWHERE = """
import gc, itertools, threading
from zmqserve import Client
from zmqserve.errors import ControllerUnreachable

gc.disable()
steps = comes_at = 0  # of the client's own thread, where it waits

def step(frame, event, arg):
    global steps
    if frame.f_code.co_filename.endswith(("keeper.py", "threading.py")):
        steps += 1
        if steps == comes_at:
            gc.collect()
    return step

def forgotten(ttl_s):
    client = Client("tcp://127.0.0.1:1", ttl_s=ttl_s, connect_timeout_s=0.02)
    client.itself = client
    try:
        client.status()
    except ControllerUnreachable:
        pass

threading.settrace(step)
for comes_after in itertools.count(1):
    before = set(threading.enumerate())
    comes_at = 0
    forgotten(0.03)
    (keeper,) = set(threading.enumerate()) - before
    comes_at = steps + comes_after
    keeper.join(2)
    if keeper.is_alive():
        assert steps < comes_at, f"the collector hangs in step {comes_after}"
        break  # it sleeps, and for good
gc.collect()
keeper.join()
print("collected", comes_after > 5)
"""


def test_the_garbage_collector_may_come_in_a_clients_own_thread() -> None:
    ended = subprocess.run([sys.executable, "-c", COLLECTED_ANYWHERE], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert ended.stdout == "collected True\n"


def test_a_client_that_is_left_to_the_garbage_collector_does_not_hang_it() -> None:
    ended = subprocess.run([sys.executable, "-c", COLLECTED], capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert ended.stdout == "collected\n"
