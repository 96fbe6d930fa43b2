"""A bridge in a pipeline, within one process: real PULL and PUSH sockets, an echo worker."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import pytest
import structlog
import zmq

from bench.ports import free_port
from tests.fakes.broker import Broker, chunk, done
from tests.fakes.pipeline import PATIENCE_MS, Pipeline, checked, decoded, job
from zmqserve import Bridge, Controller, InvalidParameter, WorkerConfig, errors
from zmqserve import messages as m
from zmqserve.backends.echo import EchoWorker

from .processes import PATIENCE_S, eventually

Context = zmq.Context[Any]


@pytest.fixture
def context() -> Iterator[Context]:
    with zmq.Context() as made:
        yield made


@pytest.fixture
def served(context: Context) -> Iterator[Context]:
    """With a network of model m at inproc://clients."""
    with (
        Controller(context=context, clients=["inproc://clients"], workers=["inproc://workers"]),
        EchoWorker(WorkerConfig(model="m", context=context, controllers=("inproc://workers",)), dimensions=3) as worker,
    ):
        worker.wait_ready(PATIENCE_S)
        yield context


@contextmanager
def bridged(context: Context, *, hwm: int = 1000, **settings: Any) -> Iterator[tuple[Pipeline, Bridge]]:
    """A pipeline with a bridge in it."""
    with Pipeline(context, hwm=hwm) as pipeline:
        options: dict[str, Any] = {"pull": pipeline.jobs, "push": pipeline.results, "model": "m", "context": context} | settings
        with Bridge("inproc://clients", **options) as bridge:
            yield pipeline, bridge


# --- results -----------------------------------------------------------------------------------


def test_results_carry_the_jobs_own_id_and_metadata(served: Context) -> None:
    with bridged(served) as (pipeline, bridge):
        results = pipeline.run([job(n) for n in range(300)])
        assert sorted(checked(results)) == list(range(300))
        first = next(result for result in results if result["id"] == 1)
        assert (first["model"], first["finish_reason"], first["token_ids"], first["resumed"]) == ("m", "length", [0, 1], 0)
        assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "cached_tokens": 0}
        assert first["timings"]["worker"].startswith("echo-")
    assert bridge.counters == {"jobs": 300, "results": 300, "answers": 300}


def test_ordered_results_come_in_the_order_of_their_jobs(served: Context) -> None:
    """Long answers before short ones, and jobs that fail between them."""
    jobs: list[Any] = [job(n, tokens=200 - n % 100 * 2) for n in range(300)]
    jobs[50] = {"id": 50, "prompt": 1}
    with bridged(served, ordered=True, concurrency=20) as (pipeline, _):
        results = pipeline.run(jobs)
    assert [result["id"] for result in results] == list(range(300))
    assert results[50]["error"]["name"] == "InvalidParameter"


def test_unordered_a_long_job_holds_nobody_up(context: Context) -> None:
    def script(asked: m.Generate) -> list[Any]:
        return [] if asked.prompt == "slow" else [done(asked.rid, 0, last=chunk(asked.rid, 0, "quick"))]

    with Broker(script, endpoint="inproc://clients", context=context) as broker:
        with bridged(context) as (pipeline, _):
            pipeline.push({"id": "slow", "prompt": "slow"}, {"id": "quick", "prompt": "quick"})
            assert [result["id"] for result in pipeline.pull()] == ["quick"]
            slow = broker.expect(m.Generate)
            broker.send(done(slow.rid, 0, last=chunk(slow.rid, 0, "late")))
            assert [(result["id"], result["text"]) for result in pipeline.pull()] == [("slow", "late")]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (
            b'{"id": 12345678901234567890123, "metadata": {"a": [1.50, 1e999, {}]}, ',
            (b"12345678901234567890123", b'{"a": [1.50, 1e999, {}]}'),
        ),
        (b'{"metadata": null, "id": "x\\u00e9", ', (b'"x\\u00e9"', b"null")),
        (b"{", (b"null", b"null")),
    ],
)
def test_labels_in_json_come_back_byte_for_byte(served: Context, labels: bytes, expected: tuple[bytes, bytes]) -> None:
    with bridged(served) as (pipeline, _):
        pipeline.push(labels + b'"prompt": "a"}')
        assert pipeline.raw().startswith(b'{"id":%s,"metadata":%s,"model"' % expected)


