"""What a key may do and how much: permissions, rates, quotas and requests in flight, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.access import IN_FLIGHT_RETRY_MS, MOST_DEBT_S, Access, Account
from zmqserve.bucket import Bucket
from zmqserve.errors import PermissionDenied, QuotaExceeded, RateLimited, Refused, Unauthenticated, ZmqserveError
from zmqserve.rules import Rules, parse_rules

from .fakes.keys import ALICE, BOB, GPU, ROOT, Key, Ring

NOW = 1000.0


def rules(**tables: Any) -> Rules:
    """Of alice: `alice`; of all clients: `client`; of the worker: `gpu`."""
    keys = {name: tables[name] for name in ("alice", "gpu", "root") if name in tables}
    tables_of = {"defaults.client": tables.get("client", {}), **{f"keys.{name}": table for name, table in keys.items()}}
    lines = [f"[{name}]\n" + "".join(f"{setting} = {value}\n" for setting, value in table.items()) for name, table in tables_of.items()]
    return parse_rules("".join(lines), "test")


def account(user: str = ALICE, **tables: Any) -> Account:
    return Access(Ring(), rules(**tables)).account(user, NOW)


def refusal(kind: type[ZmqserveError], act: Callable[[], object]) -> ZmqserveError:
    with pytest.raises(kind) as caught:
        act()
    return caught.value


def worker(rules: Access, *models: m.ModelCard, user: str = GPU, name: str = "gpu1-a") -> str:
    return rules.worker(user, name, models)


# --- buckets


def test_a_bucket_fills_at_its_rate_and_no_further() -> None:
    bucket = Bucket(2.0, 10.0, NOW)
    assert bucket.level(NOW) == 10
    bucket.take(NOW, 10)
    assert bucket.wait_s(NOW, 1) == 0.5
    assert bucket.level(NOW + 2) == 4
    assert bucket.level(NOW + 1e9) == 10


def test_a_debt_is_worked_off_and_bounded() -> None:
    bucket = Bucket(10.0, 10.0, NOW)
    bucket.take(NOW, 60)
    assert bucket.wait_s(NOW) == 5.0
    bucket.take(NOW, 10**18, least=-100)
    assert bucket.wait_s(NOW) == 10.0
    bucket.take(NOW, 1, least=-50)
    assert bucket.wait_s(NOW) == 10.0


def test_another_rate_keeps_the_debt_and_fits_the_rest() -> None:
    bucket = Bucket(10.0, 10.0, NOW)
    bucket.take(NOW, 30)
    bucket.change(1.0, 5.0, NOW)
    assert bucket.wait_s(NOW) == 20.0
    rich = Bucket(10.0, 10.0, NOW)
    rich.change(1.0, 5.0, NOW)
    assert rich.level(NOW) == 5


# --- who


def test_a_key_that_is_not_let_in_is_unauthenticated() -> None:
    access = Access(Ring(), Rules())
    for user in ("nobody", "", GPU):
        assert refusal(Unauthenticated, partial(access.account, user, NOW)).code == 40102
    refusal(Unauthenticated, lambda: worker(access, user=ALICE))


def test_a_revoked_key_is_out_at_once_and_its_name_lends_nothing_to_another() -> None:
    ring, access = Ring(), Access(Ring(), rules(alice={"requests_in_flight": 1}))
    first = access.account(ALICE, NOW)
    first.in_flight = 1
    access.renew(Ring(clients={BOB: Key(BOB, "alice", "client")}), rules(alice={"requests_in_flight": 1}), NOW)
    refusal(Unauthenticated, lambda: access.account(ALICE, NOW))
    second = access.account(BOB, NOW)
    assert (second.name, second.in_flight) == ("alice", 0)
    second.check_room(NOW)
    access.renew(ring, Rules(), NOW)
    assert access.account(ALICE, NOW) is not first


def test_accounts_of_keys_that_left_are_forgotten() -> None:
    access = Access(Ring(), Rules())
    for user in (ALICE, BOB, ROOT):
        access.account(user, NOW)
    access.renew(Ring(clients={}), Rules(), NOW)
    assert not access._accounts


def test_new_rules_and_roles_hold_for_keys_in_use() -> None:
    access = Access(Ring(), Rules())
    mine = access.account(ALICE, NOW)
    mine.check("generate", "m")
    access.renew(Ring(), rules(alice={"deny": ["m:*"]}), NOW)
    refusal(PermissionDenied, lambda: access.account(ALICE, NOW).check("generate", "m"))
    access.renew(Ring(clients={ALICE: Key(ALICE, "alice", "admin")}), rules(alice={"deny": ["m:*"]}), NOW)
    access.account(ALICE, NOW).check("generate", "m")
    access.account(ALICE, NOW).check_admin("drain a worker")
    assert access.account(ALICE, NOW) is mine


# --- permissions


def test_a_denial_names_key_and_verb_and_no_other_model() -> None:
    mine = account(alice={"allow": ["llama:*"]})
    mine.check("generate", "llama")
    error = refusal(PermissionDenied, lambda: mine.check("generate", "secret"))
    assert (error.code, error.retryable, error.data) == (40104, False, {"verb": "generate", "model": "secret"})
    assert "alice" in error.message
    assert "llama" not in error.message
    assert ALICE not in error.message


def test_admins_may_everything_and_others_not_what_admins_may() -> None:
    root = account(ROOT, client={"allow": [], "requests_in_flight": 1, "requests_per_s": 1, "tokens_per_s": 1}, root={"deny": ["*:*"]})
    root.check("status")
    root.check_admin("drain a worker")
    root.in_flight = 100
    for _ in range(100):
        root.count(NOW)
        root.check_room(NOW)
        root.charge(NOW, 10**6)
    refusal(PermissionDenied, lambda: account().check_admin("drain a worker"))


def test_a_model_with_a_denied_name_is_hidden_under_all_its_names() -> None:
    mine = account(alice={"deny": ["secret:*", "slow:embed"]})
    assert mine.may("generate", "alias")
    assert mine.hides("generate", ["secret", "alias"])
    assert not mine.sees(["generate", "embed"], ["alias", "secret"])
    assert not mine.hides("generate", ["slow"])
    assert mine.hides("embed", ["slow"])
    assert mine.sees(["generate", "embed"], ["slow"])


def test_a_model_is_seen_by_whoever_may_ask_it_anything() -> None:
    mine = account(alice={"allow": ["gpt:chat"]})
    assert mine.sees(["generate", "chat"], ["llama", "gpt"])
    assert not mine.sees(["generate"], ["llama", "gpt"])
    assert not mine.sees(["generate", "chat"], ["llama"])


# --- rates


def test_requests_a_second_over_all_connections_of_the_key() -> None:
    access = Access(Ring(), rules(client={"requests_per_s": 2, "burst": 3}))
    for _ in range(3):
        access.account(ALICE, NOW).count(NOW)
    error = refusal(RateLimited, lambda: access.account(ALICE, NOW).count(NOW))
    assert (error.code, error.retryable, error.retry_after_ms, error.data["bound"]) == (42901, True, 500, "requests_per_s")
    access.account(BOB, NOW).count(NOW)
    access.account(ALICE, NOW).count(NOW + 0.5)
    refusal(RateLimited, lambda: access.account(ALICE, NOW).count(NOW + 0.5))


def test_one_who_tries_when_told_is_let_in() -> None:
    mine = account(alice={"requests_per_s": 3})
    now = NOW
    for _ in range(3):
        mine.count(now)
    for _ in range(200):
        error = refusal(RateLimited, partial(mine.count, now))
        now += (error.retry_after_ms or 0) / 1000
        mine.count(now)


def test_requests_in_flight() -> None:
    mine = account(alice={"requests_in_flight": 2})
    mine.in_flight = 1
    mine.check_room(NOW)
    mine.in_flight = 2
    error = refusal(RateLimited, lambda: mine.check_room(NOW))
    assert (error.retry_after_ms, error.data) == (IN_FLIGHT_RETRY_MS, {"bound": "requests_in_flight", "limit": 2})


def test_tokens_are_charged_afterwards_and_the_debt_is_waited_for() -> None:
    mine = account(alice={"tokens_per_s": 100})
    mine.check_room(NOW)
    mine.charge(NOW, 100)
    mine.check_room(NOW)
    mine.charge(NOW, 350)
    error = refusal(QuotaExceeded, lambda: mine.check_room(NOW))
    assert (error.code, error.retryable, error.retry_after_ms) == (42902, True, 3500)
    refusal(QuotaExceeded, lambda: mine.check_room(NOW + 3.4))
    mine.check_room(NOW + 3.5)


def test_what_a_worker_claims_shuts_a_key_out_for_an_hour_at_most() -> None:
    mine = account(alice={"tokens_per_s": 0.001})
    mine.charge(NOW, 2**63 - 1)
    error = refusal(QuotaExceeded, lambda: mine.check_room(NOW))
    assert error.retry_after_ms is not None
    assert abs(error.retry_after_ms - 1000 * MOST_DEBT_S) <= 1
    mine.check_room(NOW + MOST_DEBT_S + 0.001)


def test_a_debt_survives_new_rules() -> None:
    access = Access(Ring(), rules(alice={"tokens_per_s": 100}))
    access.account(ALICE, NOW).charge(NOW, 1100)
    access.renew(Ring(), rules(alice={"tokens_per_s": 50}), NOW)
    error = refusal(QuotaExceeded, lambda: access.account(ALICE, NOW).check_room(NOW))
    assert error.retry_after_ms == 20_000


# --- workers


def test_a_worker_serves_what_its_key_names() -> None:
    access = Access(Ring(), rules(gpu={"models": ["llama-*", "gpt"], "names": ["gpu1-*"]}))
    assert worker(access, m.ModelCard("llama-7b", aliases=["gpt"])) == "gpu"
    assert worker(access) == "gpu"
    error = refusal(Refused, lambda: worker(access, m.ModelCard("llama-7b"), m.ModelCard("secret")))
    assert error.code == 40103
    assert "gpu" in error.message
    assert "'secret'" in error.message
    assert GPU not in error.message


def test_nor_by_another_name_nor_under_the_name_of_others() -> None:
    access = Access(Ring(), rules(gpu={"models": ["llama-*"], "names": ["gpu1-*"]}))
    assert "'gpt'" in refusal(Refused, lambda: worker(access, m.ModelCard("llama-7b", aliases=["gpt"]))).message
    assert "'gpu2-a'" in refusal(Refused, lambda: worker(access, name="gpu2-a")).message


def test_names_and_not_keys_are_told() -> None:
    access = Access(Ring(), Rules())
    assert ALICE not in repr(access) + repr(access.account(ALICE, NOW))
