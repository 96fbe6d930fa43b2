"""What a hostile client cannot do, by real sockets, beside an honest one: cancel or read another's request, or starve others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bench.zmtp import RawPeer, message
from zmqserve import Client
from zmqserve import messages as m

from .fakes.raw import RawClient, RawWorker
from .processes import PATIENCE_S, ServedController, eventually, honest_network

WORDS = " ".join(f"word{number}" for number in range(40))


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    """With an honest worker of model ``m`` that has few slots, and small bounds."""
    config = tmp_path_factory.mktemp("hostile") / "controller.toml"
    settings = "queue_requests = 100\nclient_requests = 20\noutbox_bytes = 1000000\noutbox_total_bytes = 2000000\nrequest_bytes = 100000\n"
    with honest_network(config, settings, "--delay-per-token", "0.005", "--slots", "4") as controller:
        yield controller


@contextmanager
def idle_again(controller: ServedController) -> Iterator[Client]:
    """An honest client; at the end nothing is open."""
    with Client(controller.clients) as client:
        yield client
        eventually(lambda: client.status().running + client.status().waiting == 0, PATIENCE_S, "all has ended")


def test_it_cannot_cancel_or_read_anothers_request_by_its_rid(controller: ServedController) -> None:
    with idle_again(controller) as client, RawClient(controller.clients) as owner, RawClient(controller.clients) as thief:
        owner.send(m.Generate(5, "m", prompt=WORDS))
        assert owner.answer().rid == 5
        thief.send(m.Cancel(5))
        thief.send(m.Ping(1, [5]))
        thief.send(m.Generate(5, "m", prompt="own"))
        pong = thief.answer()
        assert isinstance(pong, m.Pong)
        assert pong.unknown == [5]
        done = thief.end(5)
        assert isinstance(done, m.Done)
        end = owner.end(5)
        assert isinstance(end, m.Done)
        assert end.finish_reasons != ["cancelled"]
        assert end.usage.completion_tokens > done.usage.completion_tokens
        assert client.status().counters["requests"] >= 2


def test_nor_by_frames_that_look_like_anothers_envelope(controller: ServedController) -> None:
    """A client may put frames before its payload, as devices do. They are its own: the first is always its connection's."""
    with idle_again(controller), RawClient(controller.clients, identity=b"owner") as owner, RawClient(controller.clients) as thief:
        owner.send(m.Generate(5, "m", prompt=WORDS))
        assert owner.answer().rid == 5
        for envelope in ([b"owner"], [b"", b"owner"], [b"owner", b""]):
            thief.send(*envelope, m.Cancel(5))
            thief.send(*envelope, m.Ping(1, [5]))
            *back, payload = thief.frames()
            assert back == envelope
            assert m.decoder(m.ToClient).decode(payload).unknown == [5]
        assert owner.end(5).finish_reasons != ["cancelled"]


def test_nor_by_its_routing_id_while_it_is_there(controller: ServedController) -> None:
    with idle_again(controller), RawClient(controller.clients, identity=b"twin") as owner:
        owner.send(m.Generate(5, "m", prompt=WORDS))
        assert owner.answer().rid == 5
        with RawPeer(controller.clients, identity=b"twin") as thief:
            thief.send(m.encode(m.Cancel(5)))
            thief.send(m.encode(m.Ping(1, [5])))
            thief.socket.settimeout(0.5)
            with pytest.raises((TimeoutError, ConnectionError)):
                thief.recv()
        assert owner.end(5).finish_reasons != ["cancelled"]


def test_a_rid_used_twice_ends_the_second_and_not_the_first(controller: ServedController) -> None:
    with idle_again(controller), RawClient(controller.clients) as client:
        for _ in range(3):
            client.send(m.Generate(5, "m", prompt=WORDS))
        ends = client.ends(3)
        assert [end.code for end in ends if isinstance(end, m.Error)] == [40901, 40901]
        assert sum(isinstance(end, m.Done) for end in ends) == 1