@pytest.mark.parametrize("label", [b"\xca\x3f\x80\x00\x00", b"\xc7\x03\x05abc", b"\x81\x01\x92\xc3\xc0", b"\xc4\x02\xff\xfe", b"\xa1\xff"])
def test_labels_in_msgpack_come_back_byte_for_byte(served: Context, label: bytes) -> None:
    """A float of 32 bits, an extension, a map with a number as key, raw bytes, a text that is not UTF-8."""
    with bridged(served) as (pipeline, _):
        pipeline.push(b"\x83\xa2id" + label + b"\xa8metadata" + label + b"\xa6prompt\xa1a")
        assert (b"\xa2id" + label + b"\xa8metadata" + label) in pipeline.raw()


def test_a_result_is_in_the_encoding_of_its_job(served: Context) -> None:
    with bridged(served) as (pipeline, _):
        pipeline.push(b' \n{"prompt": "a b"}')
        assert pipeline.raw()[:1] == b"{"
        pipeline.push(msgpack.packb({"id": b"\xff", "prompt": "a b"}))
        assert msgpack.unpackb(pipeline.raw())["id"] == b"\xff"


def test_every_kind_of_job(served: Context) -> None:
    with bridged(served, concurrency=1) as (pipeline, _):
        pipeline.push({"messages": [{"role": "user", "content": "a b"}]}, {"token_ids": [5, 6]}, {"prompt": "a b", "params": {"n": 2}})
        chat, ids, both = pipeline.pull(3)
        assert (chat["text"], ids["text"]) == ("a b", "5 6")
        assert [choice["text"] for choice in both["choices"]] == ["a b", "a b"]
        assert "choices" not in chat


def test_vectors_are_raw_floats_in_msgpack_and_lists_in_json(served: Context) -> None:
    np = pytest.importorskip("numpy")
    asked = {"id": 1, "texts": ["a", "b c"], "params": {"dimensions": 2}}
    with bridged(served, concurrency=1) as (pipeline, _):
        pipeline.push(asked, msgpack.packb(asked))
        told, packed = pipeline.pull(2)
    assert (told["shape"], told["dtype"], packed["shape"], packed["dtype"]) == ([2, 2], "float32", [2, 2], "float32")
    assert told["usage"] == packed["usage"] == {"prompt_tokens": 3, "completion_tokens": 0, "cached_tokens": 0}
    assert told["timings"]["worker"] == packed["timings"]["worker"] != ""
    vectors = np.frombuffer(packed["vectors"], "<f4").reshape(2, 2)
    assert np.array_equal(np.array(told["vectors"], np.float32), vectors)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)


def test_a_job_may_have_its_chunks(served: Context) -> None:
    with bridged(served) as (pipeline, bridge):
        pipeline.push({"id": 7, "metadata": "x", "prompt": "a b c", "stream": True, "params": {"max_tokens": 4}})
        *pieces, whole = pipeline.pull(5)
        assert [(p["id"], p["metadata"], p["chunk"]["seq"], p["chunk"]["text"]) for p in pieces] == [
            (7, "x", 0, "a"),
            (7, "x", 1, " b"),
            (7, "x", 2, " c"),
            (7, "x", 3, " a"),
        ]
        assert pieces[3]["chunk"] == {"seq": 3, "index": 0, "text": " a", "token_ids": [3]}
        assert (whole["text"], whole["finish_reason"]) == ("a b c a", "length")
    assert bridge.counters == {"jobs": 1, "results": 1, "answers": 1, "chunks": 4}


