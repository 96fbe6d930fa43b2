"""access.toml: what keys may do, and what is wrong with a file that says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmqserve.errors import InvalidParameter
from zmqserve.rules import MOST_REMEMBERED, ClientRules, Permits, Rules, load_rules


def rules_of(path: Path, text: str) -> Rules:
    file = path / "access.toml"
    file.write_text(text)
    return load_rules(file)


def permits(allow: list[str] | None = None, deny: list[str] | None = None) -> Permits:
    return Permits(ClientRules(allow=("*:*",) if allow is None else tuple(allow), deny=tuple(deny or ())))


def test_without_a_file_everything_is_allowed_and_nothing_limited(tmp_path: Path) -> None:
    for rules in (load_rules(None), load_rules(tmp_path / "access.toml"), Rules()):
        client = rules.client("anybody")
        assert (client.rate, client.token_rate, client.requests_in_flight) == (None, None, None)
        assert Permits(client).may("generate", "any model")
        assert rules.worker("anybody").models == ("*",)


def test_a_key_has_the_defaults_but_for_what_it_names(tmp_path: Path) -> None:
    rules = rules_of(
        tmp_path,
        """
        [defaults.client]
        requests_in_flight = 10
        requests_per_s = 5
        allow = ["a-*:*"]
        deny = ["a-secret:*"]
        [defaults.worker]
        models = ["a-*"]
        [keys.alice]
        requests_per_s = 0.5
        deny = []
        [keys.gpu-1]
        names = ["gpu1-*"]
        """,
    )
    bob, alice = rules.client("bob"), rules.client("alice")
    assert (bob.requests_in_flight, bob.rate, bob.deny) == (10, (5.0, 5.0), ("a-secret:*",))
    assert (alice.requests_in_flight, alice.rate, alice.deny, alice.allow) == (10, (0.5, 1.0), (), ("a-*:*",))
    assert (rules.worker("gpu-1").names, rules.worker("gpu-1").models) == (("gpu1-*",), ("a-*",))
    assert rules.worker("gpu-2").names == ("*",)


def test_inf_lifts_a_default_for_one_key(tmp_path: Path) -> None:
    text = "[defaults.client]\nrequests_per_s = 1\ntokens_per_s = 5.5\n[keys.a]\nrequests_per_s = inf\ntokens_per_s = inf"
    rules = rules_of(tmp_path, text)
    assert (rules.client("b").rate, rules.client("b").token_rate) == ((1.0, 1.0), (5.5, 5.5))
    assert (rules.client("a").rate, rules.client("a").token_rate) == (None, None)


def test_burst_is_what_comes_at_once(tmp_path: Path) -> None:
    assert rules_of(tmp_path, "[keys.a]\nrequests_per_s = 2\nburst = 50").client("a").rate == (2.0, 50.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[defaults.client]\nrequest_per_s = 1", ["defaults.client.request_per_s = 1", "requests_per_s"]),
        ("[defaults.client]\nmodels = ['a']", ["defaults.client.models"]),
        ("[defaults.worker]\nallow = ['a:*']", ["defaults.worker.allow"]),
        ("[defaults.admin]\nburst = 1", ["defaults.admin", "client, worker"]),
        ("[default.client]\nburst = 1", ["default", "defaults, keys"]),
        ("[keys.alice]\nburts = 1", ["keys.alice.burts = 1", "burst"]),
        ("[keys.alice]\nburst = 0", ["[keys.alice] burst = 0", ">= 1"]),
        ("[keys.alice]\nburst = true", ["[keys.alice] burst = True", "int"]),
        ("[keys.alice]\nrequests_per_s = 0", ["[keys.alice] requests_per_s = 0", "> 0"]),
        ("[keys.alice]\nrequests_per_s = nan", ["[keys.alice] requests_per_s = nan"]),
        ("[keys.alice]\ntokens_per_s = '5'", ["[keys.alice] tokens_per_s = '5'", "float"]),
        ("[keys.alice]\nrequests_in_flight = -1", ["[keys.alice] requests_in_flight = -1"]),
        ("[keys.alice]\nallow = 'a:*'", ["[keys.alice] allow = 'a:*'", "array"]),
        ("[keys.alice]\nallow = ['llama']", ["[keys.alice] allow = ['llama']", "MODEL:VERB", "generate"]),
        ("[keys.alice]\ndeny = ['llama:']", ["deny = ['llama:']", "MODEL:VERB"]),
        ("[keys.alice]\ndeny = [':chat']", ["deny = [':chat']", "MODEL:VERB"]),
        ("[keys.alice]\ndeny = ['llama:generat']", ["deny = ['llama:generat']", "count_tokens"]),
        ("[keys.alice]\ndeny = ['*:drain']", ["deny = ['*:drain']", "verbs"]),
        ("[keys.alice]\nmodels = [3]", ["[keys.alice] models = [3]"]),
        ("[keys]\nalice = 3", ["keys.alice = 3", "table"]),
        ("[keys.'a b']\nburst = 1", ["a b", "64"]),
        (f"[keys.{'a' * 65}]\nburst = 1", ["64"]),
        ("keys = 3", ["keys = 3", "table"]),
        ("[defaults]\nclient = 3", ["defaults.client = 3", "table"]),
        ("[defaults.client\n", ["not TOML"]),
    ],
)
def test_what_is_wrong_is_named_with_its_file_setting_and_value(tmp_path: Path, text: str, told: list[str]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        rules_of(tmp_path, text)
    for part in (str(tmp_path / "access.toml"), *told):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error_and_not_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "access.toml").mkdir()
    with pytest.raises(InvalidParameter, match="cannot read"):
        load_rules(tmp_path / "access.toml")


def test_globs_are_of_model_and_verb_and_deny_wins() -> None:
    mine = permits(["llama-*:*", "qwen:7b:chat"], ["llama-70b:embed", "*-secret:*"])
    assert mine.may("generate", "llama-7b")
    assert mine.may("embed", "llama-7b")
    assert mine.may("generate", "llama-70b")
    assert not mine.may("embed", "llama-70b")
    assert not mine.may("generate", "llama-secret")
    assert mine.may("chat", "qwen:7b")
    assert not mine.may("generate", "qwen:7b")
    assert not mine.may("chat", "qwen")
    assert not mine.may("generate", "Llama-7b")
    assert not mine.may("generate", "my-llama-7b")
    assert not permits([]).may("generate", "m")
    assert not permits(["*:*"], ["*:*"]).may("generate", "m")


def test_a_name_of_many_lines_is_matched_whole() -> None:
    assert not permits(["ok:*"]).may("generate", "ok\nsecret")
    assert not permits(["*:*"], ["*secret:*"]).may("generate", "a\nsecret")


def test_verbs_without_a_model_need_any_allowed_and_none_denied_for_all() -> None:
    assert permits(["llama:*"]).may("models")
    assert not permits(["llama:chat"]).may("models")
    assert permits(["llama:chat", "*:models"]).may("models")
    assert not permits(["llama:chat", "*:models"]).may("status")
    assert permits(["*:*"], ["llama:*"]).may("models")
    assert not permits(["*:*"], ["*:status"]).may("status")
    assert permits(["*:*"], ["*:status"]).may("models")
    assert not permits([]).may("models")


def test_what_is_remembered_of_names_that_peers_choose_is_bounded() -> None:
    mine = permits(["a*:*"])
    for number in range(3 * MOST_REMEMBERED):
        assert mine.may("chat", f"a{number}")
    assert len(mine._decided) <= MOST_REMEMBERED
    assert not mine.may("chat", "b")
