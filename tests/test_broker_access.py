"""Keys, roles and rules at the Broker: what a client may ask, learn and use, and what a worker may serve."""

from __future__ import annotations

from typing import Any

import pytest

from zmqserve import messages as m
from zmqserve.rules import parse_rules

from .fakes.keyed import asked, models_of, network_of, refusal
from .fakes.keys import ALICE, BOB, GPU, GPU2, ROOT, Ring
from .fakes.network import Network, card

# --- who


def test_an_unknown_key_is_answered_and_dropped() -> None:
    network = network_of()
    network.worker(user=GPU)
    stranger = network.client(user="x" * 40)
    for message in (m.Generate(1, "m", prompt="hi"), m.ListModels(2), m.Status(3), m.Drain(4, "w"), m.Cancel(5)):
        stranger.send(message)
    stranger.send(m.Hello(m.PROTOCOL))
    stranger.send(m.Ping(3000, [1]))
    assert [(end.rid, end.code) for end in stranger.got] == [(rid, 40102) for rid in (1, 2, 3, 4, 0, 0, 0)]
    assert not any(end.retryable for end in stranger.got)
    assert network.counters["errors: Unauthenticated"] == 7
    assert network.counters["requests"] == 0
    network.assert_clean()


def test_keys_of_the_other_side_and_of_nobody_open_nothing() -> None:
    network = network_of()
    for user in (GPU, "", "alice"):
        assert asked(network.client(user=user), m.ListModels(1)).code == 40102
    worker = network.worker("w", user=ALICE)
    assert refusal(worker).code == 40102
    assert refusal(worker).retry_after_ms is None
    assert not worker.is_registered()


def test_peers_in_the_same_process_have_no_key_and_may_do_all() -> None:
    network = network_of("[defaults.client]\nallow = []\n[defaults.worker]\nmodels = []")
    worker = network.worker()
    client = network.client()
    client.generate(1, priority=-100)
    worker.task(1).done()
    assert isinstance(client.end(1), m.Done)
    assert isinstance(asked(client, m.Drain(3, "w")), m.DrainReply)


def test_without_keys_nothing_is_asked() -> None:
    network = Network()
    worker, client = network.worker(user="whoever"), network.client(user="somebody")
    client.generate(1)
    worker.task(1).done()
    assert isinstance(asked(client, m.Drain(2, "w")), m.DrainReply)
    network.assert_clean()


# --- permissions


def test_a_denied_model_is_denied_in_the_same_words_whether_it_exists_or_not() -> None:
    answers = []
    for models in (["open"], ["open", "secret"]):
        network = network_of("[defaults.client]\nallow = ['open:*']")
        network.worker("w", *map(card, models), user=GPU)
        answers.append(asked(network.client(user=ALICE), m.Generate(1, "secret", prompt="hi")))
    assert answers[0] == answers[1]
    assert (answers[0].code, answers[0].retryable) == (40104, False)
    assert "open" not in answers[0].message


@pytest.mark.parametrize(
    "request_of",
    [
        lambda model: m.Generate(1, model, prompt="hi"),
        lambda model: m.Generate(1, model, messages=[m.ChatMessage("user", "hi")]),
        lambda model: m.Embed(1, model, texts=["hi"]),
        lambda model: m.CountTokens(1, model, prompt="hi"),
        lambda model: m.ModelDetails(1, model),
    ],
)
def test_each_verb_is_denied_by_the_model(request_of: Any) -> None:
    network = network_of("[defaults.client]\ndeny = ['secret:*']")
    worker = network.worker("w", card("secret"), card("open"), user=GPU)
    assert asked(network.client(user=ALICE), request_of("secret")).code == 40104
    assert not worker.tasks
    network.client(user=ALICE).request(request_of("open"))
    assert len(worker.tasks) == 1


def test_chat_and_generate_are_two_verbs_of_one_message() -> None:
    network = network_of("[keys.alice]\ndeny = ['*:chat']\n[keys.bob]\nallow = ['*:chat']")
    worker = network.worker("w", user=GPU, slots=9)
    alice, bob = network.client(user=ALICE), network.client(user=BOB)
    chat = [m.ChatMessage("user", "hi")]
    assert asked(alice, m.Generate(1, "m", messages=chat)).code == 40104
    assert asked(bob, m.Generate(2, "m", prompt="hi")).code == 40104
    assert asked(bob, m.Generate(3, "m", token_ids=b"\0\0\0\0")).code == 40104
    alice.request(m.Generate(4, "m", prompt="hi"))
    bob.request(m.Generate(5, "m", messages=chat))
    assert [task.rid for task in worker.tasks] == [4, 5]