def test_ordered_chunks_stay_with_their_job(served: Context) -> None:
    with bridged(served, ordered=True) as (pipeline, _):
        pipeline.push(*({"id": n, "prompt": "a b c", "stream": True} for n in range(20)))
        assert [result["id"] for result in pipeline.pull(80)] == [n for n in range(20) for _ in range(4)]


def test_what_a_job_says_reaches_the_controller(context: Context) -> None:
    with Broker(endpoint="inproc://clients", context=context) as broker:
        with bridged(context, timeout_s=30) as (pipeline, bridge):
            pipeline.push(
                {"prompt": "x", "model": "other", "priority": 5, "affinity": "k", "trace": "t", "timeout_s": 4, "params": {"seed": 3}}
            )
            asked = broker.expect(m.Generate)
            assert (asked.model, asked.priority, asked.affinity, asked.trace, asked.params.seed) == ("other", 5, "k", "t", 3)
            assert asked.deadline_ms is not None
            assert 3000 < asked.deadline_ms <= 4000
            pipeline.push({"prompt": "x"})
            asked = broker.expect(m.Generate)
            assert asked.model == "m"
            assert asked.deadline_ms is not None
            assert 29_000 < asked.deadline_ms <= 30_000
            bridge.stop(0)


# --- bounds ------------------------------------------------------------------------------------


def test_no_more_than_concurrency_jobs_are_asked_at_once(context: Context) -> None:
    with Broker(endpoint="inproc://clients", context=context) as broker:
        with bridged(context, concurrency=3, window=5) as (pipeline, bridge):
            pipeline.push(*(job(n) for n in range(8)))
            asked = [broker.expect(m.Generate) for _ in range(3)]
            # A turn later than the third: what it would have asked would be there.
            broker.send(done(asked[0].rid, 0, last=chunk(asked[0].rid, 0, "x")))
            pipeline.pull()
            broker.expect(m.Generate)
            eventually(lambda: bridge.counters["jobs"] == 4, PATIENCE_S, "the fourth job was taken")
            assert broker.nothing_arrived()
            bridge.stop(0)


def test_a_sink_that_does_not_read_stops_the_source_and_loses_nothing(served: Context) -> None:
    """All queues are counted in messages here, so it is known what fits: 16 + 1 results in the pipe to the sink, the window, and 1 + 1
    jobs in the pipe from the source."""
    with bridged(served, hwm=1, concurrency=4, window=10) as (pipeline, bridge):
        pipeline.push(*(job(n) for n in range(27)))
        eventually(lambda: bridge.counters.get("results") == 17 and bridge.counters["jobs"] == 27, PATIENCE_S, "all is full")
        pipeline.push(job(27), job(28))
        assert not pipeline.source.poll(200, zmq.POLLOUT), "the source may send on although nobody takes results"
        assert bridge.counters["jobs"] == 27
        results = pipeline.pull(29)
        assert sorted(checked(results)) == list(range(29))
        assert sorted(checked(pipeline.run([job(n) for n in range(29, 200)]))) == list(range(29, 200))


def test_jobs_stay_with_the_source_for_other_bridges(context: Context) -> None:
    """The first is busy for ever; the second takes all the rest."""
    with Broker(endpoint="inproc://clients", context=context) as broker, Pipeline(context, hwm=1) as pipeline:
        options: dict[str, Any] = {"pull": pipeline.jobs, "push": pipeline.results, "model": "m", "context": context}
        with Bridge("inproc://clients", concurrency=1, **options) as busy:
            pipeline.push(job(0))
            broker.expect(m.Generate)
            with Bridge("inproc://clients", **options) as other:
                pipeline.push(*(job(n) for n in range(1, 40)))
                eventually(
                    lambda: other.counters.get("jobs", 0) >= 37, PATIENCE_S, "the other one has taken what is not in the busy one's pipe"
                )
                assert busy.counters["jobs"] == 1
                other.stop(0)
            busy.stop(0)