def test_a_flood_of_requests_does_not_starve_others(controller: ServedController) -> None:
    """It has its bound of the queue, and one turn of two."""
    with idle_again(controller) as client, RawClient(controller.clients) as flood:
        for rid in range(1, 1001):
            flood.send(m.Generate(rid, "m", prompt="a b c"))
        answers = [client.generate("m", f"honest {number}", stream=False) for number in range(5)]
        assert all(answer.text for answer in answers)
        ends = flood.ends(1000)
        refused = [end for end in ends if isinstance(end, m.Error)]
        assert {(error.code, error.data["bound"]) for error in refused} == {(42903, "client_requests")}
        assert len(refused) > 900


def test_nor_one_from_many_connections(controller: ServedController) -> None:
    """The queue is full then, which is said at once; who waits already has its turn."""
    with idle_again(controller) as client:
        floods = [RawClient(controller.clients) for _ in range(5)]
        try:
            with client.generate("m", WORDS, max_tokens=60) as stream:
                text = next(stream).text
                for flood in floods:
                    for rid in range(1, 51):
                        flood.send(m.Generate(rid, "m", prompt="a b c"))
                for flood in floods:
                    flood.ping()
                text += "".join(chunk.text for chunk in stream)
            assert len(text.split()) >= 40
            assert client.generate("m", "honest", stream=False, retries=50).text
        finally:
            for flood in floods:
                flood.close()


def test_one_that_asks_and_never_reads_is_let_go(controller: ServedController) -> None:
    with idle_again(controller) as client:
        peer = RawPeer(controller.clients)
        request = message(m.encode(m.Status(1)))
        stop = threading.Event()

        def ask() -> None:
            try:
                while not stop.is_set():
                    peer.write(request * 100)
            except OSError:
                pass

        thread = threading.Thread(target=ask, name="never reads")
        thread.start()
        try:
            eventually(lambda: client.status().counters.get("dropped: outbox full", 0) > 0, PATIENCE_S, "its outbox is dropped")
            assert client.status().outbox_bytes < 4_000_000
            assert client.generate("m", "still here", stream=False).text
        finally:
            stop.set()
            peer.close()
            thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00",
        b"\xc1",
        b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x02\xc6\xff\xff\xff\xff",
        b"\x94\x02\x01\xa1m\xdf\xff\xff\xff\xff",
    ],
    ids=["empty", "a number", "no msgpack", "deep", "4 G elements", "4 GiB", "4 G entries"],
)
def test_garbage_gets_a_typed_error_and_changes_nothing(controller: ServedController, payload: bytes) -> None:
    with idle_again(controller), RawClient(controller.clients) as client:
        client.send(payload)
        error = client.answer()
        assert (type(error), error.code) == (m.Error, 40001)
        client.send(m.Generate(1, "m", prompt="hi"))
        assert isinstance(client.end(1), m.Done)


def test_a_request_too_large_is_refused_and_its_sender_stays(controller: ServedController) -> None:
    with idle_again(controller), RawClient(controller.clients) as client:
        client.send(m.Generate(1, "m", prompt="x" * 100_001))
        error = client.end(1)
        assert (error.code, error.data["bound"], error.data["limit"]) == (40302, "request_bytes", 100_000)
        client.send(m.Generate(2, "m", prompt="hi"))
        assert isinstance(client.end(2), m.Done)


def test_what_workers_say_is_nothing_that_a_client_may_say(controller: ServedController) -> None:
    with idle_again(controller) as client, RawClient(controller.clients) as hostile:
        ready = RawWorker.offer("intruder", "m")
        hostile.send(m.WorkerHead(m.READY, 0), ready)
        hostile.send(m.WorkerHead(m.BYE, 1), b"")
        hostile.ping()
        assert {each.name for each in client.status().workers} == {"honest"}
        with RawWorker(controller.workers) as lost:
            lost.send(m.Generate(1, "m", prompt="hi"), b"")
            lost.send(m.encode(m.Generate(1, "m", prompt="hi")))
        assert {each.name for each in client.status().workers} == {"honest"}