@pytest.mark.parametrize("tail", [b"\x91" * 100_000, b"\xc1", b""])
def test_a_chat_that_cannot_be_read_is_no_way_around_a_rule(tail: bytes) -> None:
    network = network_of("[keys.alice]\ndeny = ['*:chat']")
    network.worker("w", user=GPU)
    alice = network.client(user=ALICE)
    whole = m.encode(m.Generate(1, "m", prompt="hi"))
    head = whole[: whole.index(b"\xa2hi")]
    alice.send(head + b"\xc0" + tail)
    assert [(type(end), end.code) for end in alice.got] == [(m.Error, 40001)]
    assert not network.broker.flights.open


def test_a_model_is_hidden_under_all_names_when_one_is_denied() -> None:
    network = network_of("[keys.alice]\ndeny = ['secret:*']")
    network.worker("w", card("real", aliases=["secret"]), card("open"), user=GPU)
    alice = network.client(user=ALICE)
    assert asked(alice, m.Generate(1, "secret", prompt="hi")).code == 40104
    hidden = asked(alice, m.Generate(2, "real", prompt="hi"))
    missing = asked(alice, m.Generate(2 + 1, "rael", prompt="hi"))
    assert hidden.code == missing.code == 40301
    assert hidden.message.replace("'real'", "'rael'") == missing.message
    assert hidden.data["known_models"] == missing.data["known_models"] == ["open"]


def test_a_model_may_be_allowed_by_an_alias() -> None:
    network = network_of("[keys.alice]\nallow = ['gpt:*']")
    worker = network.worker("w", card("real", aliases=["gpt"]), user=GPU)
    alice = network.client(user=ALICE)
    alice.generate(1, "gpt")
    assert worker.tasks
    assert asked(alice, m.Generate(2, "real", prompt="hi")).code == 40104


def test_lists_hold_what_a_key_may_use_and_nothing_else() -> None:
    network = network_of("[keys.alice]\nallow = ['a-*:*']")
    network.worker("wa", card("a-1"), user=GPU)
    network.worker("wb", card("b-1"), card("a-2"), user=GPU2)
    network.worker("wc", card("b-2"), user=GPU2)
    alice, bob, root = (network.client(user=user) for user in (ALICE, BOB, ROOT))
    assert models_of(alice) == ["a-1", "a-2"]
    assert models_of(bob) == models_of(root) == ["a-1", "a-2", "b-1", "b-2"]
    unknown = asked(alice, m.Generate(1, "a-9", prompt="hi"))
    assert unknown.data["known_models"] == ["a-1", "a-2"]
    assert "b-" not in unknown.message
    state = asked(alice, m.Status(2)).status
    assert [model.card.name for model in state.models] == ["a-1", "a-2"]
    assert [(worker.name, worker.models) for worker in state.workers] == [("wa", ["a-1"]), ("wb", ["a-2"])]
    assert b"b-" not in m.encode(state)


def test_lists_follow_workers_and_rules() -> None:
    network = network_of("[keys.alice]\nallow = ['a:*']")
    alice = network.client(user=ALICE)
    worker = network.worker("w", card("a"), user=GPU)
    assert models_of(alice, 1) == ["a"]
    network.worker("v", card("b"), user=GPU2)
    assert models_of(alice, 2) == ["a"]
    network.broker.keys_changed(network.now, Ring(), parse_rules("[keys.alice]\nallow = ['b:*']", ""))
    assert models_of(alice, 3) == ["b"]
    worker.say(m.BYE)
    assert models_of(network.client(user=BOB), 4) == ["b"]


def test_a_key_that_sees_no_model_cannot_tell_whether_there_are_any() -> None:
    answers = []
    for full in (False, True):
        network = network_of("[keys.alice]\nallow = ['mine:*']")
        if full:
            network.worker("w", card("theirs"), user=GPU)
        answers.append(asked(network.client(user=ALICE), m.Generate(1, "mine", prompt="hi")))
    assert answers[0] == answers[1]
    assert answers[0].code == 50005


def test_what_is_running_and_counted_is_shown_to_admins_only() -> None:
    network = network_of()
    worker = network.worker("w", user=GPU, slots=1)
    alice, also_alice, bob, root = (network.client(user=user) for user in (ALICE, ALICE, BOB, ROOT))
    alice.generate(1)
    also_alice.generate(2)
    bob.generate(3)
    mine, all_of_it = asked(alice, m.Status(4)).status, asked(root, m.Status(5)).status
    assert (mine.key, mine.running, mine.waiting, mine.clients, mine.counters, mine.worker_endpoints) == ("alice", 1, 1, 2, {}, [])
    assert (all_of_it.key, all_of_it.running, all_of_it.waiting, all_of_it.clients) == ("root", 1, 2, 3)
    assert all_of_it.counters["requests"] == 3
    assert all_of_it.workers[0].key == "gpu"
    for text in (m.encode(all_of_it), repr(network.reports).encode()):
        assert not any(key.encode() in text for key in (ALICE, BOB, ROOT, GPU))
    worker.task(1).done()


