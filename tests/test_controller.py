"""The controller as an object: it binds, serves, and leaves nothing behind."""

from __future__ import annotations

import os
import socket as plain
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
import zmq

from zmqserve import messages as m
from zmqserve.controller import Controller
from zmqserve.errors import BindFailed, InvalidEndpoint

from .fakes.network import card
from .processes import eventually

PATIENCE_MS = 10_000
ANY = "tcp://127.0.0.1:*"
_to_client = m.decoder(m.ToClient)


def quiet(**settings: Any) -> Controller:
    """A controller on ports of the system's choice that reports to nobody."""
    return Controller(report=lambda event, **fields: None, **{"clients": [ANY], "workers": [ANY], **settings})


@contextmanager
def connected(endpoint: str, kind: int = zmq.DEALER, context: zmq.Context[zmq.Socket[bytes]] | None = None) -> Iterator[zmq.Socket[bytes]]:
    """A plain socket, as somebody without this library has."""
    own = context or zmq.Context()
    socket = own.socket(kind)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
    if kind == zmq.REQ:
        socket.setsockopt(zmq.REQ_RELAXED, 1)
        socket.setsockopt(zmq.REQ_CORRELATE, 1)
    socket.connect(endpoint)
    try:
        yield socket
    finally:
        socket.close()
        if context is None:
            own.term()


def ask(socket: zmq.Socket[bytes], request: Any) -> Any:
    socket.send(m.encode(request))
    return _to_client.decode(socket.recv())


