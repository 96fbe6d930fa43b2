"""What other machines may reach is served with CURVE, or knowingly without."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from zmqserve import Bridge, Controller
from zmqserve.curve import is_exposed
from zmqserve.errors import InvalidEndpoint

from .processes import Served, zmqserve

LOCAL = [
    "tcp://127.0.0.1:5570",
    "tcp://127.0.0.1:*",
    "tcp://127.8.9.10:0",
    "tcp://[::1]:5570",
    "tcp://[::ffff:127.0.0.1]:*",
    "tcp://localhost:5570",
    "tcp://LOCALHOST:5570",
    "ipc:///run/z.ipc",
    "ipc://relative",
    "inproc://clients",
]
OPEN = [
    "tcp://*:5570",
    "tcp://0.0.0.0:5570",
    "tcp://[::]:5570",
    "tcp://10.0.0.1:*",
    "tcp://[fe80::1%eth0]:1",
    "tcp://[::ffff:10.0.0.1]:1",
    "tcp://[2001:db8::1]:5570",
    "tcp://lo:5570",
    "tcp://eth0:5570",
    "tcp://host.example:5570",
    "tcp://localhost.example:5570",
    "tcp://127.1:5570",
    "tcp://2130706433:5570",
    "tcp://127.0.0.1.example:5570",
    "tcp://0:5570",
]
ANY = "tcp://127.0.0.1:*"


@pytest.mark.parametrize("endpoint", LOCAL)
def test_what_stays_on_this_machine_needs_no_keys(endpoint: str) -> None:
    assert not is_exposed(endpoint)


@pytest.mark.parametrize("endpoint", OPEN)
@pytest.mark.parametrize("side", ["clients", "workers"])
def test_anything_else_is_refused_without_them(endpoint: str, side: str) -> None:
    settings: dict[str, Any] = {"clients": [ANY], "workers": [ANY], side: [ANY, endpoint]}
    controller = Controller(**settings)
    with pytest.raises(InvalidEndpoint, match="other machines may reach it") as caught:
        controller.bind()
    assert "--curve-dir" in caught.value.message
    assert caught.value.data["endpoint"] == endpoint
    assert (controller.client_endpoints, controller.worker_endpoints) == ([], [])


def test_a_localhost_that_means_another_machine_is_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*addresses: str) -> bool:
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: [(0, 0, 0, "", (address, 0)) for address in addresses])
        return is_exposed("tcp://localhost:5570")

    assert not resolved("127.0.0.1", "::1")
    assert resolved("127.0.0.1", "192.0.2.1")
    assert resolved()


def test_insecure_is_said_at_every_start() -> None:
    said: list[tuple[str, dict[str, Any]]] = []
    settings: dict[str, Any] = {"clients": ["tcp://0.0.0.0:*"], "workers": [ANY], "insecure": True}
    controller = Controller(**settings, report=lambda event, **fields: said.append((event, fields)))
    for _ in range(2):
        with controller:
            pass
    told = [fields for event, fields in said if event == "insecure"]
    assert [(fields["level"], fields["endpoints"]) for fields in told] == [("warning", ["tcp://0.0.0.0:*"])] * 2


def test_what_is_not_exposed_is_not_called_insecure() -> None:
    said: list[str] = []
    with Controller(clients=[ANY], workers=[ANY], insecure=True, report=lambda event, **_: said.append(event)):
        pass
    assert "insecure" not in said


def test_the_command_refuses_in_one_sentence() -> None:
    done = zmqserve("controller", "--clients", "tcp://*:*", "--workers", ANY)
    assert done.returncode == 2
    assert done.stderr.startswith("zmqserve: 'tcp://*:*' is not a usable endpoint: other machines may reach it")
    assert done.stderr.count("\n") == 1
    with Served("controller", "--clients", "tcp://*:*", "--workers", ANY, "--insecure") as controller:
        assert controller.wait_for("insecure")["endpoints"] == ["tcp://*:*"]
        controller.wait_for("controller up")


@pytest.mark.parametrize("end", ["pull", "push"])
def test_a_bridge_binds_nothing_open_either(end: str) -> None:
    settings: dict[str, Any] = {"pull": ANY, "push": ANY, "bind_pull": True, "bind_push": True, end: "tcp://0.0.0.0:*"}
    with pytest.raises(InvalidEndpoint, match="other machines may reach it"):
        Bridge(**settings)
    with Bridge(**settings, insecure=True) as bridge:
        bridge.stop(0)
    Bridge(pull="tcp://10.0.0.1:1", push="tcp://10.0.0.1:2")  # to connect exposes nothing
