"""One controller's connection, over real sockets: messages both ways, the break, a fresh one and the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import Random
from typing import Any

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
        self.renew: Callable[[], None]

    def ready(self) -> m.Ready:
        return m.Ready(m.PROTOCOL, "w", "echo", "ready", [], 4, 1.0, 3000)

    def load(self, link: ControllerLink) -> m.Load:
        return m.Load(0, 0, 0)

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        self.asked.append(head.rid)
        return True

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None: ...
    def drain(self, grace_s: float | None) -> None: ...
    def changed(self, link: ControllerLink) -> None: ...

    def fresh_socket(self, link: ControllerLink) -> None:
        self.renew()

    def abort(self, link: ControllerLink) -> None:
        self.aborted += 1


class Owner:
    """Runs a port as its thread would, until something is so."""

    def __init__(self, endpoint: str, *, most_sockets: int = 1023, ttl_s: float = 3.0) -> None:
        self.host = Host()
        self.breaks = 0
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, most_sockets)
        self.port = LinkPort(
            self.context,
            endpoint,
            SocketLimits(),
            self.host,
            credentials=NONE,
            ttl_s=ttl_s,
            random=Random(1),
            now=time.monotonic(),
            report=lambda event, **fields: self.told.append((event, fields)),
        )
        self.host.renew = self.port.fresh_socket

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

    def register(self, controller: FakeController, *, ttl_s: float = 3.0) -> None:
        self.until(lambda: bool(controller.socket.poll(0)))
        controller.register(ttl_ms=int(1000 * ttl_s))
        self.until(lambda: self.link.state == "registered")

    def close(self) -> None:
        self.port.close(0)
        self.context.term()


def welcomes(controller: FakeController) -> bool:
    """Whether a READY was among what it has heard; it is answered."""
    while controller.socket.poll(0):
        got = controller.receive()
        if got.head.kind == m.READY:
            controller.welcome(got)
            return True
    return False


def renews(port: LinkPort) -> bool:
    """Whether there is a fresh connection now."""
    try:
        port.fresh_socket()
    except OSError:
        return False
    return True


@pytest.fixture
def controller() -> Iterator[FakeController]:
    with FakeController() as fake:
        yield fake


@pytest.fixture
def owner(controller: FakeController) -> Iterator[Owner]:
    owner = Owner(controller.endpoint)
    owner.register(controller)
    yield owner
    owner.close()


def test_messages_go_both_ways(controller: FakeController, owner: Owner) -> None:
    for rid in (1, 2, 3):
        controller.send(m.ControllerHead(m.REQUEST, controller.epoch, 1, rid))
    owner.until(lambda: len(owner.host.asked) >= 2, most=2)
    owner.until(lambda: owner.host.asked == [1, 2, 3])
    owner.link.post(controller.epoch, m.more_head(controller.epoch, 1), m.encode(m.Chunk(1, 0, 0, "a", b"")))
    assert controller.expect(m.MORE).message.text == "a"
    controller.socket.send_multipart([controller.worker, b"one frame"])
    owner.until(lambda: owner.link.bad_frames == 1)


def test_a_break_is_seen_at_once_and_each_of_them(controller: FakeController) -> None:
    owner = Owner(controller.endpoint, ttl_s=10 * WAIT_S)
    owner.register(controller, ttl_s=10 * WAIT_S)
    for breaks in (1, 2):
        aborted = owner.host.aborted
        controller.unbind()
        owner.until(lambda: owner.link.state == "registering")  # before any lease ends
        assert (owner.breaks, owner.host.aborted) == (breaks, aborted + 1)
        controller.epoch = 0
        controller.bind(controller.endpoint)
        owner.register(controller, ttl_s=10 * WAIT_S)
    owner.close()


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


@pytest.mark.parametrize("room", [0, 1, 2])
def test_where_no_socket_is_to_be_had_the_old_one_is_kept_until_there_is(controller: FakeController, room: int) -> None:
    """Its own takes three of the context: one for messages, and two of its monitor."""
    owner = Owner(controller.endpoint, most_sockets=8)
    owner.register(controller)
    former = controller.worker
    others = []
    with suppress(zmq.ZMQError):
        while True:
            others.append(owner.context.socket(zmq.PAIR))
    for _ in range(room):
        others.pop().close()
    for _ in range(20):
        with pytest.raises(OSError, match="Too many open files"):
            owner.port.fresh_socket()
    ((event, told),) = owner.told
    assert (event, told["level"], told["endpoint"]) == ("no fresh connection", "warning", controller.endpoint)
    controller.send(m.ControllerHead(m.REQUEST, controller.epoch, 1, 1))
    owner.until(lambda: owner.host.asked == [1])
    controller.unbind()
    owner.until(lambda: owner.breaks == 1)
    controller.epoch = 0
    controller.bind(controller.endpoint)
    owner.register(controller)
    for socket in others:
        socket.close()
    owner.until(lambda: renews(owner.port))  # a context has the room of a socket that was closed a moment later
    owner.link.disconnected(time.monotonic())
    controller.epoch = 0
    owner.until(lambda: welcomes(controller))
    owner.until(lambda: owner.link.state == "registered")
    assert controller.worker != former
    assert len(owner.told) == 1
    owner.close()


def test_a_silent_controller_is_served_on_when_the_process_can_have_no_more_sockets(controller: FakeController) -> None:
    owner = Owner(controller.endpoint, most_sockets=3, ttl_s=0.2)
    owner.until(lambda: bool(controller.socket.poll(0)))
    controller.register(ttl_ms=200)
    owner.until(lambda: owner.link.state == "registered")
    owner.until(lambda: bool(owner.told))
    controller.send(m.ControllerHead(m.REQUEST, controller.epoch, 1, 1))
    owner.until(lambda: owner.host.asked == [1])
    assert (owner.link.state, owner.host.aborted) == ("registered", 1)
    owner.close()


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
        LinkPort(context, "tcp://127.0.0.1", SocketLimits(), Host(), credentials=NONE, ttl_s=3.0, random=Random(1), now=0.0, report=print)
    context.term()
