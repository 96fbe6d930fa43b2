"""Mixed versions: a client and a worker that speak the first golden bytes, and understand no more, in today's network."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import zmq

from zmqserve import Client, InvalidParameter, WorkerLost
from zmqserve import messages as m

from .fakes.first_version import GOLDEN, RID, SHAPES, FirstClient, FirstWorker, changed, golden, read
from .processes import PATIENCE_S, ServedController, eventually, network, zmqserve

MODEL = "smollm2-135m"
"""What the worker of the first vectors serves."""


@pytest.fixture(scope="module")
def served() -> Iterator[ServedController]:
    """Today's controller with today's echo worker, of the name that the vectors speak of."""
    with network("echo-1") as (controller, _):
        yield controller


@pytest.fixture
def client(served: ServedController) -> Iterator[FirstClient]:
    with FirstClient(served.clients) as client:
        yield client


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """For what today's client asks while the test plays the other side."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


@pytest.fixture
def controller() -> Iterator[ServedController]:
    """Today's controller, with no worker yet."""
    with ServedController() as controller:
        yield controller


@pytest.fixture
def worker(controller: ServedController) -> Iterator[FirstWorker]:
    with FirstWorker(controller.workers) as worker:
        worker.register()
        yield worker


def wait_for_two(worker: FirstWorker, client: Client) -> None:
    """Wait for another worker beside this one, which says that it lives."""

    def ready() -> bool:
        worker.say("head-load", golden("load-minimal"))
        return [status.state for status in client.status().workers] == ["ready", "ready"]

    eventually(ready, PATIENCE_S, "two workers")


def text(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["text"] for chunk in chunks)


# --- a client of then --------------------------------------------------------------------------


def test_its_hello_is_answered_with_limits_that_it_knows_and_some_that_it_does_not(client: FirstClient) -> None:
    welcome = client.ask(golden("hello-full")).fields
    assert welcome.keys() == SHAPES["Welcome"].keys()
    assert welcome["protocol"] == 1
    assert welcome["limits"].keys() == SHAPES["Limits"].keys()
    assert len(m.Limits.__struct_fields__) > len(SHAPES["Limits"])