def test_nothing_of_models_that_a_key_may_not_use_is_counted_in_what_it_is_told() -> None:
    network = network_of("[keys.alice]\nallow = ['open:*']")
    worker = network.worker("w", card("open"), card("secret"), user=GPU, slots=4)
    alice, bob, root = (network.client(user=user) for user in (ALICE, BOB, ROOT))
    alice.generate(1, "open")
    idle = asked(alice, m.Status(2)).status
    for rid in (3, 4, 5, 6):
        bob.generate(rid, "secret")
    worker.task(3).done()
    worker.load(running=5, waiting=3, step_age_ms=70.0)
    assert asked(alice, m.Status(7)).status == idle
    assert models_of(alice, 8) == ["open"]
    (shown,) = idle.workers
    assert (shown.slots, shown.running, shown.free) == (4, 1, 3)
    for told in (asked(bob, m.Status(9)).status, asked(root, m.Status(10)).status):
        (whole,) = told.workers
        assert (whole.running, whole.free, whole.others, whole.waiting, whole.step_age_ms, whole.finished) == (4, 0, 4, 3, 70.0, 1)
    bob.send(m.Cancel(4))
    worker.say(m.DRAINING)
    (shown,) = asked(alice, m.Status(11)).status.workers
    assert (shown.state, shown.running, shown.free) == ("draining", 1, 0)


def test_the_load_of_a_model_is_told_to_all_that_may_use_it_and_the_size_of_what_waits_to_admins() -> None:
    """One that chooses a model must know how many are before it. With a single one that waits a sum would tell the length of its prompt."""
    network = network_of()
    network.worker("w", user=GPU, slots=1)
    bob, root = network.client(user=BOB), network.client(user=ROOT)
    for rid in (1, 2):
        bob.generate(rid)
    alice = network.client(user=ALICE)
    for client, whole in ((alice, False), (root, True)):
        for reply in (asked(client, m.ListModels(3)).models, asked(client, m.Status(4)).status.models):
            (model,) = reply
            assert (model.running, model.waiting, model.slots, model.waiting_bytes > 0) == (1, 1, 1, whole)


def test_models_and_status_may_be_denied() -> None:
    network = network_of("[keys.alice]\ndeny = ['*:models', '*:status']")
    alice = network.client(user=ALICE)
    assert asked(alice, m.ListModels(1)).code == asked(alice, m.Status(2)).code == 40104
    assert asked(alice, m.Generate(3, "m", prompt="hi")).code == 50005


def test_draining_is_for_admins() -> None:
    network = network_of("[defaults.client]\nallow = ['*:*']")
    worker = network.worker("w", user=GPU)
    existing, missing = (asked(network.client(user=ALICE), m.Drain(1, name)) for name in ("w", "nobody"))
    assert existing == missing
    assert existing.code == 40104
    assert m.DRAIN not in worker.kinds()
    assert isinstance(asked(network.client(user=ROOT), m.Drain(1, "w")), m.DrainReply)
    assert m.DRAIN in worker.kinds()


def test_urgency_must_be_allowed() -> None:
    network = network_of("[keys.bob]\npriority = -5")
    worker = network.worker("w", user=GPU, slots=9)
    alice, bob, root = (network.client(user=user) for user in (ALICE, BOB, ROOT))
    denied = asked(alice, m.Generate(1, "m", priority=-1, prompt="hi"))
    assert (denied.code, denied.data) == (40104, {"parameter": "priority", "value": -1})
    assert asked(bob, m.Generate(2, "m", priority=-6, prompt="hi")).code == 40104
    alice.generate(3, priority=7)
    bob.generate(4, priority=-5)
    root.generate(5, priority=-100)
    assert [task.rid for task in worker.tasks] == [3, 4, 5]


# --- rates and quotas


def test_a_rate_is_of_the_key_on_all_its_connections_and_of_all_that_is_asked() -> None:
    network = network_of("[keys.alice]\nrequests_per_s = 1\nburst = 4")
    worker = network.worker("w", user=GPU, slots=9)
    one, two = network.client(user=ALICE), network.client(user=ALICE)
    one.generate(1)
    two.generate(2)
    assert asked(two, m.Generate(3, "unknown", prompt="")).code == 40301
    assert models_of(one, 4) == ["m"]
    for request in (m.Generate(5, "m", prompt="hi"), m.ListModels(6), m.Status(7), m.Drain(8, "w")):
        error = asked(one, request)
        assert (error.code, error.retryable, error.retry_after_ms) == (42901, True, 1000)
    assert network.counters["over limit: requests_per_s"] == 4
    one.send(m.encode(m.Status(9)) + b"what cannot be read counts, too")
    assert one.error(9).code == 42901
    two.cancel(1)
    one.cancel(1)
    assert worker.task(1).cancelled
    assert isinstance(asked(network.client(user=BOB), m.ListModels(9)), m.Models)
    network.advance(1.0)
    assert models_of(two, 10) == ["m"]