# --- what fails --------------------------------------------------------------------------------


def test_bad_jobs_get_an_error_and_the_others_their_answers(served: Context) -> None:
    bad = {"id": 5, "metadata": [1], "prompt": "a", "params": {"max_tokens": 0}}
    with bridged(served, ordered=True) as (pipeline, bridge):
        pipeline.push(job(1), bad, msgpack.packb(bad), b"\xff\x00garbage", b"garbage", b"", job(2))
        first, told, packed, *garbage, last = pipeline.pull(7)
        assert checked([first, last]) == [1, 2]
        assert told == packed
        assert (told["id"], told["metadata"]) == (5, [1])
        assert told["error"] == {
            "code": 40302,
            "name": "InvalidParameter",
            "message": "max_tokens must be an integer >= 1, got 0",
            "retryable": False,
            "data": {"parameter": "max_tokens", "value": "0"},
        }
        assert {(each["id"], each["metadata"], each["error"]["name"]) for each in garbage} == {(None, None, "MalformedMessage")}
    assert bridge.counters["errors"] == 5


def test_a_message_of_several_frames_is_no_job(served: Context) -> None:
    with bridged(served) as (pipeline, _):
        pipeline.source.send_multipart([b"header", b'{"id": 3, "prompt": "a"}'])
        (result,) = pipeline.pull()
        assert (result["id"], result["error"]["message"]) == (3, "a job is one frame, this message has 2")


def test_a_large_job_is_refused_by_name(served: Context) -> None:
    """And costs nobody the connection."""
    with (
        Pipeline() as pipeline,
        Bridge("inproc://clients", pull=pipeline.jobs, push=pipeline.results, model="m", context=served, job_bytes=1000),
    ):
        pipeline.push({"id": 1, "prompt": "x" * 1500}, {"id": 2, "prompt": "x" * 1_000_000}, {"id": 3, "prompt": "x"})
        results = {result["id"]: result for result in pipeline.pull(3)}
        assert [results[n]["error"]["data"]["limit_bytes"] for n in (1, 2)] == [1000, 1000]
        assert results[3]["text"] == "x"


def test_a_model_that_nobody_knows_is_an_error_unless_it_is_the_bridges_own(context: Context) -> None:
    asked_twice = threading.Event()
    seen: list[str] = []

    def script(asked: m.Generate) -> list[Any]:
        seen.append(asked.model)
        if seen.count("m") < 3:
            return [m.Error(asked.rid, errors.UnknownModel.code, "no such model", False)]
        asked_twice.set()
        return [done(asked.rid, 0, last=chunk(asked.rid, 0, "here"))]

    with Broker(script, endpoint="inproc://clients", context=context):
        with bridged(context) as (pipeline, bridge):
            pipeline.push({"id": 1, "prompt": "x", "model": "typo"})
            assert pipeline.pull()[0]["error"]["name"] == "UnknownModel"
            pipeline.push({"id": 2, "prompt": "x"})
            assert pipeline.pull()[0]["text"] == "here"
            assert bridge.counters["retries"] == 2


@pytest.mark.parametrize("kind", [errors.Overloaded, errors.NoWorker, errors.ModelLoading])
def test_what_may_pass_makes_a_job_wait(context: Context, kind: type[errors.ZmqserveError]) -> None:
    turned_down: list[int] = []

    def script(asked: m.Generate) -> list[Any]:
        if len(turned_down) < 3:
            turned_down.append(asked.rid)
            return [m.Error(asked.rid, kind.code, "not now", True, 1)]
        return [done(asked.rid, 0, last=chunk(asked.rid, 0, "now"))]

    with Broker(script, endpoint="inproc://clients", context=context):
        with bridged(context) as (pipeline, _):
            pipeline.push({"id": 1, "prompt": "x"})
            assert pipeline.pull()[0]["text"] == "now"
    assert len(turned_down) == 3


