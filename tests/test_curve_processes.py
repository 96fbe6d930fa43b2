"""The command with keys: every verb by options and by environment, exit codes, SIGHUP, `up` and `bridge`."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import zmq

from zmqserve.errors import Unauthenticated

from .keyrings import Keys, usual
from .processes import ANY, PATIENCE_S, Served, ServedController, zmqserve


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return usual(tmp_path)


@contextmanager
def network(keys: Keys) -> Iterator[ServedController]:
    """A controller and an echo worker `w` of the model `m`, both with keys."""
    with ServedController(ANY, ANY, "--curve-dir", str(keys)) as controller:
        with controller.echo("w", *keys.worker_arguments("gpu"), "--slots", "4"):
            controller.wait_ready("w")
            yield controller


@pytest.mark.heavy
def test_every_verb_takes_keys_by_options_and_by_environment(keys: Keys) -> None:
    verbs = (
        ("alice", ["ask", "m", "a b", "--max-tokens", "3"], "a b a\n"),
        ("alice", ["embed", "m", "a"], "[0."),
        ("alice", ["models"], "m "),
        ("boss", ["status"], "w "),
        ("boss", ["drain", "w"], "w is draining"),
    )
    with network(keys) as controller:
        for name, verb, said in verbs[:-1]:
            environment = {"ZMQSERVE_KEY": keys.secret(name), "ZMQSERVE_CONTROLLER_KEY": keys.clients_port}
            for options, env in ((keys.client_arguments(name), {}), ((), environment)):
                done = zmqserve(*verb, "--controller", controller.clients, *options, env=env)
                assert (done.returncode, done.stderr) == (0, "")
                assert said in done.stdout
        name, verb, said = verbs[-1]
        done = zmqserve(*verb, "--controller", controller.clients, *keys.client_arguments(name))
        assert (done.returncode, done.stderr, said in done.stdout) == (0, "", True)


@pytest.mark.parametrize("verb", [["ask", "m", "x"], ["embed", "m", "x"], ["models"], ["status"], ["drain", "w"]])
def test_who_is_not_let_in_is_told_in_one_sentence(keys: Keys, verb: list[str]) -> None:
    with ServedController(ANY, ANY, "--curve-dir", str(keys)) as controller:
        for options, why in ((keys.client_arguments("mallory"), "does not know this key for clients"), ((), "it wants CURVE")):
            done = zmqserve(*verb, "--controller", controller.clients, "--connect-timeout", "20", *options)
            assert (done.returncode, done.stdout) == (3, "")
            assert done.stderr.startswith(f"zmqserve: the controller at {controller.clients} does not let this client in: ")
            assert why in done.stderr
            assert done.stderr.count("\n") == 1


def test_a_secret_key_that_others_can_read_is_refused(keys: Keys) -> None:
    os.chmod(keys.secret("alice"), 0o644)
    done = zmqserve("models", *keys.client_arguments("alice"))
    assert (done.returncode, f"chmod 600 {keys.secret('alice')}" in done.stderr) == (2, True)
    os.chmod(keys.folder / "workers-port.key_secret", 0o644)
    done = zmqserve("controller", "--clients", ANY, "--workers", ANY, "--curve-dir", str(keys))
    assert (done.returncode, done.stderr.startswith("zmqserve: curve_dir: "), "chmod 600" in done.stderr) == (2, True, True)


def test_a_hangup_makes_the_controller_look_at_once(keys: Keys) -> None:
    with network(keys) as controller:
        keys.revoke("alice")
        controller.send(signal.SIGHUP)
        controller.wait_for("keys changed", revoked=["alice"])
        assert zmqserve("models", "--controller", controller.clients, *keys.client_arguments("alice")).returncode == 3
        assert zmqserve("models", "--controller", controller.clients, *keys.client_arguments("boss")).returncode == 0
        assert controller.process.poll() is None


def test_a_worker_whose_key_is_not_allowed_says_so_and_waits(keys: Keys) -> None:
    keys.new("gpu2")
    with ServedController(ANY, ANY, "--curve-dir", str(keys)) as controller:
        with controller.echo("w", *keys.worker_arguments("gpu2")) as worker:
            line = worker.wait_for("registration refused, trying again")
            assert "it does not know this key for workers" in line["why"]
            controller.wait_for("key not allowed", domain="workers", address="127.0.0.1")
            keys.allow("gpu2", "worker")
            controller.wait_ready("w")
    assert sum("registration refused" in line for line in worker.output) == 1


def test_a_worker_takes_its_keys_from_the_environment(keys: Keys) -> None:
    environment = {"ZMQSERVE_KEY": keys.secret("gpu"), "ZMQSERVE_CONTROLLER_KEY": keys.workers_port}
    with ServedController(ANY, ANY, "--curve-dir", str(keys)) as controller:
        with Served("worker", "echo", "--model", "m", "--worker-name", "w", "--controller", controller.workers, env=environment):
            controller.wait_ready("w")


def test_the_settings_may_stand_in_the_file(keys: Keys, tmp_path: Path) -> None:
    above = Keys(tmp_path / "above")
    above.new("site", "worker")
    above.new("root", "admin")
    with ServedController(ANY, ANY, "--curve-dir", str(above)) as parent:
        config = tmp_path / "controller.toml"
        config.write_text(
            f'curve_dir = "{keys}"\nparents = ["{parent.workers}"]\nname = "site"\n'
            f'parent_key = "{above.secret("site")}"\nparent_controller_key = "{above.workers_port}"\n'
        )
        with ServedController(ANY, ANY, "--config", str(config)) as below, below.echo("w", *keys.worker_arguments("gpu")):
            parent.wait_for(("worker came", "worker changed"), worker="site", models=["m"])
            done = zmqserve("ask", "m", "a", "--max-tokens", "1", "--controller", parent.clients, *above.client_arguments("root"))
            assert (done.returncode, done.stdout) == (0, "a\n")


def test_up_gives_its_workers_their_key(keys: Keys) -> None:
    ends = ("--clients", ANY, "--workers", ANY)
    with Served("up", "echo", "--model", "m", *ends, "--curve-dir", str(keys), "--key", keys.secret("gpu")) as both:
        clients = both.wait_for("controller up")["clients"][0]
        both.wait_for(("worker came", "worker changed"), state="ready")
        done = zmqserve("ask", "m", "a", "--max-tokens", "1", "--controller", clients, *keys.client_arguments("alice"))
        assert (done.returncode, done.stdout) == (0, "a\n")
        assert both.end() == 0
    done = zmqserve("up", "echo", "--model", "m", "--curve-dir", str(keys))
    assert (done.returncode, "--curve-dir and --key go together" in done.stderr) == (2, True)


def test_a_bridge_has_a_key_and_its_jobs_wait_while_that_is_not_allowed(keys: Keys, tmp_path: Path) -> None:
    ends = (f"ipc://{tmp_path}/jobs", f"ipc://{tmp_path}/results")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    push, pull = context.socket(zmq.PUSH), context.socket(zmq.PULL)
    push.bind(ends[0])
    pull.bind(ends[1])
    try:
        with network(keys) as controller:
            options = ("--pull", ends[0], "--push", ends[1], "--controller", controller.clients, *keys.client_arguments("mallory"))
            with Served("bridge", *options) as bridge:
                push.send(msgspec.json.encode({"id": 1, "model": "m", "prompt": "a b", "params": {"max_tokens": 2}}))
                waits = bridge.wait_for("jobs wait")
                assert waits["error"] == Unauthenticated.__name__
                keys.allow("mallory", "client")
                assert pull.poll(int(PATIENCE_S * 1000))
                assert msgspec.json.decode(pull.recv())["text"] == "a b"
                assert bridge.end() == 0
    finally:
        push.close(linger=0)
        pull.close(linger=0)
        context.term()
