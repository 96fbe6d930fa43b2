"""The units of examples/systemd: what they start comes up with the options that stand there, and ends as docs/deployment.md says."""

from __future__ import annotations

import configparser
import shlex
import signal
from pathlib import Path

import pytest

from zmqserve import Client

from .processes import CAME, Served, ServedController, zmqserve

UNITS = Path(__file__).parents[1] / "examples" / "systemd"
PROGRAM = "/opt/zmqserve/bin/zmqserve"
GATEWAYS = ("tcp://gateway-1:5571", "tcp://gateway-2:5571")


def service(name: str) -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=False, delimiters="=", comment_prefixes="#")
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((UNITS / name).read_text().replace("\\\n", " "))
    return unit["Service"]


def arguments(name: str) -> list[str]:
    program, *options = shlex.split(service(name)["ExecStart"])
    assert program == PROGRAM
    return options


def replaced(options: list[str], changes: dict[str, str]) -> list[str]:
    """Each change is of an option that is there."""
    assert set(changes) <= set(options)
    return [changes.get(option, option) for option in options]


@pytest.mark.heavy
def test_the_units_start_a_controller_and_a_worker_and_stop_them(tmp_path: Path) -> None:
    keys = tmp_path / "curve"
    for command in (("init", str(keys)), ("new", "gpu", "--dir", str(tmp_path)), ("new", "alice", "--dir", str(tmp_path))):
        assert zmqserve("keys", *command).returncode == 0
    for role, name in (("worker", "gpu"), ("client", "alice")):
        assert zmqserve("keys", "allow", str(keys), role, str(tmp_path / f"{name}.key")).returncode == 0
    config = tmp_path / "controller.toml"
    config.write_text((UNITS / "controller.toml").read_text().replace("/etc/zmqserve/curve", str(keys)))
    kind, *serving = replaced(arguments("zmqserve-controller.service"), {"/etc/zmqserve/controller.toml": str(config)})
    assert kind == "controller"
    any_port = "tcp://127.0.0.1:*"
    with ServedController(any_port, any_port, *serving) as one, ServedController(any_port, any_port, *serving) as two:
        changes = dict(zip(GATEWAYS, (one.workers, two.workers), strict=True))
        for path in (tmp_path / "gpu.key_secret", keys / "workers-port.key"):
            changes[f"/etc/zmqserve/{path.name}"] = str(path)
        working = replaced(
            arguments("zmqserve-worker@.service"), changes | {"vllm": "echo", "/srv/models/llama-8b": "x", "%H-gpu%i": "gpu0"}
        )
        with Served(*working) as worker:
            for controller in (one, two):
                controller.wait_for(CAME, worker="gpu0", state="ready")
            alice, port = tmp_path / "alice.key_secret", keys / "clients-port.key"
            with Client([one.clients, two.clients], key=alice, controller_key=port) as client:
                assert client.generate("llama-8b", "a b", max_tokens=2, stream=False).text == "a b"
                assert zmqserve("keys", "revoke", str(keys), "alice").returncode == 0
                one.send(signal.SIGHUP)  # ExecReload
                one.wait_for("keys changed", revoked=["alice"])
            assert worker.end(signal.SIGTERM) == 0
        assert one.end(signal.SIGTERM) == two.end(signal.SIGTERM) == 0


def test_a_stop_has_time_for_what_runs() -> None:
    unit, options = service("zmqserve-worker@.service"), arguments("zmqserve-worker@.service")
    assert int(unit["TimeoutStopSec"]) > int(options[options.index("--grace") + 1])
    assert unit["KillMode"] == "mixed"