class RawWorker:
    """A worker in twenty lines: it answers each request with one Reply."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self.socket = socket
        ready = m.Ready(m.PROTOCOL, "raw", "raw", "ready", [card()], 4, 1.0, 60_000)
        socket.send_multipart([m.encode(m.WorkerHead(m.READY, 0)), m.encode(ready)])
        self.epoch = self._await(m.WELCOME).epoch

    def _await(self, kind: int) -> m.ControllerHead:
        while True:
            head: m.ControllerHead = m.read(m.decoder(m.ControllerHead), self.socket.recv_multipart()[0])
            if head.kind == kind:
                return head

    def answer_one(self) -> None:
        head = self._await(m.REQUEST)
        done = m.WorkerHead(m.DONE, self.epoch, head.client, head.rid, "ok")
        reply = m.Reply(head.rid, [m.Choice("hi", b"", "stop")], m.Usage(1, 1), m.Timings("raw"))
        self.socket.send_multipart([m.encode(done), m.encode(reply)])


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_it_serves_on_every_endpoint_and_tells_the_real_ones(tmp_path: Path) -> None:
    ipc = f"ipc://{tmp_path}/c.ipc"
    with quiet(clients=[ANY, ANY, ipc]) as controller:
        assert len(set(controller.client_endpoints)) == 3
        assert controller.client_endpoints[2] == ipc
        for endpoint in controller.client_endpoints:
            with connected(endpoint) as client:
                status = ask(client, m.Status(7)).status
                assert (status.controller, status.client_endpoints) == (controller.id, controller.client_endpoints)
                assert status.worker_endpoints == controller.worker_endpoints
                assert not any("*" in bound for bound in status.worker_endpoints)


def test_a_given_context_serves_inproc_and_stays_open() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for _ in range(3):
        with quiet(clients=["inproc://clients"], workers=["inproc://workers"], context=context):
            with connected("inproc://workers", context=context) as side, connected("inproc://clients", context=context) as client:
                worker = RawWorker(side)
                client.send(m.encode(m.Generate(5, "m", stream=False, prompt="hi")))
                worker.answer_one()
                assert _to_client.decode(client.recv()).choices[0].text == "hi"
    assert not context.closed
    context.term()


@pytest.mark.parametrize("busy_poll_us", [0.0, 1_000_000.0])
def test_it_looks_for_the_next_message_without_sleeping_for_as_long_as_it_is_told(
    busy_poll_us: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    polls: list[tuple[float, int, bool]] = []  # when it was asked, for how many ms, and whether something came
    poll = zmq.zmq_poll

    def watched(sockets: Any, timeout_ms: int) -> Any:
        asked_s = time.monotonic()
        ready = poll(sockets, timeout_ms)
        polls.append((asked_s, timeout_ms, bool(ready)))
        return ready

    monkeypatch.setattr(zmq, "zmq_poll", watched)
    with quiet(busy_poll_us=busy_poll_us) as controller, connected(controller.client_endpoints[0]) as client:
        assert isinstance(ask(client, m.ListModels(1)), m.Models)
        came_s = next(asked_s for asked_s, _, came in polls if came)
        eventually(
            lambda: any(timeout_ms > 0 and asked_s > came_s for asked_s, timeout_ms, _ in polls), PATIENCE_MS / 1000, "it sleeps again"
        )
    within = [timeout_ms for asked_s, timeout_ms, _ in polls if came_s < asked_s < came_s + busy_poll_us / 1e6]
    assert not any(within)
    assert (len(within) > 10) == (busy_poll_us > 0)


def test_run_serves_in_the_calling_thread_until_stop() -> None:
    controller = quiet()
    for _ in range(2):
        controller.bind()
        controller.bind()
        thread = threading.Thread(target=controller.run)
        thread.start()
        with connected(controller.client_endpoints[0]) as client:
            assert isinstance(ask(client, m.Hello(m.PROTOCOL)), m.Welcome)
            controller.stop()
            thread.join(10)
            assert not thread.is_alive()


def test_it_leaves_no_thread_and_no_descriptor_behind(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/c.ipc"
    with quiet(clients=[ANY, endpoint]):
        pass
    before, threads = descriptors(), threading.active_count()
    for _ in range(10):
        with quiet(clients=[ANY, endpoint]) as controller, connected(controller.client_endpoints[1]) as client:
            ask(client, m.Hello(m.PROTOCOL))
    assert (descriptors(), threading.active_count()) == (before, threads)


def test_it_may_be_bound_and_stopped_without_having_run() -> None:
    before = descriptors()
    controller = quiet()
    controller.bind()
    controller.stop()
    controller.stop()
    assert controller.client_endpoints == []
    assert descriptors() == before


def test_it_may_be_started_again_and_not_twice() -> None:
    controller = quiet()
    for _ in range(2):
        controller.start()
        with pytest.raises(RuntimeError, match="runs already"):
            controller.start()
        with connected(controller.client_endpoints[0]) as client:
            ask(client, m.Hello(m.PROTOCOL))
        controller.stop()
        controller.stop()


def test_stopping_from_its_own_report_does_not_deadlock() -> None:
    stopped = threading.Event()

    def report(event: str, **fields: Any) -> None:
        if event == "worker came":
            controller.stop()
        if event == "controller down":
            stopped.set()

    controller = Controller(clients=[ANY], workers=[ANY], report=report)
    controller.start()
    with connected(controller.worker_endpoints[0]) as side:
        RawWorker(side)
        assert stopped.wait(10)


def test_clients_are_told_when_it_stops() -> None:
    controller = quiet()
    controller.start()
    with connected(controller.worker_endpoints[0]) as side, connected(controller.client_endpoints[0]) as client:
        RawWorker(side)
        client.send(m.encode(m.Generate(5, "m", prompt="hi")))
        assert ask(client, m.Ping(3000, [5])).unknown == []
        controller.stop()
        goaway, error = _to_client.decode(client.recv()), _to_client.decode(client.recv())
    assert isinstance(goaway, m.GoAway)
    assert (error.rid, error.code, error.retryable) == (5, 50302, True)


@pytest.mark.parametrize("side", ["clients", "workers"])
def test_a_port_in_use_is_named_and_nothing_stays_open(side: str) -> None:
    with plain.create_server(("127.0.0.1", 0)) as owner:
        endpoint = f"tcp://127.0.0.1:{owner.getsockname()[1]}"
        before = descriptors()
        with pytest.raises(BindFailed, match="in use") as caught:
            quiet(**{side: [ANY, endpoint]}).start()
        assert caught.value.data["endpoint"] == endpoint
        assert descriptors() == before


def test_an_ipc_path_in_use_leaves_the_first_controller_undisturbed(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/c.ipc"
    with quiet(clients=[endpoint]) as first:
        with pytest.raises(BindFailed, match="another process has it bound"):
            quiet(clients=[endpoint]).start()
        with connected(endpoint) as client:
            assert ask(client, m.Hello(m.PROTOCOL)).controller == first.id
    with quiet(clients=[endpoint]) as second, connected(endpoint) as client:
        assert ask(client, m.Hello(m.PROTOCOL)).controller == second.id


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1", "ipc://", "ipc://" + "x" * 200, "ipc://@x", "ipc://a\0b"])
def test_a_bad_endpoint_is_named_and_nothing_stays_open(endpoint: str) -> None:
    before = descriptors()
    with pytest.raises(InvalidEndpoint) as caught:
        quiet(clients=[ANY, endpoint]).start()
    assert caught.value.data["endpoint"] == endpoint
    assert descriptors() == before


def test_a_failed_start_may_be_repeated(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/c.ipc"
    second = quiet(clients=[endpoint])
    with quiet(clients=[endpoint]), pytest.raises(BindFailed):
        second.start()
    with second, connected(endpoint) as client:
        assert ask(client, m.Hello(m.PROTOCOL)).controller == second.id


@contextmanager
def device(backend: str) -> Iterator[str]:
    """`zmq.proxy` between a ROUTER, whose endpoint this is, and a DEALER to the controller."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    front, back, control = context.socket(zmq.ROUTER), context.socket(zmq.DEALER), context.socket(zmq.PAIR)
    switch = context.socket(zmq.PAIR)
    for socket in (front, back, control, switch):
        socket.setsockopt(zmq.LINGER, 0)
    port = front.bind_to_random_port("tcp://127.0.0.1")
    back.connect(backend)
    control.bind("inproc://switch")
    switch.connect("inproc://switch")
    thread = threading.Thread(target=zmq.proxy_steerable, args=(front, back, None, control))
    thread.start()
    try:
        yield f"tcp://127.0.0.1:{port}"
    finally:
        switch.send(b"TERMINATE")
        thread.join(10)
        context.destroy(linger=0)


