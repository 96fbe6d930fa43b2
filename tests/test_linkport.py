"""One controller's connection, over real sockets: messages both ways, the break, a fresh one and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from random import Random

import pytest
import zmq

from zmqserve import messages as m
from zmqserve.credentials import Credentials
from zmqserve.errors import InvalidEndpoint
from zmqserve.link import ControllerLink
from zmqserve.linkport import LinkPort
from zmqserve.sockets import SocketLimits

from .fakes.controller import FakeController

WAIT_S = 10.0

NONE = Credentials(None, None, ())


class Host:
    """Takes everything; the test looks at the link."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.aborted = 0

    def ready(self) -> m.Ready:
        return m.Ready(m.PROTOCOL, "w", "echo", "ready", [], 4, 1.0, 3000)

    def load(self, link: ControllerLink) -> m.Load:
        return m.Load(0, 0, 0)

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        self.asked.append(head.rid)
        return True

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None: ...
    def drain(self, grace_s: float | None) -> None: ...
    def fresh_socket(self, link: ControllerLink) -> None: ...
    def changed(self, link: ControllerLink) -> None: ...

    def abort(self, link: ControllerLink) -> None:
        self.aborted += 1


class Owner:
    """Runs a port as its thread would, until something is so."""

    def __init__(self, endpoint: str) -> None:
        self.host = Host()
        self.breaks = 0
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.port = LinkPort(
            self.context, endpoint, SocketLimits(), self.host, credentials=NONE, ttl_s=3.0, random=Random(1), now=time.monotonic()
        )

    @property
    def link(self) -> ControllerLink:
        return self.port.link

    def until(self, condition: Callable[[], bool], *, most: int = 10) -> None:
        ends_s = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < ends_s, f"it never became true: {self.port}"
            due_s = self.link.tick(time.monotonic())
            wait_ms = max(0, min(50, 1 + int(1000 * (due_s - time.monotonic()))))
            events = dict(zmq.zmq_poll(list(self.port.polled()), wait_ms))
            self.breaks += self.port.serve(time.monotonic(), events, most)

    def register(self, controller: FakeController) -> None:
        self.until(lambda: bool(controller.socket.poll(0)))
        controller.register()
        self.until(lambda: self.link.state == "registered")


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with FakeController() as fake:
        yield fake


@pytest.fixture
def owner(controller: FakeController) -> Iterator[Owner]:
    owner = Owner(controller.endpoint)
    owner.register(controller)
    yield owner
    owner.port.close(0)
    owner.context.term()


def test_messages_go_both_ways(controller: FakeController, owner: Owner) -> None:
    for rid in (1, 2, 3):
        controller.send(m.ControllerHead(m.REQUEST, controller.epoch, 1, rid))
    owner.until(lambda: len(owner.host.asked) >= 2, most=2)
    owner.until(lambda: owner.host.asked == [1, 2, 3])
    owner.link.post(controller.epoch, m.more_head(controller.epoch, 1), m.encode(m.Chunk(1, 0, 0, "a", b"")))
    assert controller.expect(m.MORE).message.text == "a"
    controller.socket.send_multipart([controller.worker, b"one frame"])
    owner.until(lambda: owner.link.bad_frames == 1)


def test_a_break_is_seen_at_once_and_each_of_them(controller: FakeController, owner: Owner) -> None:
    for breaks in (1, 2):
        aborted = owner.host.aborted
        controller.unbind()
        began_s = time.monotonic()
        owner.until(lambda: owner.link.state == "registering")
        assert time.monotonic() - began_s < 2.0, "before any lease ends"
        assert (owner.breaks, owner.host.aborted) == (breaks, aborted + 1)
        controller.epoch = 0
        controller.bind(controller.endpoint)
        owner.register(controller)


def test_a_fresh_socket_is_another_connection_and_watched_as_well(controller: FakeController, owner: Owner) -> None:
    former = controller.worker
    before = owner.port.polled()
    owner.port.fresh_socket()
    assert before[0][0] is not owner.port.polled()[0][0]
    owner.link.disconnected(time.monotonic())
    controller.epoch = 0
    owner.register(controller)
    assert controller.worker != former
    assert owner.breaks == 0
    controller.unbind()
    owner.until(lambda: owner.breaks == 1)
    assert owner.link.state == "registering"


def test_closing_says_goodbye(controller: FakeController) -> None:
    owner = Owner(controller.endpoint)
    owner.register(controller)
    owner.port.close(1000)
    owner.context.term()
    controller.expect(m.BYE)


def test_it_can_be_closed_when_its_context_has_been_terminated(controller: FakeController) -> None:
    owner = Owner(controller.endpoint)
    owner.register(controller)
    terminating = threading.Thread(target=owner.context.term)
    terminating.start()
    with pytest.raises(zmq.ContextTerminated):
        owner.until(lambda: False)
    owner.port.close(0)
    terminating.join(WAIT_S)
    assert not terminating.is_alive()


def test_an_endpoint_that_cannot_be_reached_by_name_is_told() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(InvalidEndpoint):
        LinkPort(context, "tcp://127.0.0.1", SocketLimits(), Host(), credentials=NONE, ttl_s=3.0, random=Random(1), now=0.0)
    context.term()
