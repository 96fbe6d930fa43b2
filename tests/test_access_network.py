"""Roles, rules and quotas by real sockets and keys: what one key is refused, another gets at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from zmqserve import (
    Client,
    Controller,
    PermissionDenied,
    QuotaExceeded,
    RateLimited,
    UnknownModel,
    WorkerConfig,
)
from zmqserve.backends.echo import EchoWorker
from zmqserve.errors import InvalidParameter, Refused
from zmqserve.keyring import Changes, Keyring

from .fakes.raw import RawWorker
from .keyrings import Keys
from .processes import PATIENCE_S, eventually

ANY = "tcp://127.0.0.1:*"
WORDS = " ".join(f"word{number}" for number in range(50))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """A controller's folder that allows alice, bob (clients), boss (an admin), gpu and gpu2 (workers)."""
    made = Keys(tmp_path)
    for name, role in (("alice", "client"), ("bob", "client"), ("boss", "admin"), ("gpu", "worker"), ("gpu2", "worker")):
        made.new(name, role)
    return made


def write(keys: Keys, rules: str) -> None:
    path = keys.folder / "access.toml"
    path.write_text(rules)
    path.chmod(0o600)


@contextmanager
def served(keys: Keys, rules: str = "", *models: str, **settings: Any) -> Iterator[Controller]:
    """A controller with these rules, and an echo worker of each model with gpu's key."""
    write(keys, rules)
    with ExitStack() as stack:
        controller = stack.enter_context(Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys), **settings))
        for model in models or ("m",):
            stack.enter_context(echo(keys, "gpu", controller, model))
        yield controller


@contextmanager
def echo(keys: Keys, key: str, controller: Controller, model: str, wait: bool = True) -> Iterator[EchoWorker]:
    config = WorkerConfig(model=model, name=f"{key}-{model}", controllers=(controller.worker_endpoints[0],), **keys.as_worker(key))
    with EchoWorker(config, delay_per_token_s=0.01) as worker:
        if wait:
            worker.wait_ready(PATIENCE_S)
        yield worker


@contextmanager
def client_of(keys: Keys, name: str, controller: Controller) -> Iterator[Client]:
    with Client(controller.client_endpoints[0], **keys.as_client(name)) as client:
        yield client


def test_each_key_has_its_models_and_verbs(keys: Keys) -> None:
    rules = "[keys.alice]\nallow = ['open:*']\ndeny = ['*:chat']"
    with served(keys, rules, "open", "secret") as controller, client_of(keys, "alice", controller) as alice:
        assert alice.generate("open", "hello", stream=False).text == "hello"
        for ask in (
            lambda: alice.generate("secret", "hello", stream=False),
            lambda: alice.generate("nothing", "hello", stream=False),
            lambda: alice.chat("open", [{"role": "user", "content": "hi"}], stream=False),
            lambda: alice.count_tokens("secret", "hello"),
            lambda: alice.drain_worker("gpu-open"),
        ):
            with pytest.raises(PermissionDenied):
                ask()
        assert [model.name for model in alice.models()] == ["open"]
        with client_of(keys, "bob", controller) as bob, client_of(keys, "boss", controller) as boss:
            assert bob.generate("secret", "hello", stream=False).text == "hello"
            assert bob.chat("open", [{"role": "user", "content": "hi"}], stream=False).text
            with pytest.raises(UnknownModel) as unknown:
                bob.generate("nothing", "hello", stream=False)
            assert unknown.value.known_models == ["open", "secret"]
            assert boss.status().counters["errors: PermissionDenied"] == 5
            assert {worker.key for worker in boss.status().workers} == {"gpu"}
            assert (bob.status().counters, bob.status().key) == ({}, "bob")
            assert boss.drain_worker("gpu-open") == 0


def test_what_a_key_uses_is_counted_over_its_connections(keys: Keys) -> None:
    rules = "[keys.alice]\nrequests_in_flight = 1\n[keys.bob]\ntokens_per_s = 1"
    with served(keys, rules) as controller, client_of(keys, "alice", controller) as one, client_of(keys, "alice", controller) as two:
        with one.generate("m", WORDS) as stream:
            next(stream)
            with pytest.raises(RateLimited) as limited:
                two.generate("m", "hello", stream=False)
            assert limited.value.retry_after_ms
            with client_of(keys, "bob", controller) as bob:
                assert bob.generate("m", WORDS, max_tokens=30, stream=False).text
                with pytest.raises(QuotaExceeded) as quota:
                    bob.generate("m", "hello", stream=False)
                assert 10_000 < (quota.value.retry_after_ms or 0) < 100_000
        with client_of(keys, "boss", controller) as boss:
            eventually(lambda: boss.status().running == 0, PATIENCE_S, "the stream that was left is cancelled")
        assert two.generate("m", "hello", stream=False).text == "hello"


