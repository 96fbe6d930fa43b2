"""What a hostile or broken worker may try on the workers' socket, message by message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.processes import PATIENCE_S, eventually
from zmqserve import messages as m
from zmqserve.errors import MalformedMessage, ProtocolMismatch

from .site import NAME, Honest, RawWorker, Site, ready

pytestmark = pytest.mark.usefixtures("honest")

DEEP = b"\x91" * 100_000
REGISTRATIONS = 10_000
CLAIMED_MODELS = b"\x98\x01\xa1w\xa3raw\xa5ready\xdd\xff\xff\xff\xff\x04\x01\xcd\x0b\xb8"


REFUSED: dict[str, tuple[dict[str, Any], int]] = {
    "another version": ({"protocol": 99}, ProtocolMismatch.code),
    "a name that is empty": ({"name": ""}, MalformedMessage.code),
    "a name of 257 characters": ({"name": "w" * 257}, MalformedMessage.code),
    "no such state": ({"state": "evil"}, MalformedMessage.code),
    "more slots than there may be": ({"slots": m.MAX_SLOTS + 1}, MalformedMessage.code),
    "slots below 0": ({"slots": -1}, MalformedMessage.code),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_offer_that_is_wrong_is_refused_for_good(site: Site, name: str) -> None:
    offer, code = REFUSED[name]
    with site.raw_worker() as worker:
        refusal = worker.refusal(ready(**offer))
        assert (refusal.code, refusal.retry_after_ms) == (code, None)
        assert site.workers() == [NAME]


def test_more_models_than_a_worker_may_have_are_refused(site: Site) -> None:
    cards = [m.ModelCard(f"m{number}") for number in range(m.MAX_MODELS + 1)]
    with site.raw_worker() as worker:
        assert worker.refusal(ready("hostile", *cards)).code == MalformedMessage.code
    assert "m1" not in {model.card.name for model in site.status().models}


@pytest.mark.parametrize("payload", [b"", b"\xc1", DEEP, CLAIMED_MODELS, b"\xdd\xff\xff\xff\xff", b"\x80"])
def test_a_registration_that_is_none_is_refused(site: Site, payload: bytes) -> None:
    with site.raw_worker() as worker:
        assert worker.refusal(payload).code == MalformedMessage.code


def test_the_name_of_another_is_not_given_twice(site: Site) -> None:
    with site.raw_worker() as worker:
        refusal = worker.refusal(ready(NAME))
        assert refusal.retry_after_ms is not None
        assert NAME in refusal.why
        assert site.workers() == [NAME]


def test_ten_thousand_registrations_of_one_name_are_one_worker_at_most(site: Site) -> None:
    """On one connection each replaces the one before, on another one the name is taken; and of either there may be so many a second."""
    with site.raw_worker() as worker, site.raw_worker() as other:
        for _ in range(REGISTRATIONS // 200):
            for _ in range(100):
                worker.say(m.READY, ready(), epoch=0)
                other.say(m.READY, ready(), epoch=0)
            for peer in (worker, other):
                peer.discard()
        eventually(lambda: site.counter("over limit: readies_per_s") > 0, PATIENCE_S, "there were too many")
    with site.raw_worker() as again:

        def is_the_one() -> bool:
            return again.register()[0].kind == m.WELCOME and site.workers() == [NAME, "hostile"]

        eventually(is_the_one, PATIENCE_S, "the name is free again")


FORGED: dict[str, Callable[[RawWorker, m.ControllerHead], dict[str, Any]]] = {
    "an epoch made up": lambda worker, task: {"epoch": worker.epoch + 1, "client": task.client, "rid": task.rid},
    "the epoch 0": lambda worker, task: {"epoch": 0, "client": task.client, "rid": task.rid},
    "a client that it was not given": lambda worker, task: {"client": task.client - 1, "rid": task.rid},
    "a client that there is not": lambda worker, task: {"client": 2**62, "rid": task.rid},
    "a rid that it was not given": lambda worker, task: {"client": task.client, "rid": task.rid + 1},
}


@pytest.mark.parametrize("name", FORGED)
def test_what_names_what_it_was_not_given_reaches_nobody(site: Site, honest: Honest, name: str) -> None:
    """Each kind that carries something to a client or ends a request; then the real answer, which is all that its client gets."""
    with site.raw_worker() as worker, site.raw_client() as client:
        worker.register()
        client.say(m.Generate(7, "hostile model", prompt="hi"))
        task = worker.hear(m.REQUEST)[0]
        forged = FORGED[name](worker, task)
        for rid in (forged["rid"], honest.rid):
            for kind in (m.FIRST, m.MORE, m.DONE, m.FAILED, m.BUSY):
                if kind != m.MORE or forged["client"] != task.client or "epoch" in forged:
                    worker.say(kind, m.Chunk(7, 0, 0, "forged", b""), **(forged | {"rid": rid}))
        worker.say(m.DONE, m.Done(7, 0, ["stop"], m.Usage(1, 0), m.Timings("hostile")), client=task.client, rid=7, outcome="stop")
        assert isinstance(client.hear(), m.Done)
        assert client.is_served()


def test_a_stale_epoch_is_worth_nothing(site: Site) -> None:
    with site.raw_worker() as worker, site.raw_client() as client:
        worker.register()
        client.say(m.Generate(7, "hostile model", prompt="hi"))
        task = worker.hear(m.REQUEST)[0]
        worker.register()
        again = worker.hear(m.REQUEST)[0]
        for kind in (m.FIRST, m.MORE, m.DONE, m.FAILED, m.BUSY, m.BYE, m.DRAINING):
            worker.say(kind, m.Chunk(7, 0, 0, "stale", b""), epoch=task.epoch, client=task.client, rid=task.rid)
        assert again.epoch != task.epoch
        worker.say(m.DONE, m.Done(7, 0, ["stop"], m.Usage(1, 0), m.Timings("hostile")), client=again.client, rid=7, outcome="stop")
        assert isinstance(client.hear(), m.Done)
        assert client.is_served()


def test_an_epoch_counts_on_its_own_connection_only(site: Site) -> None:
    with site.raw_worker() as worker, site.raw_worker() as thief:
        worker.register()
        thief.say(m.BYE, epoch=worker.epoch)
        thief.say(m.READY, ready(), epoch=worker.epoch)
        assert thief.hear()[0].kind == m.REREGISTER
        assert "hostile" in site.workers()


def test_a_request_ends_once_however_often_its_worker_ends_it(site: Site) -> None:
    with site.raw_worker() as worker, site.raw_client() as client:
        worker.register()
        client.say(m.Generate(7, "hostile model", prompt="hi"))
        task = worker.hear(m.REQUEST)[0]
        done = m.Done(7, 0, ["stop"], m.Usage(1, 0), m.Timings("hostile"))
        for _ in range(100):
            worker.say(m.DONE, done, client=task.client, rid=7, outcome="stop")
        assert isinstance(client.hear(), m.Done)
        assert client.is_served()


VIOLATIONS: dict[str, Callable[[RawWorker], None]] = {
    "a frame too many": lambda worker: worker.say(m.LOAD, m.Load(0, 0, 0), b"more"),
    "a frame too few": lambda worker: worker.send(m.encode(m.WorkerHead(m.LOAD, worker.epoch))),
    "empty frames": lambda worker: worker.send(b"", b""),
    "many empty frames": lambda worker: worker.send(*[b""] * 1000),
    "a head that is none": lambda worker: worker.send(b"\xc1", b""),
    "a head with nesting of 100,000": lambda worker: worker.send(DEEP, b""),
    "a head that claims 4 Gi elements": lambda worker: worker.send(b"\xdd\xff\xff\xff\xff", b""),
    "a heartbeat with nesting of 100,000": lambda worker: worker.say(m.LOAD, DEEP),
    "a heartbeat that is none": lambda worker: worker.say(m.LOAD, b"\x93\0\0\xff"),
    "a kind that only controllers send": lambda worker: worker.say(m.WELCOME),
    "a kind that there is not": lambda worker: worker.say(0),
    "a client's message": lambda worker: worker.send(m.encode(m.Generate(7, "m", prompt="hi")), b""),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_who_breaks_the_protocol_must_register_again(site: Site, name: str) -> None:
    """Its epoch is void, its requests move, and nobody else notices."""
    with site.raw_worker() as worker:
        worker.register()
        assert worker.is_fenced(lambda: VIOLATIONS[name](worker))
        assert site.workers() == [NAME]


def test_a_worker_that_holds_what_it_is_given_holds_nothing_up(site: Site) -> None:
    """It takes requests and never says a word: their client is told at its deadline, and the worker gets nothing new."""
    with site.raw_worker() as worker, site.raw_client() as client:
        worker.register()
        client.say(m.Generate(7, "hostile model", prompt="hi", deadline_ms=100))
        worker.hear(m.REQUEST)
        assert client.hear().code == 40801
        assert client.is_served()


def test_a_worker_that_goes_takes_no_request_along(site: Site) -> None:
    with site.raw_client() as client:
        with site.raw_worker() as worker:
            worker.register()
            client.say(m.Generate(7, "hostile model", prompt="hi"))
            worker.hear(m.REQUEST)
            worker.close()
            eventually(lambda: site.workers() == [NAME], PATIENCE_S, "its connection is missed")
        client.say(m.Cancel(7))
        assert client.hear().finish_reasons == ["cancelled"]
        assert client.is_served()


def test_a_load_that_is_a_lie_moves_no_books(site: Site) -> None:
    with site.raw_worker() as worker:
        worker.register()
        for figures in ((2**62, 0, 0), (0, 2**62, 2**62), (0, 0, 2**62), (1, 1, 1)):
            worker.say(m.LOAD, m.Load(*figures))
        worker.say(m.LOAD, m.encode([1, 1, 1, float("nan")]))
        for each in site.status().workers:
            assert 0 <= each.free <= each.slots