def test_a_job_waits_for_a_controller_until_its_timeout(context: Context) -> None:
    with bridged(context, connect_timeout_s=0.05) as (pipeline, bridge):
        pipeline.push({"id": 1, "prompt": "x", "timeout_s": 0.5}, {"id": 2, "prompt": "x"})
        (result,) = pipeline.pull()
        assert (result["id"], result["error"]["retryable"]) == (1, True)
        assert result["error"]["name"] in {"ControllerUnreachable", "DeadlineExceeded"}
        with Broker(lambda asked: [done(asked.rid, 0, last=chunk(asked.rid, 0, "late"))], endpoint="inproc://clients", context=context):
            (result,) = pipeline.pull()
            assert (result["id"], result["text"]) == (2, "late")
        assert bridge.counters["retries"] >= 1


def test_a_stream_that_has_begun_is_not_asked_again(context: Context) -> None:
    def script(asked: m.Generate) -> list[Any]:
        return [chunk(asked.rid, 0, "begun"), m.Error(asked.rid, errors.Overloaded.code, "not now", True, 1)]

    with Broker(script, endpoint="inproc://clients", context=context) as broker:
        with bridged(context) as (pipeline, _):
            pipeline.push({"id": 1, "prompt": "x", "stream": True})
            piece, end = pipeline.pull(2)
            assert (piece["chunk"]["text"], end["error"]["name"]) == ("begun", "Overloaded")
            broker.expect(m.Generate)
            assert broker.nothing_arrived()


# --- life --------------------------------------------------------------------------------------


def test_stop_takes_what_has_arrived_and_finishes_it(served: Context) -> None:
    with bridged(served, concurrency=2, window=2) as (pipeline, bridge):
        pipeline.push(*(job(n) for n in range(100)))
        assert bridge.stop()
        assert sorted(checked(pipeline.pull(100))) == list(range(100))
        assert pipeline.silent()
        assert bridge.counters["jobs"] == bridge.counters["results"] == 100
        assert bridge.stop(), "stopping twice is harmless"


def test_stop_with_a_timeout_drops_the_rest(context: Context) -> None:
    with Broker(endpoint="inproc://clients", context=context) as broker:
        with bridged(context) as (pipeline, bridge):
            pipeline.push(job(1))
            rid = broker.expect(m.Generate).rid
            assert not bridge.stop(0.05)
            assert broker.expect(m.Cancel).rid == rid
            assert pipeline.silent()


def test_stopping_gives_what_waits_for_a_controller_its_error(context: Context) -> None:
    with bridged(context, connect_timeout_s=0.05) as (pipeline, bridge):
        pipeline.push(job(1))
        eventually(lambda: bridge.counters.get("retries", 0) >= 1, PATIENCE_S, "the job waits")
        assert bridge.stop()
        (result,) = pipeline.pull()
        assert (result["id"], result["error"]["name"], result["error"]["retryable"]) == (1, "ControllerUnreachable", True)


def test_stopping_ends_jobs_that_were_told_to_come_again_later(context: Context) -> None:
    def busy(asked: m.Generate) -> list[Any]:
        return [m.Error(asked.rid, errors.Overloaded.code, "full", True, 3_600_000)]

    with Broker(busy, endpoint="inproc://clients", context=context), bridged(context, ordered=True) as (pipeline, bridge):
        pipeline.push(*(job(n) for n in range(20)))
        eventually(lambda: bridge.counters.get("retries") == 20, PATIENCE_S, "the jobs wait")
        assert bridge.stop(PATIENCE_S)
        results = pipeline.pull(20)
        assert [result["id"] for result in results] == list(range(20))
        assert {(result["error"]["name"], result["error"]["retryable"]) for result in results} == {("Overloaded", True)}
        assert bridge.counters == {"jobs": 20, "retries": 20, "errors": 20, "results": 20}


