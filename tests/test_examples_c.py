"""The client in C, written from PROTOCOL.md alone: built with every warning an error, asked of a real controller with an echo worker."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgpack
import pytest
import zmq

from zmqserve import Client

from .processes import PATIENCE_S, ServedController, eventually, network
from .test_failures import proxied

MAKEFILE = Path(__file__).parents[1] / "examples" / "c" / "Makefile"
SANITIZE = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"
ANSWERED, FAILED, WRONG_USE, NO_CONTROLLER, TRY_LATER = range(5)
"""What the README says of each exit status."""


def missing() -> str | None:
    """What building it lacks, or None."""
    tools = [tool for tool in ("cc", "make", "pkg-config") if shutil.which(tool) is None]
    if tools:
        return f"{' and '.join(tools)} not installed"
    found = [not subprocess.run(["pkg-config", "--exists", name], check=False).returncode for name in ("libzmq", "msgpack", "msgpack-c")]
    if not (found[0] and any(found[1:])):
        return "the headers of libzmq or of msgpack-c are not installed"
    return None


LACKS = missing()
pytestmark = pytest.mark.skipif(LACKS is not None, reason=f"{LACKS}: `scripts/setup.sh test` as root installs it, or says what to install")


def make(folder: Path, cflags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-f", str(MAKEFILE), f"CFLAGS={cflags}"], cwd=folder, capture_output=True, text=True, check=False)


def can_sanitize(folder: Path) -> bool:
    """Whether programs with the sanitizers can be built and run here."""
    source = folder / "nothing.c"
    source.write_text("int main(void) { return 0; }\n")
    try:
        subprocess.run(["cc", *SANITIZE.split(), str(source), "-o", str(folder / "nothing")], capture_output=True, check=True)
        return subprocess.run([folder / "nothing"], capture_output=True, check=False).returncode == 0
    except subprocess.CalledProcessError:
        return False


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, with the sanitizers where there are any."""
    folder = tmp_path_factory.mktemp("ask")
    built = make(folder, SANITIZE if can_sanitize(folder) else "-g")
    assert built.returncode == 0, built.stderr
    return folder / "ask"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedController]:
    with network("w") as (controller, _):
        yield controller


def ask(program: Path, *arguments: str, prompt: bytes = b"") -> tuple[int, str, str]:
    """Exit status, answer and what is said besides."""
    done = subprocess.run([program, *arguments], input=prompt, capture_output=True, timeout=PATIENCE_S, check=False)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_it_builds_optimised_without_a_warning(tmp_path: Path) -> None:
    built = make(tmp_path, "-O2")
    assert (built.returncode, built.stderr) == (0, "")
    assert "-Wall -Wextra -Werror" in built.stdout


def test_it_knows_every_code_that_is_sent() -> None:
    page = (MAKEFILE.parents[2] / "PROTOCOL.md").read_text()
    unsent = re.findall(r"\d{5}", page[page.index("\n40000 and 40103 come in Refused only. ") :].split(" are not sent")[0])[2:]
    sent = [row for row in re.findall(r"^\| (\d{5}) \| (\w+) \|.*\| (?:yes|no) \|$", page, re.MULTILINE) if row[0] not in unsent]
    assert re.findall(r'\{(\d{5}), "(\w+)"\}', (MAKEFILE.parent / "ask.c").read_text()) == sent


def test_an_answer_goes_to_standard_output_and_its_figures_beside_it(program: Path, served: ServedController) -> None:
    status, answer, said = ask(program, "-e", served.clients, "-n", "5", "m", "a b c")
    assert (status, answer) == (ANSWERED, "a b c a b\n")
    assert said.startswith("ask: 3 + 5 tokens, finish reason length, from w after ")


def test_a_model_that_nobody_serves_is_a_typed_error_in_one_line(program: Path, served: ServedController) -> None:
    status, answer, said = ask(program, "-e", served.clients, "nobody", "hello")
    assert (status, answer) == (FAILED, "")
    assert said == "ask: 40301 UnknownModel: no worker serves model 'nobody'; known: m\n"


def test_what_the_worker_refuses_is_named(program: Path, served: ServedController) -> None:
    status, _, said = ask(program, "-e", served.clients, "m", prompt=b"")
    assert (status, said.count("\n")) == (FAILED, 1)
    assert said.startswith("ask: 40302 InvalidParameter: prompt is empty")
    status, _, said = ask(program, "-e", served.clients, "m", prompt=b"not \xff UTF-8")
    assert (status, said[:27]) == (FAILED, "ask: 40001 MalformedMessage")


def test_a_long_prompt_in_many_scripts_comes_back_to_the_byte(program: Path, served: ServedController) -> None:
    """Echo repeats its prompt, here 1.4 MB of one to four bytes a character: texts of msgpack's longest kind, both ways."""
    prompt = "zażółć gęślą jaźń 語言模型 👩🏽‍🔬 e\u0301 " * 20_000 + "end"
    status, answer, said = ask(program, "-e", served.clients, "m", prompt=prompt.encode())
    assert (status, answer) == (ANSWERED, prompt + "\n"), said