def test_retries_wait_for_as_long_as_they_are_told(keys: Keys) -> None:
    with served(keys, "[keys.alice]\nrequests_per_s = 5\nburst = 1") as controller, client_of(keys, "alice", controller) as alice:
        for _ in range(4):
            assert alice.generate("m", "hello", stream=False, retries=3).text == "hello"


def test_rules_change_under_way_and_broken_ones_do_not(keys: Keys) -> None:
    with served(keys) as controller, client_of(keys, "alice", controller) as alice:
        assert alice.generate("m", "hello", stream=False).text == "hello"
        with alice.generate("m", WORDS) as stream:
            next(stream)
            write(keys, "[keys.alice]\ndeny = ['m:*']")
            controller.reload()
            eventually(lambda: denied(alice), PATIENCE_S, "the new rule holds")
            assert len("".join(chunk.text for chunk in stream).split()) == 49
        write(keys, "[keys.alice]\ndeny = 'nonsense'")
        controller.reload()
        with client_of(keys, "boss", controller) as boss:
            boss.status()
        assert denied(alice)
        write(keys, "[defaults]")
        controller.reload()
        eventually(lambda: not denied(alice), PATIENCE_S, "no rules, and said so")


def test_rules_that_are_emptied_stay_in_force(keys: Keys) -> None:
    """As by cp on a full disk, whether somebody asks for a look or not."""
    told: list[str] = []

    def report(event: str, **fields: Any) -> None:
        if event == "key not usable":
            told.append(fields["why"])

    with served(keys, "[keys.alice]\ndeny = ['m:*']", report=report) as controller, client_of(keys, "alice", controller) as alice:
        assert denied(alice)
        write(keys, "")
        eventually(lambda: len(told) > 0, PATIENCE_S, "it is told")
        controller.reload()
        write(keys, "[keys.alice]\ndeny = ['m:chat']")
        eventually(lambda: not denied(alice), PATIENCE_S, "other rules hold without being asked for")
    assert told == [
        f"{keys}/access.toml is empty, as if it was cut short: the rules stay in force; a file with the line [defaults] lets go of them"
    ]


def test_a_look_that_is_asked_for_during_a_look_is_had(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[bool] = []
    real_look = Keyring.look

    def look(ring: Keyring, now: float | None = None, *, thorough: bool = False) -> Changes | None:
        looks.append(thorough)
        if looks.count(False) == 1:
            controller.reload()
        return real_look(ring, now, thorough=thorough)

    monkeypatch.setattr(Keyring, "look", look)
    with Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys)) as controller:
        eventually(lambda: False in looks[:-1], PATIENCE_S, "it looks again")
    assert looks[looks.index(False) + 1]


def denied(client: Client) -> bool:
    try:
        client.generate("m", "hello", stream=False)
    except PermissionDenied:
        return True
    return False


def test_broken_rules_are_no_start(keys: Keys) -> None:
    write(keys, "[keys.alice]\nrequests_per_second = 1")
    controller = Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys))
    with pytest.raises(InvalidParameter, match=r"access\.toml.*requests_per_second"):
        controller.start()


def test_a_worker_may_serve_what_its_key_names(keys: Keys) -> None:
    rules = "[keys.gpu2]\nmodels = ['other-*']\nnames = ['gpu2-*']"
    with served(keys, rules) as controller:
        with echo(keys, "gpu2", controller, "m", wait=False) as worker, pytest.raises(Refused, match="gpu2 may not serve model 'm'"):
            worker.wait_ready(PATIENCE_S)
        with echo(keys, "gpu2", controller, "other-1"), client_of(keys, "alice", controller) as alice:
            assert [model.name for model in alice.models()] == ["m", "other-1"]


def test_a_worker_whose_model_is_taken_from_its_key_leaves_and_others_answer(keys: Keys) -> None:
    with served(keys) as controller, echo(keys, "gpu2", controller, "m") as worker, client_of(keys, "boss", controller) as boss:
        assert {each.key for each in boss.status().workers} == {"gpu", "gpu2"}
        write(keys, "[keys.gpu2]\nmodels = []")
        controller.reload()
        eventually(lambda: {each.key for each in boss.status().workers} == {"gpu"}, PATIENCE_S, "it is fenced")
        assert boss.generate("m", "hello", stream=False).text == "hello"
        with pytest.raises(Refused, match="gpu2 may not serve"):
            worker.wait_ready(PATIENCE_S)


def test_a_stranger_at_the_worker_port_is_not_even_heard(keys: Keys) -> None:
    with served(keys) as controller, RawWorker(controller.worker_endpoints[0]) as stranger:
        stranger.say(0)
        assert stranger.silent(500)
