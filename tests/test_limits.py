"""docs/limits.md says what the code does: each limit with its setting and default, and what becomes of who goes over it."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import msgspec
import pytest

from zmqserve import messages as m
from zmqserve.broker import CONTROL_BYTES
from zmqserve.config import ControllerConfig
from zmqserve.errors import BY_CODE
from zmqserve.memory import SHARE
from zmqserve.rules import ClientRules

from .fakes.keys import ALICE, access
from .fakes.network import Network, card
from .fakes.scripted import ScriptedClient, ScriptedWorker

PAGE = (Path(__file__).parents[1] / "docs" / "limits.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")][1:]
IN_RULES = "access.toml: "
NO_LIMITS = {"busy_poll_us", "ttl_s", "orphan_grace_s", "drain_grace_s", "seed"}
"""Numbers among the settings that bound nothing of a peer's."""


def code(cell: str) -> str:
    return cell.strip("`")


def value_of(setting: str) -> Any:
    """What the code has for a setting or constant."""
    if setting.startswith(IN_RULES):
        return getattr(ClientRules(), setting.removeprefix(IN_RULES))
    module, dot, name = setting.rpartition(".")
    return getattr(import_module(f"zmqserve.{module}"), name) if dot else getattr(ControllerConfig(), setting)


def told(cell: str) -> float | None:
    """A number with its unit; sizes and times in bytes and seconds (or what the setting's name says)."""
    if cell == "none":
        return None
    number, _, unit = cell.partition(" ")
    return float(number) * {"MiB": 2**20, "GiB": 2**30}.get(unit, 1)


@pytest.mark.parametrize("row", [row for row in ROWS if row[1] not in ("none", "`memory_bytes`")], ids=lambda row: code(row[1]))
def test_a_default_is_the_codes(row: list[str]) -> None:
    assert told(row[2]) == value_of(code(row[1]))


def test_the_share_of_memory_is_the_codes() -> None:
    (row,) = (row for row in ROWS if row[1] == "`memory_bytes`")
    assert ControllerConfig().memory_bytes is None
    assert f"{SHARE:.0%}".replace("%", " %") in row[2]


def test_every_number_among_the_settings_is_listed() -> None:
    numbers = {name for name in ControllerConfig.__struct_fields__ if isinstance(getattr(ControllerConfig(), name), int | float)}
    numbers |= {f"{IN_RULES}{name}" for name in ClientRules.__struct_fields__ if name not in ("allow", "deny")}
    numbers = {name for name in numbers if not isinstance(getattr(ControllerConfig(), name, 0), bool)}
    listed = {code(row[1]) for row in ROWS}
    assert numbers - NO_LIMITS <= listed | {"memory_bytes"}
    assert len(ROWS) == len({tuple(row[:2]) for row in ROWS})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_an_error_that_is_named_has_that_code(row: list[str]) -> None:
    assert len(row) == 5
    for name, number in re.findall(r"\b([A-Z]\w+) (\d{5})\b", row[3]):
        assert BY_CODE[int(number)].__name__ == name


# --- each limit, gone over


def over(bound: str, **settings: Any) -> Network:
    return Network(**{bound: 2, **settings})


def fill(network: Network, client: ScriptedClient, count: int = 9, **fields: Any) -> None:
    for rid in range(1, count + 1):
        client.generate(rid, **fields)


def queue(bound: str) -> Network:
    network = over(bound)
    network.worker()
    fill(network, network.client())
    return network


def request_bytes(bound: str) -> Network:
    network = over(bound, request_bytes=100)
    network.worker()
    network.client().generate(1, prompt="x" * 100)
    return network


def waiting_bytes(bound: str) -> Network:
    network = over(bound, **{bound: 100})
    network.worker()
    fill(network, network.client())
    return network


def many_clients(bound: str) -> Network:
    network = over(bound)
    network.worker(slots=9)
    for _ in range(4):
        network.client().generate(1)
    return network


def of_a_key(bound: str) -> Network:
    rules = {"requests_in_flight": 1, "requests_per_s": 1, "tokens_per_s": 1, "priority": 0}
    network = Network(access=access(f"[keys.alice]\n{bound} = {rules[bound]}"))
    worker = network.worker(slots=9)
    client = network.client(user=ALICE)
    fill(network, client, 2, priority=-1 if bound == "priority" else 0)
    if bound == "tokens_per_s":
        worker.task(1).first()
        worker.task(1).first()
        worker.task(1).done()
        client.generate(3)
    return network


def many_workers(bound: str) -> Network:
    network = over(bound)
    for number in range(4):
        network.worker(f"w{number}", card(f"m{number}"))
    return network


def large_offer(bound: str) -> Network:
    network = over(bound)
    network.worker("w", card("a", aliases=["b"]), card("c"), slots=3)
    return network


def often(bound: str) -> Network:
    network = over(bound)
    worker = network.worker()
    for _ in range(50):
        worker.ready(0)
    return network


def slow_reader(_: str) -> Network:
    network = Network()
    worker, client = network.worker(), network.client()
    client.generate(1)
    network.full.add(client.envelope[0])
    worker.task(1).first()
    return network