def test_a_stop_that_waits_for_the_pipeline_is_cut_short_by_another() -> None:
    """All that is left to do is libzmq's, in a context of the bridge's own: to hand a result to a sink that is away."""
    sink = f"tcp://127.0.0.1:{free_port()}"
    with Broker(lambda asked: [done(asked.rid, 0, last=chunk(asked.rid, 0, "x"))]) as broker, Pipeline() as pipeline:
        bridge = Bridge(broker.endpoint, pull=pipeline.jobs, push=sink, model="m")
        bridge.start()
        pipeline.push(job(1))
        eventually(lambda: bridge.counters.get("results") == 1, PATIENCE_S, "libzmq has the result")
        with zmq.Context() as context, context.socket(zmq.PULL) as late, ThreadPoolExecutor(2) as pool:
            try:
                patient = pool.submit(bridge.stop)
                eventually(lambda: repr(bridge).endswith("not bound)"), PATIENCE_S, "it has closed its sockets")
                assert not patient.done()
                assert pool.submit(bridge.stop, 0.1).result(PATIENCE_S)
                assert patient.result(PATIENCE_S)
                assert bridge.stop()
            finally:
                late.bind(sink)
            # What libzmq has still leaves, and then nothing is left behind.
            assert late.poll(PATIENCE_MS)
            assert decoded(late.recv())["text"] == "x"
            for thread in threading.enumerate():
                if thread.name == "zmqserve-bridge-end":
                    thread.join(PATIENCE_S)
                    assert not thread.is_alive()


def test_it_may_be_started_again_and_run_in_the_callers_thread(served: Context) -> None:
    """With new peers each time: a PUSH that is still connected to one that has gone gives it a job."""
    ends = {"pull": "inproc://pulled", "push": "inproc://pushed"}
    bridge = Bridge(
        "inproc://clients", pull=ends["pull"], push=ends["push"], bind_pull=True, bind_push=True, model="m", context=served, ordered=True
    )
    for number, in_thread in enumerate((True, False, True)):
        runner = threading.Thread(target=bridge.run)
        bridge.bind()
        bridge.start() if in_thread else runner.start()
        with served.socket(zmq.PUSH) as source, served.socket(zmq.PULL) as sink:
            source.connect(ends["pull"])
            sink.connect(ends["push"])
            for _ in range(2):
                source.send(b'{"id": %d, "prompt": "a b"}' % number)
            for _ in range(2):
                assert sink.poll(PATIENCE_MS)
                assert decoded(sink.recv())["id"] == number
            bridge.stop()
        if not in_thread:
            runner.join(PATIENCE_S)
            assert not runner.is_alive()
    assert bridge.counters["results"] == 6


def test_stopped_before_it_runs_it_ends_at_once(context: Context) -> None:
    """As by a signal that comes while it starts."""
    bridge = Bridge("inproc://clients", pull="inproc://a", push="inproc://b", context=context)
    bridge.stop()
    bridge.run()
    bridge.bind()
    bridge.stop()
    bridge.run()


def test_a_wrong_timeout_stops_nothing(served: Context) -> None:
    with bridged(served) as (pipeline, bridge):
        for wrong in (-1, "1"):
            with pytest.raises(errors.InvalidParameter, match="timeout_s must be a number of seconds from 0"):
                bridge.stop(wrong)  # type: ignore[arg-type]
        pipeline.push({"prompt": "a b"})
        assert pipeline.pull(1)[0]["text"] == "a b"


