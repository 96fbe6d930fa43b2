"""PolledClient: what its descriptor, its timeouts and `process` tell to somebody else's loop. What clients share: test_three_clients.py."""

from __future__ import annotations

import gc
import select
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest
import zmq

from tests.fakes.broker import PATIENCE_S, Broker, chunk, done, echo
from tests.fakes.clients import Driving
from zmqserve import PolledClient, PolledStream, errors
from zmqserve import messages as m

Start = Callable[..., tuple[Broker, Driving]]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def make(script: Any = None, **options: Any) -> tuple[Broker, Driving]:
            made = stack.enter_context(Broker(script))
            return made, stack.enter_context(Driving(made.endpoint, **options))

        yield make


def test_a_program_around_one_poller_runs_many_streams_beside_its_own_sockets(start: Start) -> None:
    _, driving = start(echo)
    client: PolledClient = driving.raw
    with zmq.Context() as context, context.socket(zmq.PULL) as jobs, context.socket(zmq.PUSH) as source:
        source.connect(f"tcp://127.0.0.1:{jobs.bind_to_random_port('tcp://127.0.0.1')}")
        poller = zmq.Poller()
        poller.register(jobs, zmq.POLLIN)
        poller.register(client, zmq.POLLIN)
        for count in range(1, 201):
            source.send_string(str(count))
        counts: dict[PolledStream, int] = {}
        seqs: dict[PolledStream, list[int]] = {}
        until_s = monotonic() + PATIENCE_S
        while len(counts) < 200 or not all(stream.done for stream in counts):
            assert monotonic() < until_s
            ready = dict(poller.poll(client.wait_ms()))
            if jobs in ready:
                count = int(jobs.recv_string())
                stream = client.generate("m", "x", max_tokens=count)
                counts[stream], seqs[stream] = count, []
            for asked in client.process():
                assert isinstance(asked, PolledStream)
                seqs[asked] += [piece.seq for piece in asked.take()]
        assert all(seqs[stream] == list(range(count)) for stream, count in counts.items())


def test_whoever_takes_once_whenever_told_sees_the_error_too(start: Start) -> None:
    """Chunks and the error that follows them come together: there is news twice, and the descriptor tells of both."""
    broker, driving = start()
    client: PolledClient = driving.raw
    stream = client.generate("m", "x")
    driving.until(lambda: stream._open.sent)
    rid = broker.expect(m.Generate).rid
    broker.send(chunk(rid, 0))
    broker.send(m.Error(rid, 40303, "too long"))
    driving.until(lambda: stream._open.end is not None)
    assert ([piece.seq for piece in stream.take()], stream.done) == ([0], False)
    assert select.select([client], [], [], PATIENCE_S)[0]
    assert client.process() == [stream]
    with pytest.raises(errors.ContextOverflow):
        stream.take()
    assert stream.done
    assert client.process() == []


def test_news_is_told_once_and_again_when_there_is_more(start: Start) -> None:
    broker, driving = start()
    client: PolledClient = driving.raw
    stream, tokens = client.generate("m", "x"), client.count_tokens("m", "x")
    driving.until(lambda: stream._open.sent and tokens._open.sent)
    assert (broker.expect(m.Generate).rid, broker.expect(m.CountTokens).rid) == (stream.rid, tokens.rid)
    with pytest.raises(RuntimeError, match="not been answered yet"):
        tokens.result()
    broker.send(chunk(stream.rid, 0))
    assert driving.until(lambda: stream._open.ready) == [stream]
    assert client.process() == []
    broker.send(m.Tokens(tokens.rid, 5))
    assert driving.until(lambda: tokens.done) == [tokens]
    broker.send(done(stream.rid, 1))
    assert driving.until(lambda: stream._open.end) == [stream]
    assert ([piece.seq for piece in stream.take()], stream.done, stream.completion.text) == ([0], True, "t0 ")
    assert tokens.result() == 5


def test_what_was_cancelled_has_no_result(start: Start) -> None:
    broker, driving = start()
    client: PolledClient = driving.raw
    asked: list[Any] = [client.models(), client.embed("m", ["a"]), client.generate("m", "x", stream=False), client.generate("m", "x")]
    driving.until(lambda: all(each._open.sent for each in asked))
    kinds: list[Any] = [m.ListModels, m.Embed, m.Generate, m.Generate]
    rids = [broker.expect(kind).rid for kind in kinds]
    for each in asked:
        each.cancel()
        each.cancel()
    assert [broker.expect(m.Cancel).rid for _ in asked] == rids
    assert client.process() == asked
    for each in asked[:2]:
        with pytest.raises(RuntimeError, match="cancelled"):
            each.result()
    assert asked[3].take() == []
    assert asked[3].done


def test_a_forgotten_answer_is_cancelled(start: Start) -> None:
    broker, driving = start()
    pending = driving.raw.count_tokens("m", "x")
    call = pending._open
    driving.until(lambda: call.sent)
    rid = broker.expect(m.CountTokens).rid
    del pending
    driving.raw.process()
    assert broker.expect(m.Cancel).rid == rid


def test_the_descriptor_stays_the_same_over_controllers(start: Start) -> None:
    broker, _ = start()
    other, _ = start(echo)
    with PolledClient([broker.endpoint, other.endpoint]) as client:
        descriptor = client.fileno()
        stream = client.generate("m", "x")
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)

        def lose() -> None:
            broker.expect(m.Generate)
            broker.close()

        closer = threading.Thread(target=lose)
        closer.start()
        chunks: list[int] = []
        while not stream.done:
            poller.poll(client.wait_ms())
            for asked in client.process():
                assert asked is stream
                chunks += [piece.seq for piece in stream.take()]
        closer.join()
        assert chunks == [0, 1, 2]
        assert client.fileno() == descriptor
    assert client.fileno() == -1
    assert client.wait_ms() is None
    assert client.process() == []


def test_an_idle_client_wants_nothing(start: Start) -> None:
    """Its poll may sleep for ever: neither is the descriptor readable, nor is anything due."""
    _, driving = start(echo)
    client: PolledClient = driving.raw
    assert driving.ask("generate", "m", "x", stream=False).text
    client.process()
    until_s = monotonic() + PATIENCE_S
    while (wait_ms := client.wait_ms()) is not None or select.select([client], [], [], 0)[0]:
        assert monotonic() < until_s, "it never comes to rest"
        select.select([client], [], [], None if wait_ms is None else wait_ms / 1000)
        assert client.process() == []


def test_more_than_one_turn_takes_is_not_left_lying(start: Start) -> None:
    """The socket's own descriptor tells of the first message only, and one turn reads some hundreds."""
    broker, driving = start()
    client: PolledClient = driving.raw
    stream = client.generate("m", "x")
    driving.until(lambda: stream._open.sent)
    rid = broker.expect(m.Generate).rid
    for seq in range(3000):
        broker.send(chunk(rid, seq))
    broker.send(done(rid, 3000))
    poller = select.poll()
    poller.register(client, select.POLLIN)
    seqs: list[int] = []
    while not stream.done:
        assert poller.poll(PATIENCE_S * 1000), "nothing tells of the rest"
        client.process()
        seqs += [piece.seq for piece in stream.take()]
    assert seqs == list(range(3000))


def test_a_forgotten_client_lets_go() -> None:
    with Broker(echo) as broker:
        driving = Driving(broker.endpoint)
        driving.ask("generate", "m", "x", stream=False)
        driven = driving.raw._driven
        del driving
        gc.collect()
        assert driven.pump.session.calls == {}
        line = driven.pump.line
        del driven
        assert line.bell.fd == -1