def test_its_streamed_answer_is_whole_although_the_first_chunk_has_a_field_more(client: FirstClient) -> None:
    client.say(golden("generate-prompt"))
    first = client.hear()
    assert (first.kind, first.length) == ("Chunk", 1 + len(SHAPES["Chunk"]) + 1)
    chunks, end = client.stream()
    chunks.insert(0, first.fields)
    assert (text(chunks), [chunk["seq"] for chunk in chunks]) == ("a b c a b", [0, 1, 2, 3, 4])
    assert b"".join(bytes.fromhex(chunk["token_ids"]) for chunk in chunks) == m.pack_ids([0, 1, 2, 3, 4])
    assert (end.kind, end.fields["rid"], end.fields["finish_reasons"]) == ("Done", RID, ["length"])
    assert end.fields["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "cached_tokens": 0}
    assert end.fields["timings"].keys() == SHAPES["Done"]["timings"].keys()
    assert end.fields["timings"]["worker"] == "echo-1"


def test_its_conversation_and_its_not_streamed_request_are_answered(client: FirstClient, served: ServedController) -> None:
    client.say(golden("generate-messages"))
    assert text(client.stream()[0]) == "Be brief. Hi 👋"
    with FirstClient(served.clients, zmq.REQ) as plain:
        reply = plain.ask(golden("generate-not-streamed")).fields
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [("a b c a b", "length")]
    assert reply["usage"]["completion_tokens"] == 5


def test_its_other_verbs_are_answered(client: FirstClient) -> None:
    embedding = client.ask(changed("embed-minimal", texts=["a", "b"])).fields
    assert (embedding["dtype"], embedding["shape"]) == ("float32", [2, 384])
    assert len(bytes.fromhex(embedding["data"])) == 2 * 384 * 4
    tokens = client.ask(changed("count-tokens-minimal", prompt="a b c")).fields
    assert tokens == {"rid": 1, "count": 3, "context_length": 0}
    card = client.ask(golden("model-details-minimal")).fields["card"]
    assert (card["name"], card["fingerprint"]) == ("m", "echo-1")


def test_it_reads_models_and_status_that_have_gained_names(client: FirstClient) -> None:
    (model,) = client.ask(golden("list-models")).fields["models"]
    assert model.keys() == SHAPES["ModelStatus"].keys()
    assert set(model["card"]) <= set(SHAPES["ModelCard"])
    status = client.ask(golden("status-large-rid")).fields["status"]
    assert status.keys() == SHAPES["StatusReply"]["status"].keys()
    assert [worker.keys() for worker in status["workers"]] == [SHAPES["WorkerStatus"].keys()]
    gained = {kind.__name__: set(kind.__struct_fields__) - set(SHAPES[kind.__name__]) for kind in (m.ModelCard, m.WorkerStatus)}
    assert "resume" in gained["ModelCard"]
    assert "controllers" in gained["WorkerStatus"]


def test_its_errors_have_codes_and_named_values(client: FirstClient) -> None:
    error = client.ask(golden("generate-full")).fields
    assert (error["rid"], error["code"], error["retryable"]) == (2**63 - 1, 40301, False)
    assert error["data"] == {"model": MODEL, "known_models": ["m"]}
    assert client.ask(golden("generate-minimal")).fields["code"] == 40302


def test_it_cancels_and_is_told_which_requests_are_not_held() -> None:
    with network("echo-1", worker_arguments=("--delay-per-token", "60")) as (controller, _), FirstClient(controller.clients) as client:
        client.say(golden("generate-prompt"))
        assert client.hear().kind == "Chunk"
        assert client.ask(golden("ping-full")).fields["unknown"] == [1]
        done = client.ask(golden("cancel-large-rid"))
        assert (done.kind, done.fields["finish_reasons"]) == ("Done", ["cancelled"])
        drained = client.ask(golden("drain-full")).fields
        assert drained == {"rid": RID, "worker": "echo-1", "running": 0}


def test_it_is_told_when_the_controller_leaves() -> None:
    with network("echo-1", worker_arguments=("--delay-first", "60")) as (controller, _), FirstClient(controller.clients) as client:
        client.say(golden("generate-prompt"))
        assert client.ask(golden("ping-full")).kind == "Pong"
        controller.send(signal.SIGTERM)
        assert client.hear().kind == "GoAway"
        error = client.hear()
        assert (error.kind, error.fields["code"], error.fields["retryable"]) == ("Error", 50302, True)


# --- a worker of then --------------------------------------------------------------------------


def test_its_registration_and_its_new_offer_are_taken(controller: ServedController) -> None:
    with FirstWorker(controller.workers) as worker, Client(controller.clients) as client:
        worker.socket.send_multipart([golden("head-ready-first"), golden("ready-minimal")])
        welcome = worker.welcomed()
        assert welcome.fields.keys() == SHAPES["WorkerWelcome"].keys()
        assert welcome.length > len(SHAPES["WorkerWelcome"])
        assert [(status.name, status.state) for status in client.status().workers] == [("echo-1", "loading")]
        epoch = worker.epoch
        worker.say("head-ready", golden("ready-full"))
        worker.welcomed()
        assert worker.epoch == epoch
        card = client.models()[0].card
        assert msgspec.to_builtins(card).items() >= SHAPES["ModelCard"].items()
        assert card.resume == {}


def test_its_answers_reach_todays_client(worker: FirstWorker, controller: ServedController, threads: ThreadPoolExecutor) -> None:
    with Client(controller.clients) as client:
        asked = threads.submit(lambda: client.embed(MODEL, ["a"]))
        rid, payload = worker.take()
        assert read(payload).fields["texts"] == ["a"]
        worker.say("head-done", golden("embedding-full", rid=rid), rid=rid)
        assert asked.result(PATIENCE_S).tolist() == [[1.0, -0.5]]

        counted = threads.submit(lambda: client.count_tokens(MODEL, "a b c"))
        rid, _ = worker.take()
        worker.say("head-done", golden("tokens-full", rid=rid), rid=rid)
        assert counted.result(PATIENCE_S) == 3

    with FirstClient(controller.clients, zmq.REQ) as plain:
        plain.say(changed("generate-not-streamed", model=MODEL))
        rid, _ = worker.take()
        worker.say("head-done", golden("reply-text"))
        assert plain.hear().fields == GOLDEN["reply-text"]["fields"]


def test_its_stream_reaches_todays_client(worker: FirstWorker, controller: ServedController, threads: ThreadPoolExecutor) -> None:
    with Client(controller.clients) as client:
        asked = threads.submit(lambda: client.generate(MODEL, "a b c", max_tokens=3).text())
        rid, payload = worker.take()
        request = read(payload)
        assert request.kind == "Generate"
        assert (request.fields["prompt"], request.fields["params"]) == ("a b c", {"max_tokens": 3})
        chunk = [changed("chunk-text", rid=rid, seq=seq, text=text) for seq, text in enumerate(["a", " b"])]
        worker.say("head-first", chunk[0], rid=rid)
        worker.say("head-more-not-canonical", chunk[1])
        done = changed("done-full", rid=rid, seq=2, finish_reasons=["stop"], last=[36, rid, 2, 0, " c", m.pack_ids([2]), None])
        worker.say("head-done", done, rid=rid)
        assert asked.result(PATIENCE_S) == "a b c"


def test_its_loss_ends_a_stream_that_nobody_can_go_on_with(
    worker: FirstWorker, controller: ServedController, threads: ThreadPoolExecutor
) -> None:
    """Its chunks name no fingerprint, so today's client has nothing to ask another worker for."""
    with Client(controller.clients) as client:
        asked = threads.submit(lambda: client.generate(MODEL, "a b c").text())
        rid, _ = worker.take()
        worker.say("head-first", changed("chunk-text", rid=rid, seq=0), rid=rid)
        with controller.echo("other", model=MODEL) as other:
            wait_for_two(worker, client)
            worker.close()
            with pytest.raises(WorkerLost):
                asked.result(PATIENCE_S)
            other.end()


def test_its_refusals_reach_todays_client(worker: FirstWorker, controller: ServedController, threads: ThreadPoolExecutor) -> None:
    with Client(controller.clients, retries=0) as client:
        asked = threads.submit(lambda: client.generate(MODEL, "a", stream=False))
        rid, _ = worker.take()
        worker.say("head-failed", changed("error-full", rid=rid, code=40302, retryable=False), rid=rid)
        with pytest.raises(InvalidParameter, match="the queue of m is full") as caught:
            asked.result(PATIENCE_S)
        assert caught.value.data["share"] == 0.5

        asked = threads.submit(lambda: client.generate(MODEL, "a", stream=False))
        rid, _ = worker.take()
        with controller.echo("other", model=MODEL) as other:
            wait_for_two(worker, client)
            worker.say("head-busy", rid=rid)
            assert asked.result(PATIENCE_S).timings.worker == "other"
            assert len(client.status().workers) == 2
            other.end()


def test_it_is_cancelled_and_drained(worker: FirstWorker, controller: ServedController) -> None:
    with Client(controller.clients) as client:
        stream = client.generate(MODEL, "a b c")
        rid, _ = worker.take()
        stream.close()
        head, payload = worker.hear(100)
        assert (head["rid"], head["client"], payload) == (rid, worker.client, b"")
        done = changed("done-full", rid=rid, seq=0, finish_reasons=["cancelled"], last=None)
        cancelled = changed("head-done", epoch=worker.epoch, client=worker.client, rid=rid, outcome="cancelled")
        worker.socket.send_multipart([cancelled, done])
        eventually(lambda: not client.status().running, PATIENCE_S, "its slot is free")

        assert zmqserve("drain", "echo-1", "--controller", controller.clients).returncode == 0
        head, _ = worker.hear(103)
        assert head["deadline_ms"] == 30_000
        worker.say("head-draining")
        worker.say("head-bye")
        eventually(lambda: not client.status().workers, PATIENCE_S, "it is gone")


def test_it_stays_registered_while_it_beats_and_hears_beats(worker: FirstWorker, controller: ServedController) -> None:
    """Longer than its ttl of 3 s: the controller beats once a second."""
    with Client(controller.clients) as client:
        for _ in range(4):
            worker.say("head-load", golden("load-minimal"))
            assert worker.hear(101)[0]["epoch"] == worker.epoch
        assert [status.state for status in client.status().workers] == ["ready"]


def test_a_controller_that_starts_again_gets_it_to_register() -> None:
    with ServedController() as first, FirstWorker(first.workers) as worker:
        worker.register()
        first.end(signal.SIGKILL)
        with ServedController("tcp://127.0.0.1:*", first.workers) as second, Client(second.clients) as client:
            worker.say("head-load", golden("load-minimal"))
            head, payload = worker.hear(102)
            assert (head["epoch"] > 0, payload) == (True, b"")
            worker.epoch = head["epoch"]
            worker.say("head-ready", golden("ready-full"))
            worker.welcomed()
            assert [status.name for status in client.status().workers] == ["echo-1"]


def test_a_client_and_a_worker_of_then_speak_through_todays_controller(worker: FirstWorker, controller: ServedController) -> None:
    """The request that names everything, a resume included: its bytes arrive as they left."""
    with FirstClient(controller.clients) as client:
        client.say(golden("generate-full"))
        rid, payload = worker.take()
        assert (rid, payload) == (2**63 - 1, golden("generate-full"))
        assert read(payload).fields["resume"] == GOLDEN["generate-full"]["fields"]["resume"]
        worker.say("head-first", golden("chunk-full", rid=rid), rid=rid)
        assert client.hear().fields == {**GOLDEN["chunk-full"]["fields"], "rid": rid}
        worker.say("head-done", golden("done-full", rid=rid), rid=rid)
        assert client.stream()[1].fields["finish_reasons"] == ["stop", "length"]
