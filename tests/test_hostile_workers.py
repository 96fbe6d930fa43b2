"""What a hostile or broken worker cannot do, by real sockets, beside an honest worker and its stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from zmqserve import Client
from zmqserve import messages as m
from zmqserve.errors import BackendError, NoWorker, Unauthenticated

from .fakes.raw import RawClient, RawWorker
from .processes import PATIENCE_S, ServedController, eventually, honest_network

WORDS = " ".join(f"word{number}" for number in range(40))


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedController]:
    """With an honest worker of model ``m``, and small bounds."""
    config = tmp_path_factory.mktemp("hostile") / "controller.toml"
    settings = (
        "orphan_grace_s = 1\noutbox_bytes = 2000000\noutbox_total_bytes = 4000000\ntotal_requests = 200\n"
        "pipe_messages = 16\nmessage_bytes = 8000000\n"
    )
    with honest_network(config, settings, "--delay-per-token", "0.01", "--slots", "64") as controller:
        yield controller


@pytest.fixture
def undisturbed(controller: ServedController) -> Iterator[None]:
    """A stream that begins before a test and goes on beside it, or over and over: it loses nothing and gets nothing of others."""
    with Client(controller.clients) as client, client.generate("m", WORDS, max_tokens=80) as stream:
        first = next(stream)
        yield
        assert first.text + "".join(chunk.text for chunk in stream) == client.generate("m", WORDS, max_tokens=80, stream=False).text
        assert stream.completion.resumed == 0


@contextmanager
def hostile(controller: ServedController, *models: str, name: str = "hostile", slots: int = 4) -> Iterator[RawWorker]:
    with RawWorker(controller.workers) as worker:
        worker.register(name, *models, slots=slots)
        yield worker
    gone(controller, name)


def names(controller: ServedController) -> set[str]:
    with Client(controller.clients) as client:
        return {each.name for each in client.status().workers}


def gone(controller: ServedController, *workers: str) -> None:
    eventually(lambda: not names(controller) & set(workers), PATIENCE_S, f"{workers} are gone")


def counted(controller: ServedController) -> dict[str, int]:
    with Client(controller.clients) as client:
        return client.status().counters


def forged(rid: int, text: str = "FORGED") -> bytes:
    return m.encode(m.Chunk(rid, 0, 0, text, b""))


@pytest.mark.usefixtures("undisturbed")
def test_it_reaches_no_client_that_it_was_not_given(controller: ServedController) -> None:
    """It tries every client number there may be, with all that a worker can say."""
    with hostile(controller, "other") as worker:
        before = counted(controller).get("dropped: no open flight", 0)
        for number in range(300):
            for kind in (m.FIRST, m.MORE, m.DONE, m.FAILED, m.BUSY):
                worker.say(kind, forged(1), client=number, rid=1)
        eventually(lambda: counted(controller).get("dropped: no open flight", 0) == before + 1500, PATIENCE_S, "all are dropped")


@pytest.mark.usefixtures("undisturbed")
def test_it_cannot_speak_under_anothers_epoch_even_if_it_knew_it(controller: ServedController) -> None:
    with (
        hostile(controller, "victim", name="victim") as victim,
        hostile(controller, "other") as worker,
        RawClient(controller.clients) as client,
    ):
        client.send(m.Generate(7, "victim", prompt="hi"))
        task = victim.request()
        victim.say(m.FIRST, m.encode(m.Chunk(7, 0, 0, "mine", b"")), client=task.client, rid=7)
        assert client.answer().text == "mine"
        for kind in (m.MORE, m.FIRST, m.DONE, m.FAILED, m.BUSY, m.BYE, m.DRAINING, m.LOAD, m.READY):
            worker.say(kind, forged(7), epoch=victim.epoch, client=task.client, rid=7)
        assert client.ping() == []
        victim.say(m.DONE, m.encode(m.Done(7, 1, ["stop"], m.Usage(1, 1), m.Timings(""))), client=task.client, rid=7, outcome="stop")
        assert isinstance(client.end(7), m.Done)


@pytest.mark.usefixtures("undisturbed")
def test_it_cannot_end_or_add_to_anothers_request(controller: ServedController) -> None:
    """Both serve one client: its number is then no secret, and rids are the client's."""
    with (
        hostile(controller, "victim", name="victim") as victim,
        hostile(controller, "other") as worker,
        RawClient(controller.clients) as client,
    ):
        client.send(m.Generate(1, "victim", prompt="hi"))
        client.send(m.Generate(2, "other", prompt="hi"))
        task, own = victim.request(), worker.request()
        assert task.client == own.client
        for kind in (m.FIRST, m.DONE, m.FAILED, m.BUSY):
            worker.say(kind, forged(1), client=task.client, rid=1)
        assert client.ping() == []
        done = m.encode(m.Done(1, 0, ["stop"], m.Usage(1, 1), m.Timings("")))
        victim.say(m.DONE, done, client=task.client, rid=1, outcome="stop")
        assert isinstance(client.end(1), m.Done)


OF_THE_CONTROLLER = {
    "GoAway": m.encode(m.GoAway("go")),
    "GoAway as a long array": b"\xdc\x24\x10\x23\xa2go" + b"\xc0" * (0x2410 - 2),
    "Welcome": m.encode(m.Welcome(m.PROTOCOL, "another", m.Limits(message_bytes=10))),
    "Pong": m.encode(m.Pong("another")),
    "not let in": m.encode(m.Error(0, Unauthenticated.code, "your key is not known")),
    "nothing": b"",
    "no message": b"\xc1",
}


