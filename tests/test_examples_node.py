"""The client in Node, written from PROTOCOL.md alone, with our worker and with the one in Node, over a real controller."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from zmqserve import Client

from .nodes import FOLDER, LONG, NODE, WORDS, answer, ask, asking, error, last_line, needs_node, node_worker, running_on
from .processes import PATIENCE_S, ServedController, eventually
from .test_failures import proxied

pytestmark = needs_node
VECTORS = Path(__file__).parent / "vectors" / "v1.json"


@pytest.fixture(scope="module")
def ours() -> Iterator[ServedController]:
    """A controller with our echo worker of one slot: model m, 10 ms a token."""
    with ServedController() as controller, controller.echo("w", "--slots", "1", "--delay-per-token", "0.01"):
        controller.wait_ready("w")
        yield controller


@pytest.fixture(scope="module")
def theirs() -> Iterator[ServedController]:
    """A controller with a worker in Node of two slots: model m, 10 ms a token."""
    with ServedController() as controller, node_worker(controller, "nw", "--slots", 2, "--step-ms", 10):
        yield controller


@pytest.fixture(scope="module", params=["our worker", "their worker"])
def either(request: pytest.FixtureRequest) -> ServedController:
    controller: ServedController = request.getfixturevalue("ours" if request.param == "our worker" else "theirs")
    return controller


def vectors_mjs(file: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NODE or "", "vectors.mjs", str(file)], cwd=FOLDER, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


def test_every_golden_message_is_read_and_written_again() -> None:
    done = vectors_mjs(VECTORS)
    assert done.returncode == 0, done.stdout + done.stderr
    golden, count = json.loads(VECTORS.read_text()), json.loads(done.stdout)
    assert count["read"] + count["maps, read inside other messages"] == len(golden["messages"])
    assert count["exact"] + count["equivalent"] == count["read"] >= 82
    assert count["exact"] >= 69
    assert count["MORE heads"] == len(golden["more_heads"])


def test_a_changed_golden_message_is_noticed(tmp_path: Path) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(VECTORS.read_text().replace('"rid": 9223372036854775807', '"rid": 9223372036854775806', 1))
    assert vectors_mjs(changed).returncode == 1


def test_a_streamed_answer_is_exact(either: ServedController) -> None:
    code, lines = ask(either.clients, "generate", {"model": "m", "prompt": WORDS})
    assert code == 0
    *chunks, done = lines
    assert "".join(chunk["text"] for chunk in chunks) == WORDS
    assert [chunk["seq"] for chunk in chunks] == list(range(7))
    assert [chunk["fingerprint"] is not None for chunk in chunks] == [True] + [False] * 6
    assert [token for chunk in chunks for token in chunk["token_ids"]] == list(range(7))
    assert (done["finish_reasons"], done["usage"]["completion_tokens"]) == (["stop"], 7)


def test_an_answer_that_is_not_streamed_is_the_same(either: ServedController) -> None:
    reply = answer(either.clients, "ask", prompt=WORDS, params={"max_tokens": 3})
    assert [(choice["text"], choice["finish_reason"]) for choice in reply["choices"]] == [("one two three", "length")]


def test_integers_over_32_bits_are_integers(either: ServedController) -> None:
    assert answer(either.clients, "ask", prompt="a", deadline_ms=2**40, params={"seed": 2**40})["choices"][0]["text"] == "a"


def test_a_cancelled_stream_ends_and_frees_its_slot(either: ServedController) -> None:
    code, lines = ask(either.clients, "generate", {"model": "m", "prompt": LONG}, "--cancel-after", 3)
    assert code == 0
    assert lines[-1]["finish_reasons"] == ["cancelled"]
    assert 4 <= len(lines) < 100
    with Client(either.clients) as client:
        assert running_on(client) == 0
        assert client.generate("m", "a b").text() == "a b"


def test_what_is_asked_without_a_stream_is_cancelled_too(ours: ServedController) -> None:
    with asking(ours.clients, "ask", {"prompt": LONG}) as process, Client(ours.clients) as client:
        eventually(lambda: running_on(client) == 1, PATIENCE_S, "the request runs")
        process.send_signal(signal.SIGINT)
        assert last_line(process)["choices"][0]["finish_reason"] == "cancelled"
        assert running_on(client) == 0


def test_errors_are_typed_and_carry_data(either: ServedController) -> None:
    unknown = error(either.clients, "generate", model="nobody", prompt="a")
    assert (unknown["error"], unknown["code"], unknown["retryable"]) == ("UnknownModel", 40301, False)
    assert unknown["data"] == {"model": "nobody", "known_models": ["m"]}
    refused = error(either.clients, "generate", prompt="a", params={"guided": {"regex": "a"}})
    assert (refused["error"], refused["data"]["parameter"]) == ("Unsupported", "guided")
    wrong = error(either.clients, "generate", prompt="a", params={"temprature": 0})
    assert (wrong["error"], wrong["data"]["parameter"]) == ("InvalidParameter", "temprature")
    late = error(either.clients, "generate", prompt=LONG, deadline_ms=200)
    assert (late["error"], late["code"]) == ("DeadlineExceeded", 40801)


def test_vectors_are_those_of_our_client(either: ServedController) -> None:
    texts = ["a", "ünïcode", "🎈 more"]
    embedded = answer(either.clients, "embed", texts=texts)
    with Client(either.clients) as client:
        mine = client.embed("m", texts)
    assert mine.dtype == np.float32
    assert np.array_equal(np.array(embedded["vectors"], dtype=np.float32), mine)


def test_models_and_tokens_are_told(either: ServedController) -> None:
    assert [served["card"]["name"] for served in answer(either.clients, "models")] == ["m"]
    assert answer(either.clients, "countTokens", prompt=WORDS)["count"] == 7
    assert answer(either.clients, "modelDetails")["embedding_dim"] > 0
    assert answer(either.clients, "generate", messages=[{"role": "user", "content": "a b"}])["usage"]["completion_tokens"] == 2


@pytest.mark.heavy  # more than its ttl
def test_a_request_lives_longer_than_the_clients_ttl_and_dies_with_the_client(ours: ServedController) -> None:
    request, endless = ({"prompt": LONG, "params": {"max_tokens": tokens}} for tokens in (400, 8000))
    with asking(ours.clients, "generate", request, "--ttl-ms", 1500) as process:
        assert last_line(process)["finish_reasons"] == ["length"]  # after 4 s at the least, all on Pings
    with asking(ours.clients, "generate", endless, "--ttl-ms", 1500) as process, Client(ours.clients) as client:
        eventually(lambda: running_on(client) == 1, PATIENCE_S, "the request runs")
        process.send_signal(signal.SIGSTOP)  # its connection stays, and it is silent
        eventually(lambda: running_on(client) == 0, PATIENCE_S, "it was given up")  # its tokens take 80 s
        process.send_signal(signal.SIGCONT)


@pytest.mark.heavy  # waits for what a silent controller declared
def test_a_silent_controller_and_one_that_never_was_are_told_apart() -> None:
    with ServedController() as controller, controller.echo("w", "--delay-per-token", "0.01"):
        controller.wait_ready("w")
        with asking(controller.clients, "generate", {"prompt": LONG}) as process:
            with Client(controller.clients) as client:
                eventually(lambda: running_on(client) == 1, PATIENCE_S, "the request runs")
            controller.send(signal.SIGSTOP)
            lost = last_line(process)
        assert (lost["error"], lost["retryable"]) == ("ControllerLost", True)
        controller.end(signal.SIGKILL)
        never = error(controller.clients, "generate", prompt="a")
        assert (never["error"], never["retryable"]) == ("ControllerUnreachable", True)


def test_a_connection_that_breaks_ends_its_requests_at_once() -> None:
    with ServedController() as controller, controller.echo("w", "--delay-per-token", "0.01"):
        controller.wait_ready("w")
        with asking(controller.clients, "generate", {"prompt": LONG}) as process:
            with Client(controller.clients) as client:
                eventually(lambda: running_on(client) == 1, PATIENCE_S, "the request runs")
            controller.end(signal.SIGKILL)
            assert last_line(process)["error"] == "ControllerLost"


def test_a_client_behind_a_proxy(theirs: ServedController) -> None:
    with proxied(theirs.clients) as endpoint:
        code, lines = ask(endpoint, "generate", {"model": "m", "prompt": WORDS})
        assert code == 0
        assert "".join(chunk["text"] for chunk in lines[:-1]) == WORDS