def test_an_answer_comes_through_proxies(program: Path, served: ServedController) -> None:
    with proxied(served.clients) as near, proxied(near) as far:
        status, answer, said = ask(program, "-e", far, "m", "by way of two proxies")
        assert (status, answer) == (ANSWERED, "by way of two proxies\n"), said


def test_the_deadline_is_the_networks_to_keep(program: Path) -> None:
    with network("w", worker_arguments=("--delay-first", "30")) as (controller, _):
        status, answer, said = ask(program, "-e", controller.clients, "-t", "0.3", "m", "too late")
    assert (status, answer) == (FAILED, "")
    assert said.startswith("ask: 40801 DeadlineExceeded: ")


def test_without_a_controller_it_says_so_in_one_sentence(program: Path) -> None:
    status, answer, said = ask(program, "-e", "ipc:///nobody/is/here", "m", "hello")
    assert (status, answer) == (NO_CONTROLLER, "")
    assert said == "ask: no controller at ipc:///nobody/is/here: nothing answered for 3 s\n"


def test_a_controller_that_stops_answering_is_found_out(program: Path) -> None:
    """It dies while the worker works, so no answer comes: the receive timeout ends the wait."""
    with network("w", worker_arguments=("--delay-first", "30")) as (controller, _), Client(controller.clients) as client:
        asking = subprocess.Popen([program, "-e", controller.clients, "-t", "1", "m", "hello"], stderr=subprocess.PIPE, text=True)
        eventually(lambda: client.status().running == 1, PATIENCE_S, "the request runs")
        controller.end(signal.SIGKILL)
        _, said = asking.communicate(timeout=PATIENCE_S)
    assert asking.returncode == NO_CONTROLLER
    assert said == f"ask: no answer from {controller.clients} until 2 s after the deadline: the controller is gone\n"


def test_a_controller_that_leaves_says_so(program: Path) -> None:
    with network("w", worker_arguments=("--delay-first", "30")) as (controller, _), Client(controller.clients) as client:
        asking = subprocess.Popen([program, "-e", controller.clients, "m", "hello"], stderr=subprocess.PIPE, text=True)
        eventually(lambda: client.status().running == 1, PATIENCE_S, "the request runs")
        controller.end(signal.SIGTERM)
        _, said = asking.communicate(timeout=PATIENCE_S)
    assert (asking.returncode, said) == (TRY_LATER, "ask: the controller is leaving: the controller is shutting down\n")


def test_an_error_that_may_pass_is_told_apart(program: Path) -> None:
    with ServedController() as controller:
        status, _, said = ask(program, "-e", controller.clients, "m", "hello")
    assert status == TRY_LATER
    assert said == "ask: 50005 NoWorker: no worker serves model 'm': none has registered yet (try again in 1000 ms)\n"


WRONG = [[], ["m", "a", "b"], ["-t", "soon", "m", "a"], ["-t", "nan", "m", "a"], ["-n", "-1", "m", "a"], ["-x", "m", "a"]]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_use_is_explained(program: Path, arguments: list[str]) -> None:
    status, answer, said = ask(program, *arguments)
    assert (status, answer) == (WRONG_USE, "")
    assert said.splitlines()[-1].startswith("ask: usage: ask [-e ENDPOINT]")


def test_an_endpoint_that_is_none_is_named(program: Path) -> None:
    assert ask(program, "-e", "tcp//x", "m", "a") == (WRONG_USE, "", "ask: 'tcp//x' is not an endpoint: Invalid argument\n")


def test_an_answer_that_is_none_is_said_to_be_none(program: Path) -> None:
    """Bytes that no controller sends, and a Reply to another request: nothing of them is printed as an answer."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context, context.socket(zmq.ROUTER) as controller:
        controller.setsockopt(zmq.LINGER, 0)
        controller.setsockopt(zmq.RCVTIMEO, int(PATIENCE_S * 1000))
        endpoint = f"tcp://127.0.0.1:{controller.bind_to_random_port('tcp://127.0.0.1')}"
        reply = [39, 1, [["a lie", b"", "stop"]], [1, 1], ["w"]]
        reply_cut = msgpack.packb(reply)[:-1]
        arrays: tuple[object, ...] = [], 7, {}, [39], [38, 1, 0], reply, ["39", 1], [47, "new"]
        for said in (b"", b"\xc1", reply_cut, *map(msgpack.packb, arrays)):
            asking = subprocess.Popen([program, "-e", endpoint, "m", "hello"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            *envelope, _ = controller.recv_multipart()
            controller.send_multipart([*envelope, said])
            answer, why = asking.communicate(timeout=PATIENCE_S)
            assert (asking.returncode, answer, why.count("\n")) == (FAILED, "", 1), (said, why)
            assert why.startswith("ask: the answer is no"), why
