"""What the simulation found once, each as small as it gets."""

from __future__ import annotations

from random import Random

import pytest

from zmqserve import messages as m
from zmqserve.link import ControllerLink
from zmqserve.messages import Generate
from zmqserve.session import Session

from .fakes.network import Network, card


def test_a_client_that_was_told_of_its_end_and_falls_silent_does_not_keep_the_controller_busy() -> None:
    """Its lease has run out and its worker has not let go: the look at it was due again at once, for ever."""
    network = Network(cancel_timeout_s=100.0, ttl_s=3.0)
    worker = network.worker()
    client = network.client()
    client.generate(1, deadline_ms=1000)
    client.ping(ttl_ms=3000)
    network.beat_for(20.0, worker)
    assert client.error(1).code == 40801
    worker.tasks[0].done("cancelled")
    network.assert_clean()


def test_a_request_that_was_told_of_its_deadline_is_not_ended_again_when_the_controller_leaves() -> None:
    network = Network(cancel_timeout_s=100.0)
    worker = network.worker()
    client = network.client()
    client.generate(1, deadline_ms=1000)
    network.beat_for(3.0, worker)
    network.broker.shut_down(network.now)
    assert client.error(1).code == 40801


def test_a_model_that_a_child_has_not_loaded_yet_is_loading_and_not_unable() -> None:
    """The child is ready for another model; its card of this one names no verbs yet."""
    network = Network()
    network.worker("child", card("m"), m.ModelCard("n"), backend="controller")
    client = network.client()
    client.generate(1, model="n")
    assert client.error(1).code == 50301
    assert client.error(1).retryable


def test_a_change_of_a_registration_that_is_over_does_not_register_a_worker() -> None:
    """Behind it may be another READY with a later offer, which would be dropped then: the worker is told to register."""
    network = Network()
    worker = network.worker(register=False)
    worker.ready(epoch=4711)
    assert worker.got[-1][0].kind == m.REREGISTER
    assert not list(network.broker.registry)


class _Host:
    """A worker with an offer that changes."""

    slots = 1

    def ready(self) -> m.Ready:
        return m.Ready(m.PROTOCOL, "w", "echo", "ready", [card()], self.slots, 1.0, 3000)

    def load(self, link: ControllerLink) -> m.Load:
        return m.Load(0, 0, 0)

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        return False

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None: ...

    def abort(self, link: ControllerLink) -> None: ...

    def drain(self, grace_s: float | None) -> None: ...

    def fresh_socket(self, link: ControllerLink) -> None: ...

    def changed(self, link: ControllerLink) -> None: ...


@pytest.fixture
def host() -> _Host:
    return _Host()


@pytest.fixture
def offers() -> list[tuple[int, int]]:
    """What was said in READYs: the head's number, and slots."""
    return []


@pytest.fixture
def link(host: _Host, offers: list[tuple[int, int]]) -> ControllerLink:
    heads, readies = m.decoder(m.WorkerHead), m.decoder(m.Ready)

    def send(head: bytes, payload: bytes) -> bool:
        known = heads.decode(head)
        if known.kind == m.READY:
            offers.append((known.epoch, readies.decode(payload).slots))
        return True

    link = ControllerLink("tcp://c:1", host, send, ttl_s=3.0, random=Random(1), now=0.0)
    link.tick(0.0)
    return link


def _welcome(link: ControllerLink, epoch: int) -> None:
    welcome = m.WorkerWelcome(m.PROTOCOL, "c", 3000)
    link.received(0.5, m.encode(m.ControllerHead(m.WELCOME, epoch)), m.encode(welcome))


def test_a_change_that_no_welcome_has_acknowledged_is_said_again_in_the_next_registration(
    host: _Host, link: ControllerLink, offers: list[tuple[int, int]]
) -> None:
    """The controller had registered the worker anew before the change came, and dropped it as one of the former registration."""
    _welcome(link, 7)
    host.slots = 2
    link.announce()
    _welcome(link, 8)
    assert offers == [(0, 1), (7, 2), (8, 2)]


def test_a_welcome_that_may_answer_an_older_ready_is_followed_by_the_last_offer(
    host: _Host, link: ControllerLink, offers: list[tuple[int, int]]
) -> None:
    host.slots = 2
    link.received(0.2, m.encode(m.ControllerHead(m.REREGISTER, 5)), b"")
    _welcome(link, 7)
    assert offers == [(0, 1), (5, 2), (7, 2)]


class _Wire:
    """Takes all that is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def connect(self, endpoint: str) -> None: ...

    def send(self, payload: bytes) -> bool:
        self.sent.append(payload)
        return True


def test_a_loss_long_after_another_one_has_all_of_the_patience() -> None:
    """A greeting of a controller that was there all the time let the time since the former loss count."""
    wire = _Wire()
    session = Session(wire, ["tcp://c:1", "tcp://d:1"], random=Random(1), failover_s=10.0)
    welcome = m.encode(m.Welcome(m.PROTOCOL, "c", m.Limits(ttl_ms=3000)))
    first = session.open(0.0, Generate(1, "m", prompt="a"))
    session.on_message(0.1, welcome)
    session.on_disconnected(1.0)
    session.on_message(1.1, welcome)
    session.on_message(50.0, m.encode(m.Done(1, 0, ["stop"], m.Usage(1, 0), m.Timings("w"))))
    assert first.end is not None
    second = session.open(60.0, Generate(2, "m", prompt="b"))
    session.on_message(60.1, welcome)
    assert second.sent
    session.on_disconnected(60.2)
    session.tick(60.2)
    assert second.end is None
