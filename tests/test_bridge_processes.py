"""Bridges as processes, in pipelines over tcp: what they do while workers, controllers and they themselves are killed and restarted."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.fakes.pipeline import Pipeline, checked, job

from .processes import PATIENCE_S, Served, ServedController, eventually, network, zmqserve


def bridge(pipeline: Pipeline, controller: str, *arguments: str) -> Served:
    """A bridge process that is up."""
    ends = ("--pull", pipeline.jobs, "--push", pipeline.results, "--controller", controller, "--model", "m")
    served = Served("bridge", *ends, *arguments)
    try:
        served.wait_for("bridge up")
    except AssertionError:
        served.end(signal.SIGKILL)
        raise
    return served


def counters(served: Served) -> dict[str, Any]:
    """What SIGUSR1 makes it log."""
    served.send(signal.SIGUSR1)
    return served.wait_for("bridge counters")


@pytest.mark.heavy
def test_five_thousand_jobs_are_each_answered_once() -> None:
    """With workers killed all the while, and back again."""
    jobs = 5000
    with network("w0", "w1") as (controller, workers), Pipeline() as pipeline, bridge(pipeline, controller.clients) as bridging:
        done = 0
        for number in range(5):
            batch = list(range(number * jobs // 5, (number + 1) * jobs // 5))
            name = f"w{number % 2}"
            pipeline.push(*(job(n) for n in batch[:500]))
            workers.pop(name).end(signal.SIGKILL)
            workers[name] = controller.echo(name)
            results = pipeline.pull(500) + pipeline.run([job(n) for n in batch[500:]])
            assert sorted(checked(results)) == batch
            done += len(batch)
        assert pipeline.silent()
        told = counters(bridging)
        assert (told["jobs"], told["results"], told["answers"], told["held"]) == (done, done, done, 0)


def test_answers_go_on_elsewhere_when_their_worker_is_killed() -> None:
    """In order and exact, and the killed worker had begun some of them."""
    slow = ("--delay-per-token", "0.01")
    with network("w0", "w1", worker_arguments=slow) as (controller, workers), Pipeline() as pipeline:
        with bridge(pipeline, controller.clients, "--ordered"):
            pipeline.push(*({**job(n, 30), "stream": n == 0} for n in range(20)))
            pieces = pipeline.pull(3)
            assert [piece["chunk"]["seq"] for piece in pieces] == [0, 1, 2]
            workers["w0"].end(signal.SIGKILL)
            rest = pipeline.pull(47)
            results = [result for result in rest if "chunk" not in result]
            assert checked(results, 30) == list(range(20))
            assert [each["chunk"]["seq"] for each in [*pieces, *rest] if "chunk" in each] == list(range(30))
            assert any(result["resumed"] for result in results)


def test_jobs_wait_for_a_controller_that_is_restarted() -> None:
    """For its workers, too: no job of the bridge's own model is an error because they are not back yet."""
    with Pipeline() as pipeline, ServedController() as first:
        with first.echo("w", "--delay-per-token", "0.005"), bridge(pipeline, first.clients) as bridging:
            first.wait_ready("w")
            pipeline.push(*(job(n, 20) for n in range(100)))
            results = pipeline.pull(10)
            first.end(signal.SIGKILL)
            pipeline.push(*(job(n, 20) for n in range(100, 120)))
            with ServedController(first.clients, first.workers):
                results += pipeline.pull(110)
                assert sorted(checked(results, 20)) == list(range(120))
                assert counters(bridging)["answers"] == 120


def test_a_bridge_may_be_there_before_everybody_else() -> None:
    with Pipeline() as pipeline, ServedController() as controller, bridge(pipeline, controller.clients) as bridging:
        pipeline.push(*(job(n) for n in range(5)))
        assert bridging.wait_for("jobs wait")["error"] in {"UnknownModel", "NoWorker"}
        with controller.echo("w"):
            assert sorted(checked(pipeline.pull(5))) == list(range(5))
            bridging.wait_for("jobs go on")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_bridge_that_is_told_to_stop_loses_nothing(number: signal.Signals) -> None:
    with network("w", worker_arguments=("--delay-first", "0.02")) as (controller, _), Pipeline() as pipeline:
        with bridge(pipeline, controller.clients, "--concurrency", "8") as bridging:
            pipeline.push(*(job(n) for n in range(200)))
            results = pipeline.pull(5)
            bridging.send(number)
            results += pipeline.pull(195)
            assert sorted(checked(results)) == list(range(200))
            assert bridging.process.wait(PATIENCE_S) == 0
            down = bridging.wait_for("bridge down")
            assert (down["lost"], down["jobs"], down["results"]) == (0, 200, 200)
        assert pipeline.silent()


def test_a_second_signal_ends_it_at_once() -> None:
    with network("w", worker_arguments=("--delay-first", "60")) as (controller, _), Pipeline() as pipeline:
        with bridge(pipeline, controller.clients) as bridging:
            pipeline.push(job(1))
            eventually(lambda: counters(bridging)["running"] == 1, PATIENCE_S, "the job is asked")
            bridging.send(signal.SIGTERM)
            bridging.wait_for("bridge stops")
            bridging.send(signal.SIGTERM)
            assert bridging.process.wait(PATIENCE_S) == -signal.SIGTERM


def test_a_killed_bridge_loses_no_more_than_what_it_had_taken_and_what_was_on_its_way() -> None:
    """One that comes after it takes the rest."""
    with network("w", worker_arguments=("--delay-first", "0.02")) as (controller, _), Pipeline(hwm=1) as pipeline:
        with bridge(pipeline, controller.clients, "--concurrency", "4", "--window", "8") as killed:
            pipeline.push(*(job(n) for n in range(10)))
            seen = checked(pipeline.pull(5))
            killed.end(signal.SIGKILL)
        with bridge(pipeline, controller.clients, "--ordered"):
            pipeline.push(*(job(n) for n in range(10, 60)))
            while 59 not in seen:
                seen += checked(pipeline.pull())
        assert len(set(seen)) == len(seen), "once at most"
        late = set(range(10, 60)) - set(seen)
        assert len(late) <= 2, "the source's pipe to the dead bridge holds no more"


def test_two_bridges_share_a_pipeline() -> None:
    with network("w", worker_arguments=("--delay-first", "0.01")) as (controller, _), Pipeline(hwm=4) as pipeline:
        with bridge(pipeline, controller.clients) as one, bridge(pipeline, controller.clients) as two:
            results = pipeline.run([job(n) for n in range(400)])
            assert sorted(checked(results)) == list(range(400))
            shares = [counters(each)["answers"] for each in (one, two)]
            assert sum(shares) == 400
            assert min(shares) > 0


ENDS = ("--pull", "tcp://127.0.0.1:1", "--push", "tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "the following arguments are required: --pull, --push"),
        ((*ENDS, "--concurrency", "0"), "must be an integer of at least 1, got '0'"),
        ((*ENDS, "--push", "tcp://*:5558"), "* is for binding: bind_push (--bind-push), or name the host"),
        ((*ENDS, "--timeout", "0"), "timeout_s must be a number of seconds above 0"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: tuple[str, ...], words: str) -> None:
    done = zmqserve("bridge", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