def test_while_one_finishes_another_may_bind_its_endpoint(context: Context) -> None:
    """It has no room, so it does not know yet whether more jobs arrive."""
    with Broker(endpoint="inproc://clients", context=context) as broker, Pipeline() as pipeline:
        any_port = "tcp://127.0.0.1:*"
        where: dict[str, Any] = {"push": pipeline.results, "model": "m", "context": context}
        with Bridge("inproc://clients", pull=any_port, bind_pull=True, window=1, drain_s=100, **where) as first:
            (endpoint,) = first.pull_endpoints
            with zmq.Context() as other, other.socket(zmq.PUSH) as source, ThreadPoolExecutor(1) as pool:
                source.connect(endpoint)
                source.send_json(job(1))
                rid = broker.expect(m.Generate).rid
                stopped = pool.submit(first.stop)
                second = Bridge("inproc://clients", pull=endpoint, bind_pull=True, **where)
                eventually(lambda: binds(second), PATIENCE_S, "the endpoint is free")
                assert not stopped.done()
                second.stop()
                broker.send(done(rid, 0, last=chunk(rid, 0, "x")))
                assert stopped.result(PATIENCE_S)


def binds(bridge: Bridge) -> bool:
    try:
        bridge.bind()
    except errors.BindFailed:
        return False
    return True


def test_either_socket_may_be_bound(served: Context) -> None:
    options: dict[str, Any] = {"bind_pull": True, "bind_push": True, "model": "m", "context": served}
    for pull, push in (("tcp://127.0.0.1:*", "tcp://127.0.0.1:*"), ("inproc://pulled", "inproc://pushed")):
        for _ in range(2):  # the names are free again
            with Bridge("inproc://clients", pull=pull, push=push, **options) as bridge:
                source, sink = served.socket(zmq.PUSH), served.socket(zmq.PULL)
                source.connect(bridge.pull_endpoints[0])
                sink.connect(bridge.push_endpoints[0])
                source.send(b'{"id": 1, "prompt": "a b"}')
                assert sink.poll(PATIENCE_MS)
                assert decoded(sink.recv())["text"] == "a b"
                source.close(0)
                sink.close(0)


def test_several_sources_and_sinks(served: Context) -> None:
    with Pipeline() as one, Pipeline() as two:
        with Bridge("inproc://clients", pull=[one.jobs, two.jobs], push=[one.results, two.results], model="m", context=served):
            one.push(*(job(n) for n in range(10)))
            two.push(*(job(n) for n in range(10, 20)))
            assert sorted(checked(one.pull(10) + two.pull(10))) == list(range(20))


def test_it_leaves_no_thread_and_no_descriptor_behind(served: Context) -> None:
    def once() -> None:
        with Pipeline() as pipeline, Bridge("inproc://clients", pull=pipeline.jobs, push=pipeline.results, model="m", context=served):
            assert checked(pipeline.run([job(1)])) == [1]

    once()
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        once()
    eventually(lambda: len(os.listdir("/proc/self/fd")) <= before, PATIENCE_S, "as many descriptors as before")


@pytest.mark.parametrize("window", [1, 10])
def test_a_context_ended_under_it_ends_it(window: int) -> None:
    """Also while it has no room, and so waits for nothing but its client."""
    own: Context = zmq.Context()
    with Broker() as broker, Pipeline() as pipeline:
        with Bridge(broker.endpoint, pull=pipeline.jobs, push=pipeline.results, model="m", window=window, context=own) as bridge:
            pipeline.push(job(1))
            broker.expect(m.Generate)
            own.term()
            assert not bridge.stop(), "the job was lost"


def test_a_context_ended_while_jobs_wait_ends_it(context: Context) -> None:
    def busy(asked: m.Generate) -> list[Any]:
        return [m.Error(asked.rid, errors.Overloaded.code, "not now", True, 60_000)]

    own: Context = zmq.Context()
    with Broker(busy) as broker, Pipeline() as pipeline:
        with Bridge(broker.endpoint, pull=pipeline.jobs, push=pipeline.results, model="m", window=1, context=own) as bridge:
            pipeline.push(job(1))
            eventually(lambda: bridge.counters.get("retries") == 1, PATIENCE_S, "the job waits")
            own.term()
            assert not bridge.stop()