@pytest.mark.parametrize("kind", [m.FIRST, m.MORE, m.DONE, m.FAILED, None], ids=["FIRST", "long MORE", "DONE", "FAILED", "MORE"])
@pytest.mark.parametrize("payload", OF_THE_CONTROLLER.values(), ids=OF_THE_CONTROLLER)
def test_it_cannot_speak_to_its_client_for_the_controller(controller: ServedController, payload: bytes, kind: int | None) -> None:
    """The client has a stream of an honest worker, too: it neither ends nor moves."""
    with (
        hostile(controller, "other") as worker,
        Client(controller.clients) as client,
        client.generate("m", WORDS, max_tokens=40) as stream,
        client.generate("other", "hi", resume=False),
    ):
        text = next(stream).text
        task = worker.request()
        if kind is None:  # in the form that is not decoded
            worker.send(m.more_head(worker.epoch, task.client), payload)
        else:
            worker.say(kind, payload, client=task.client, rid=task.rid)
        eventually(lambda: "hostile" not in names(controller), PATIENCE_S, "it is given up")
        text += "".join(chunk.text for chunk in stream)
        assert (text, stream.completion.resumed) == (WORDS, 0)


@pytest.mark.usefixtures("undisturbed")
def test_a_failure_is_of_the_request_in_its_head(controller: ServedController) -> None:
    with hostile(controller, "other") as worker, RawClient(controller.clients) as client:
        for rid in (1, 2):
            client.send(m.Generate(rid, "other", prompt="hi"))
        own, _ = worker.request(), worker.request()
        failed = m.encode(m.Error(1, BackendError.code, "no"))
        worker.say(m.FAILED, failed, client=own.client, rid=1)
        assert client.end(1).code == BackendError.code
        worker.say(m.FAILED, failed, client=own.client, rid=2)
        eventually(lambda: "hostile" not in names(controller), PATIENCE_S, "it is given up")
        assert client.end(2).code == NoWorker.code


@pytest.mark.usefixtures("undisturbed")
def test_frames_too_many_forge_nobody(controller: ServedController) -> None:
    """A fixed-count reader would take the third frame for a routing id, and what follows for that peer's message."""
    with hostile(controller, "victim", name="victim") as victim, RawWorker(controller.workers, identity=b"known") as worker:
        worker.register("hostile", "other")
        with RawClient(controller.clients) as client:
            client.send(m.Generate(1, "other", prompt="hi"))
            task = worker.request()
            bye = m.encode(m.WorkerHead(m.BYE, victim.epoch))
            more = m.more_head(worker.epoch, task.client)
            for extra in ([b"known", bye, b""], [b"", bye, b""], [b"x"] * 50):
                worker.send(more, forged(1), *extra)
            worker.send(more)
            worker.send(b"")
            worker.say(m.LOAD, m.Load(0, 0, 0))
            eventually(lambda: "hostile" not in names(controller), PATIENCE_S, "it is fenced")
        assert "victim" in names(controller)
    gone(controller, "hostile")


@pytest.mark.usefixtures("undisturbed")
def test_it_cannot_take_the_name_of_a_worker_that_is_there(controller: ServedController) -> None:
    with RawWorker(controller.workers) as worker:
        refusal = worker.refused("honest", "m")
        assert "taken" in refusal.why
        for _ in range(500):
            worker.say(m.READY, worker.offer("honest", "m"), epoch=0)
    assert "honest" in names(controller)


@pytest.mark.usefixtures("undisturbed")
def test_one_that_takes_requests_and_reads_none_costs_no_more_than_its_outbox(controller: ServedController) -> None:
    with RawWorker(controller.workers, reads=1) as worker, Client(controller.clients) as client, RawClient(controller.clients) as asker:
        worker.register("hostile", "other", slots=1_000_000)
        prompt = "x" * 500_000
        for rid in range(1, 151):
            asker.send(m.Generate(rid, "other", prompt=prompt))
        eventually(lambda: client.status().counters.get("workers lost", 0) > 0, PATIENCE_S, "it is given up")
        status = client.status()
        assert status.outbox_bytes < 8_000_000
        assert {end.code for end in asker.ends(150)} <= {50005, 42903, 50007}
    gone(controller, "hostile")


@pytest.mark.usefixtures("undisturbed")
def test_one_that_claims_all_slots_and_never_answers_is_bounded(controller: ServedController) -> None:
    with hostile(controller, "other", slots=1_000_000) as worker, RawClient(controller.clients) as client:
        for rid in range(1, 301):
            client.send(m.Generate(rid, "other", prompt="hi"))
        over = [message for message in client.ping() if isinstance(message, m.Error)]
        assert over
        assert {(error.code, error.data["bound"]) for error in over} == {(42903, "total_requests")}
        assert worker.request().rid


@pytest.mark.usefixtures("undisturbed")
def test_lies_about_load_and_tokens_break_nothing(controller: ServedController) -> None:
    most = 2**63 - 1
    with hostile(controller, "other") as worker, RawClient(controller.clients) as client:
        for load in (m.Load(most, most, most), m.Load(0, 0, most), m.Load(0, 0, 0, 1e308)):
            worker.say(m.LOAD, load)
        client.send(m.Generate(1, "other", prompt="hi", deadline_ms=20_000))
        worker.say(m.LOAD, m.Load(0, 0, 0))
        task = worker.request()
        done = m.encode(m.Done(1, 0, ["stop"], m.Usage(1, 1), m.Timings("")))
        worker.say(m.DONE, done, client=task.client, rid=1, outcome="x" * 256, prompt_tokens=most, completion_tokens=most)
        assert isinstance(client.end(1), m.Done)
        assert "ended: other" in counted(controller)