@pytest.mark.parametrize("proxies", [0, 1, 2])
def test_a_raw_req_socket_is_answered_directly_and_through_proxies(proxies: int) -> None:
    with quiet() as controller, connected(controller.worker_endpoints[0]) as side:
        worker = RawWorker(side)
        with device(controller.client_endpoints[0]) as one, device(one) as two:
            endpoint = (controller.client_endpoints[0], one, two)[proxies]
            with connected(endpoint, zmq.REQ) as req:
                for rid in (1, 2):
                    req.send(m.encode(m.Generate(rid, "m", stream=False, prompt="hi")))
                    worker.answer_one()
                    reply = _to_client.decode(req.recv())
                    assert (reply.rid, reply.choices[0].text) == (rid, "hi")
                assert ask(req, m.Generate(3, "nobody", stream=False, prompt="hi")).code == 40301


def test_garbage_of_every_kind_on_both_sides_and_it_still_serves() -> None:
    random = Random(11)
    pieces = [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        random.randbytes(50),
        m.encode([2, 1, "m"]),
        m.encode({"a": 1}),
        m.encode(m.WorkerHead(m.DONE, 1, 1, 1)),
        m.encode(m.WorkerHead(m.READY, 0)),
        m.encode(m.Ready(m.PROTOCOL, "ghost", "x", "ready", [], 1, 1.0, 60_000)),
        b"x" * 5000,
    ]
    with quiet(message_bytes=4096) as controller:
        for endpoint in (controller.client_endpoints[0], controller.worker_endpoints[0]):
            with connected(endpoint) as attacker:
                for _ in range(300):
                    attacker.send_multipart(random.choices(pieces, k=random.randint(1, 25)))
            host, port = endpoint.removeprefix("tcp://").split(":")
            with plain.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with connected(controller.worker_endpoints[0]) as side, connected(controller.client_endpoints[0]) as client:
            worker = RawWorker(side)
            client.send(m.encode(m.Generate(5, "m", stream=False, prompt="hi")))
            worker.answer_one()
            assert _to_client.decode(client.recv()).choices[0].text == "hi"


def test_a_message_over_the_limit_drops_only_its_sender() -> None:
    with quiet(message_bytes=2000) as controller, connected(controller.client_endpoints[0]) as client:
        with connected(controller.client_endpoints[0]) as big:
            big.send(m.encode(m.Generate(5, "m", prompt="x" * 5000)))
        welcome = ask(client, m.Hello(m.PROTOCOL))
        assert welcome.limits.message_bytes == 2000


def test_a_worker_whose_connection_closes_is_gone_with_the_next_send() -> None:
    with quiet(ttl_s=0.3) as controller, connected(controller.client_endpoints[0]) as client:
        with connected(controller.worker_endpoints[0]) as side:
            RawWorker(side)
            assert [worker.name for worker in ask(client, m.Status(1)).status.workers] == ["raw"]
        for rid in range(2, 2000):
            if not ask(client, m.Status(rid)).status.workers:
                break
        else:
            pytest.fail("the worker is still there")


def test_its_status_can_be_read_without_this_library() -> None:
    with quiet() as controller, connected(controller.client_endpoints[0], zmq.REQ) as req:
        req.send(msgspec.msgpack.encode([7, 123]))
        tag, rid, status = msgspec.msgpack.decode(req.recv())
        assert (tag, rid, status["controller"]) == (44, 123, controller.id)


@pytest.mark.parametrize("limit", [256, 4096])
def test_too_few_file_descriptors_are_said_at_the_start(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    lines: list[str] = []
    monkeypatch.setattr("zmqserve.controller.raise_descriptor_limit", lambda: limit)
    with Controller(clients=["inproc://c"], workers=["inproc://w"], report=lambda event, **_: lines.append(event)):
        pass
    assert ("few file descriptors" in lines) is (limit == 256)