def test_a_job_is_not_asked_again_before_the_controller_said(context: Context) -> None:
    asked_s: list[float] = []

    def script(asked: m.Generate) -> list[Any]:
        asked_s.append(time.monotonic())
        if len(asked_s) == 1:
            return [m.Error(asked.rid, errors.Overloaded.code, "not now", True, 300)]
        return [done(asked.rid, 0, last=chunk(asked.rid, 0, "now"))]

    with Broker(script, endpoint="inproc://clients", context=context):
        with bridged(context) as (pipeline, _):
            pipeline.push(job(1))
            assert pipeline.pull()[0]["text"] == "now"
    assert asked_s[1] - asked_s[0] >= 0.3


def test_told_to_take_nothing_more_it_stops_at_once(context: Context) -> None:
    with Broker(endpoint="inproc://clients", context=context) as broker:
        with bridged(context, drain_s=0) as (pipeline, bridge):
            pipeline.push(job(1))
            asked = broker.expect(m.Generate)
            with ThreadPoolExecutor(1) as pool:
                stopped = pool.submit(bridge.stop)
                eventually(lambda: not pipeline.source.poll(0, zmq.POLLOUT), PATIENCE_S, "it lets go of the source")
                broker.send(done(asked.rid, 0, last=chunk(asked.rid, 0, "last")))
                assert stopped.result(PATIENCE_S)
            assert [result["text"] for result in pipeline.pull()] == ["last"]


@pytest.fixture
def on_event() -> Iterator[Callable[[str, Callable[[], object]], None]]:
    """Does something in the thread that logs an event, before it goes on."""

    def set_up(name: str, do: Callable[[], object]) -> None:
        def look(_logger: object, _method: str, event: Any) -> Any:
            if event["event"] == name:
                do()
            raise structlog.DropEvent

        structlog.configure(processors=[look])

    yield set_up
    structlog.reset_defaults()


def test_told_to_take_nothing_more_it_leaves_what_has_arrived(
    served: Context, on_event: Callable[[str, Callable[[], object]], None]
) -> None:
    with bridged(served, drain_s=0) as (pipeline, bridge):
        on_event("bridge stops", lambda: pipeline.push(*(job(n) for n in range(10))))
        assert bridge.stop()
        assert pipeline.silent()
    assert bridge.counters == {"results": 0}


def test_told_to_take_nothing_more_while_it_takes_it_stops_there(
    served: Context, on_event: Callable[[str, Callable[[], object]], None]
) -> None:
    with bridged(served, drain_s=0) as (pipeline, bridge):

        def stop() -> None:
            pipeline.push(*(job(n) for n in range(10)))
            bridge.stop()  # in its own thread, where it does not wait

        on_event("job failed", stop)
        pipeline.push(b"garbage")
        assert pipeline.pull()[0]["error"]["name"] == "MalformedMessage"
        assert bridge.stop()
        assert pipeline.silent()
    assert bridge.counters == {"jobs": 1, "errors": 1, "results": 1}


@pytest.mark.parametrize(
    ("settings", "parameter"),
    [
        ({"concurrency": 0}, "concurrency"),
        ({"window": True}, "window"),
        ({"drain_s": -1}, "drain_s"),
        ({"job_bytes": 0}, "job_bytes"),
        ({"model": ""}, "model"),
        ({"pull": []}, "pull"),
        ({"pull": "tcp://*:5555"}, "endpoint"),
        ({"push": "nonsense"}, "endpoint"),
        ({"pull": None}, "pull"),
        ({"pull": b"inproc://a"}, "pull"),
        ({"push": ["inproc://b", 5]}, "push"),
        ({"push": 5}, "push"),
        ({"name": "\ud800"}, "name"),
        ({"ordered": "yes"}, "ordered"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_opened(settings: dict[str, Any], parameter: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        Bridge(**({"pull": "inproc://a", "push": "inproc://b"} | settings))
    assert caught.value.parameter == parameter