def said(payload: bytes) -> Callable[[str], Network]:
    def say(_: str) -> Network:
        network = Network()
        network.worker()
        network.client().send(payload)
        return network

    return say


def bad_offer(_: str) -> Network:
    network = Network()
    network.worker("w", card("m", aliases=[f"a{number}" for number in range(m.MAX_LISTED + 1)]))
    return network


def late(_: str) -> Network:
    network = Network(default_deadline_s=1.0)
    worker, client = network.worker(ttl_ms=60_000), network.client()
    for rid in (1, 2):
        client.generate(rid)
    network.advance(3.0)
    worker.task(1).done()
    return network


def killer(_bound: str) -> Network:
    network = over("max_attempts")
    for name in ("one", "two"):
        network.worker(name)
    network.client().generate(1)
    for _ in range(2):
        for worker in list(network.workers.values()):
            if worker.tasks:
                worker.die()
                network.broker.members.disconnected(network.now)
                network.advance(0.1)
    return network


def stubborn(_: str) -> Network:
    network = Network(cancel_timeout_s=1.0)
    network.worker(ttl_ms=60_000)
    client = network.client()
    client.generate(1)
    client.cancel(1)
    network.advance(2.0)
    return network


def hung(_: str) -> Network:
    network = Network(stall_s=1.0)
    network.worker().load(running=1, yours=0, step_age_ms=1500)
    return network


LONG = "x" * (m.MAX_NAME + 1)
WAYS: dict[str, Callable[[str], Network]] = {
    "request_bytes": request_bytes,
    **dict.fromkeys(("queue_requests", "client_requests", "total_requests"), queue),
    **dict.fromkeys(("queue_bytes", "client_bytes", "total_bytes"), waiting_bytes),
    "max_clients": many_clients,
    **{f"{IN_RULES}{name}": of_a_key for name in ("requests_in_flight", "requests_per_s", "tokens_per_s", "priority")},
    f"{IN_RULES}burst": lambda _: of_a_key("requests_per_s"),
    **dict.fromkeys(("max_workers", "max_models"), many_workers),
    **dict.fromkeys(("worker_models", "worker_slots", "ready_bytes"), large_offer),
    "readies_per_s": often,
    "outbox_bytes": slow_reader,
    "broker.CONTROL_BYTES": said(m.encode(m.ListModels(1)) + b"\0" * CONTROL_BYTES),
    "messages.MAX_NAME": said(m.encode(m.Generate(1, LONG, prompt="hi"))),
    "messages.MAX_PINGED": said(m.encode((10, 3000, [1] * (m.MAX_PINGED + 1)))),
    "none": said(b"\x91" * 100_000),
    "messages.MAX_LISTED": bad_offer,
    "default_deadline_s": late,
    "max_attempts": killer,
    "cancel_timeout_s": stubborn,
    "stall_s": hung,
}
AT_THE_RIM = {"outbox_total_bytes", "handshakes_per_s", "relay.MAX_ENVELOPE", "relay.MAX_ROUTING_ID", "relay.MOST_FRAMES"}
"""Over these one goes with sockets: tests/test_outboxes.py, test_relay.py and test_curve.py do."""
COUNTED = [row for row in ROWS if row[4] and code(row[1]) not in AT_THE_RIM]


@pytest.mark.parametrize("row", COUNTED, ids=lambda row: f"{code(row[1])}, {row[0]}")
def test_going_over_it_is_counted_under_that_name_and_answered_with_that_error(row: list[str]) -> None:
    setting, counter = code(row[1]), code(row[4])
    bound = setting.removeprefix(IN_RULES)
    network = WAYS[setting](bound)
    assert network.counters[counter] > 0, dict(network.counters)
    network.check()
    errors: list[m.Error | m.Refused] = []
    errors += [message for client in network.clients.values() for message in client.got if isinstance(message, m.Error)]
    errors += [refused for worker in network.workers.values() for refused in refusals(worker)]
    named = {int(number) for number in re.findall(r"\b\d{5}\b", row[3])}
    assert {error.code for error in errors} == named
    for error in errors:
        retry = error.retry_after_ms
        assert (retry is not None) is ("42" in str(error.code)[:2] and error.code != 42904)
        if isinstance(error, m.Error) and counter.startswith("over limit"):
            assert f"over limit: {error.data['bound']}" == counter
            assert error.data["limit"]


def refusals(worker: ScriptedWorker) -> list[m.Refused]:
    return [msgspec.msgpack.decode(payload, type=m.Refused) for head, payload in worker.got if head.kind == m.REFUSED]


@pytest.mark.parametrize("field", ["affinity", "trace", "fingerprint"])
def test_each_name_in_a_request_is_bounded(field: str) -> None:
    network = said(m.encode(msgspec.structs.replace(m.Generate(1, "m", prompt="hi"), **{field: LONG})))("")
    (client,) = network.clients.values()
    assert (client.got[0].code, client.got[0].rid) == (40001, 1)
    assert field in client.got[0].message


def test_a_workers_name_is_bounded() -> None:
    network = Network()
    (refused,) = refusals(network.worker(LONG))
    assert refused.code == 40001