def test_requests_in_flight_are_those_of_all_connections_until_their_workers_let_go() -> None:
    network = network_of("[keys.alice]\nrequests_in_flight = 2")
    worker = network.worker("w", user=GPU, slots=9)
    one, two = network.client(user=ALICE), network.client(user=ALICE)
    one.generate(1)
    two.generate(2)
    for client, rid in ((one, 3), (two, 4)):
        assert asked(client, m.Generate(rid, "m", prompt="hi")).code == 42901
    network.gone.add(one.envelope[0])
    worker.task(1).first()
    assert asked(two, m.Generate(5, "m", prompt="hi")).code == 42901
    worker.task(1).done("cancelled")
    two.generate(6)
    assert [task.rid for task in worker.tasks] == [2, 6]
    network.client(user=BOB).generate(7)
    for task in list(worker.tasks):
        task.done()
    network.assert_clean()


def test_what_is_refused_is_not_in_flight() -> None:
    network = network_of("[keys.alice]\nrequests_in_flight = 1", queue_requests=1)
    alice = network.client(user=ALICE)
    assert asked(alice, m.Generate(1, "m", prompt="hi")).code == 50005
    worker = network.worker("w", user=GPU, slots=1)
    bob = network.client(user=BOB)
    bob.generate(2)
    bob.generate(3)
    assert asked(alice, m.Generate(4, "m", prompt="hi")).code == 42903
    bob.cancel(3)
    alice.generate(5)
    worker.task(2).done()
    worker.task(5).done()
    network.assert_clean()


def test_tokens_are_charged_when_a_request_ends_and_debts_are_waited_for() -> None:
    network = network_of("[keys.alice]\ntokens_per_s = 10")
    worker = network.worker("w", user=GPU, slots=9)
    alice = network.client(user=ALICE)
    for rid in (1, 2):
        alice.generate(rid)
    task = worker.task(1)
    worker.forget(task)
    done = m.encode(m.Done(1, 0, ["stop"], m.Usage(20, 30), m.Timings("")))
    worker.say(m.DONE, done, client=task.client, rid=1, outcome="stop", prompt_tokens=20, completion_tokens=30)
    error = asked(alice, m.Generate(3, "m", prompt="hi"))
    assert (error.code, error.retryable, error.retry_after_ms, error.data["bound"]) == (42902, True, 4000, "tokens_per_s")
    assert isinstance(asked(alice, m.ListModels(4)), m.Models)
    network.beat_for(3.5, worker)
    assert asked(alice, m.Generate(5, "m", prompt="hi")).code == 42902
    network.beat_for(1.0, worker)
    alice.generate(6)
    worker.task(6).done()
    worker.task(2).done()
    network.assert_clean()


# --- fairness


def test_a_key_has_one_turn_however_many_connections_it_has() -> None:
    network = network_of()
    worker = network.worker("w", user=GPU, slots=1)
    alices = [network.client(user=ALICE) for _ in range(5)]
    bob = network.client(user=BOB)
    for number, alice in enumerate(alices):
        alice.generate(10 + number)
        alice.generate(20 + number)
    for rid in (1, 2, 3):
        bob.generate(rid)
    order = []
    while worker.tasks:
        order.append(worker.tasks[0].rid)
        worker.tasks[0].done()
    assert [order.index(rid) for rid in (1, 2, 3)] == [2, 4, 6] or [order.index(rid) for rid in (1, 2, 3)] == [1, 3, 5]
    network.assert_clean()


def test_nor_does_it_fill_a_queue_alone() -> None:
    network = network_of(client_requests=3, queue_requests=100)
    worker = network.worker("w", user=GPU, slots=1)
    clients = [network.client(user=ALICE) for _ in range(10)]
    for number, client in enumerate(clients):
        client.generate(1 + number)
    assert len(network.broker.registry.pools["m"].waiting) == 3
    assert clients[-1].error(10).data["bound"] == "client_requests"
    network.client(user=BOB).generate(50)
    assert len(network.broker.registry.pools["m"].waiting) == 4
    while worker.tasks:
        worker.tasks[0].done()
    network.assert_clean()
