"""The chaos suite: its plan, its oracle and its books; short runs with real processes; and that it finds bugs that are planted."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from bench import backpressure, chaos_faults, recovery
from bench.chaos_ledger import HUNG_S, Ledger, cause, quantile
from bench.chaos_oracle import Oracle
from bench.chaos_records import Begun, Ended, line, parse
from zmqserve.errors import StreamGap, WorkerLost

from .processes import PATIENCE_S, eventually

WORDS = ["a", "b", "c"]


# --- the plan ----------------------------------------------------------------------------------


def test_a_seed_is_a_plan() -> None:
    assert chaos_faults.plan(7, 100.0) == chaos_faults.plan(7, 100.0)
    assert chaos_faults.plan(7, 100.0) != chaos_faults.plan(8, 100.0)


def test_ten_minutes_hold_every_kind_of_fault_and_all_controllers_down_at_least_five_times() -> None:
    plan = chaos_faults.plan(1, 600.0)
    kinds = [fault.kind for fault in plan]
    assert set(kinds) == {*chaos_faults.WEIGHTS, chaos_faults.BOTH}
    assert kinds.count(chaos_faults.BOTH) >= 5
    times = [fault.at_s for fault in plan]
    assert all(1.0 <= later - sooner <= 3.0 for sooner, later in itertools.pairwise(times))
    assert times[0] > 0
    assert times[-1] < 600.0


# --- the oracle --------------------------------------------------------------------------------


def watched(*changes: Callable[[list[tuple[int, str, list[int]]]], object]) -> Oracle:
    """An oracle that was shown an answer of five tokens with these changes."""
    chunks = [(0, "a", [0]), (1, " b c", [1, 2]), (2, " a", [3]), (3, " b", [4])]
    for change in changes:
        change(chunks)
    oracle = Oracle(WORDS, 5)
    for chunk in chunks:
        oracle.chunk(*chunk)
    ids = [token for _, _, token_ids in chunks for token in token_ids]
    oracle.end("".join(text for _, text, _ in chunks), ids, "length", (3, 5))
    return oracle


def test_the_oracle_has_nothing_to_say_of_an_exact_answer() -> None:
    assert watched().wrong == ""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        pytest.param(lambda chunks: chunks.pop(1), "seq 2 after 0", id="a chunk is missing"),
        pytest.param(lambda chunks: chunks.insert(1, chunks[0]), "seq 0 after 0", id="a chunk came twice"),
        pytest.param(lambda chunks: chunks.pop(), "ended with 4 tokens", id="the last chunk is missing"),
        pytest.param(lambda chunks: chunks.__setitem__(2, (2, " b", [3])), "text ' b' where ' a'", id="a wrong text"),
        pytest.param(lambda chunks: chunks.__setitem__(2, (2, " a", [4])), "missing: token 4 where 3", id="a token left out, seq intact"),
        pytest.param(lambda chunks: chunks.__setitem__(2, (2, " a", [2])), "duplicated: token 2 where 3", id="a token twice, seq intact"),
    ],
)
def test_the_oracle_sees_what_is_wrong(change: Callable[[list[tuple[int, str, list[int]]]], object], complaint: str) -> None:
    assert complaint in watched(change).wrong


def test_the_oracle_checks_the_end() -> None:
    for reason, usage, complaint in (("stop", (3, 3), "finished by"), ("length", (3, 4), "usage")):
        oracle = Oracle(WORDS, 3)
        oracle.chunk(0, "a b c", [0, 1, 2])
        oracle.end("a b c", [0, 1, 2], reason, usage)
        assert complaint in oracle.wrong


# --- the books ---------------------------------------------------------------------------------


def asked(*records: Begun | Ended) -> Ledger:
    ledger = Ledger()
    for record in records:
        ledger.take("client", parse(line(record).rstrip(b"\n")))
    return ledger


def test_a_whole_answer_counts_as_whole_and_its_gaps_are_kept() -> None:
    ledger = asked(Begun(0, 1.0, 61.0), Ended(0, 9.0, tokens=200, resumed=2, gap_s=1.5, join_gaps_s=[1.5, 0.1]))
    assert (ledger.started, ledger.whole, ledger.owed, ledger.share_whole) == (1, 1, 0, 1.0)
    assert (ledger.joins, ledger.joined, ledger.join_gaps_s, ledger.longest_gaps_s) == (2, 1, [1.5, 0.1], [1.5])


def test_an_answer_that_the_oracle_blames_is_not_whole() -> None:
    ledger = asked(Begun(0, 1.0, 61.0), Ended(0, 9.0, wrong="missing: token 3"))
    assert (ledger.whole, ledger.wrong, ledger.share_whole) == (0, ["missing: token 3"], 0.0)


def test_errors_are_counted_by_code_and_cause() -> None:
    lost = {"code": WorkerLost.code, "error": "WorkerLost"}
    ledger = asked(
        *(Begun(number, 1.0, 61.0) for number in range(3)),
        Ended(0, 2.0, message="worker worker-1 was lost (killed)", **lost),  # type: ignore[arg-type]
        Ended(1, 2.0, message="worker worker-2 was lost (killed)", **lost),  # type: ignore[arg-type]
        Ended(2, 2.0, StreamGap.code, "StreamGap", "expected seq 4, got 5"),
    )
    assert ledger.failed == {"50007 WorkerLost: worker # was lost (killed)": 2, "50403 StreamGap: expected seq #, got #": 1}
    assert ledger.gaps == 1


def test_what_a_living_client_never_saw_the_end_of_is_lost_and_what_a_killed_one_asked_is_not() -> None:
    ledger = asked(Begun(0, 1.0, 61.0), Begun(1, 1.0, 90.0))
    ledger.left("client", 61.0 + HUNG_S + 1)
    assert (ledger.lost, ledger.hung, ledger.forgotten, ledger.settled) == (2, 1, 0, 2)
    ledger = asked(Begun(0, 1.0, 61.0))
    ledger.killed("client")
    assert (ledger.lost, ledger.forgotten, ledger.settled) == (0, 1, 0)


def test_an_end_long_after_its_deadline_is_hung() -> None:
    begun = Begun(0, 1.0, 61.0)
    assert asked(begun, Ended(0, 61.0 + HUNG_S)).hung == 0
    assert asked(begun, Ended(0, 61.0 + HUNG_S + 0.1)).hung == 1


def test_poison_has_books_of_its_own() -> None:
    poison = Begun(0, 1.0, 61.0, poison=True)
    stopped = asked(poison, Ended(0, 2.0, WorkerLost.code, "WorkerLost", "giving it up", retryable=False))
    assert (stopped.poison, stopped.poisons, stopped.started, stopped.settled) == ({"stopped": 1}, 1, 0, 0)
    assert asked(poison, Ended(0, 2.0)).poison == {"answered": 1}


def test_causes_and_quantiles() -> None:
    assert (
        cause("the controller at tcp://127.0.0.1:5570 (0123456789abcdef) is silent for 3.0 s")
        == "the controller at # (#) is silent for # s"
    )
    assert [quantile(range(101), share) for share in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 100]
    assert quantile([], 0.5) == 0.0


# --- real processes ----------------------------------------------------------------------------

SMALL = ("--streams", "40", "--workers", "3", "--clients", "2", "--tokens", "60", "--token-delay", "0.02", "--deadline", "30")


def chaos(*arguments: str) -> tuple[int, dict[str, Any], str]:
    """A run: its exit code, its last line, and all that it printed."""
    command = [sys.executable, "-m", "bench", "chaos", *SMALL, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    said = done.stdout + done.stderr
    assert done.stdout, said
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), said


@pytest.mark.heavy
@pytest.mark.timeout(120)
def test_nothing_is_lost_under_chaos() -> None:
    code, figures, said = chaos("--seconds", "11", "--seed", "26")
    assert code == 0, said
    assert figures["ok"]
    assert set(figures["faults"]) == {
        "all controllers killed",
        "controller killed",
        "worker drained",
        "worker killed",
        "worker stopped",
    }
    assert figures["joins"] > 0
    assert figures["share_whole"] >= 0.995


UNMET = {
    "drop": "chunks lost or doubled on the way",
    "duplicate": "chunks lost or doubled on the way",
    "skip": "wrong or duplicated tokens",
    "leak": "slots leaked",
}
"""What a run with this planted bug must complain of."""


@pytest.fixture(scope="module")
def planted() -> dict[str, tuple[int, dict[str, Any], str]]:
    """A run per bug, all at once, without any fault beside it: what fails the run is the bug."""
    with ThreadPoolExecutor(len(UNMET)) as pool:
        runs = {name: pool.submit(chaos, "--seconds", "2", "--tokens", "30", "--plant", name) for name in UNMET}
    return {name: run.result() for name, run in runs.items()}


@pytest.mark.heavy
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", UNMET)
def test_a_planted_bug_fails_the_run(planted: dict[str, tuple[int, dict[str, Any], str]], name: str) -> None:
    code, figures, said = planted[name]
    assert code == 1, said
    assert UNMET[name] in figures["unmet"], said


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_that_ends_early_leaves_no_process_behind(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "bench", "chaos", *SMALL, "--seconds", "60"]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        children: list[psutil.Process] = []

        def all_started() -> bool:
            children[:] = psutil.Process(run.pid).children(recursive=True)
            return len(children) == 3 + 2 + 2

        eventually(all_started, PATIENCE_S, "all processes are there")
        children[0].suspend()  # a stopped one must go, too
        run.send_signal(number)
        run.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(children, timeout=PATIENCE_S)
        assert not alive
    finally:
        run.kill()
        run.wait()


@pytest.mark.heavy
def test_recovery_is_measured_from_the_signal_to_the_next_token() -> None:
    """A killed worker is seen by its broken connection, long before its heartbeats are missed."""
    (worker_s,) = recovery.measured(("mid-stream", "worker", signal.SIGKILL), 1)
    (controller_s,) = recovery.measured(("mid-stream", "controller", signal.SIGKILL), 1)
    assert 0 < worker_s < 10
    assert 0 < controller_s < 10


@pytest.mark.heavy
def test_what_a_full_queue_cannot_take_is_refused_and_the_rest_leaves_nothing() -> None:
    figures = backpressure.crowded(backpressure.SLOTS + 200, 50)
    assert figures["refused"] == 150
    assert figures["other ends"] == []
    assert figures["in flight when all was opened"] == backpressure.SLOTS + 50
    assert figures["in flight at the end"] == 0


@pytest.mark.heavy
def test_stopped_clients_cost_bounded_memory_and_leave_nothing() -> None:
    """Those of the SDK and bare sockets, each kind in a network of its own. `outbox_total_bytes` is 32 MiB, and what libzmq holds for them
    another ten; without that bound it were 75 to 85."""
    with ThreadPoolExecutor(2) as pool:
        runs = {raw: pool.submit(backpressure.stopped, 4, 20, 40, 4.0, raw=raw) for raw in (False, True)}
    for raw, run in runs.items():
        figures = run.result()
        assert figures["above idle, MiB"] < backpressure.MEMORY_MIB, f"raw {raw}"
        assert figures["in flight at the end"] == 0, f"raw {raw}"
