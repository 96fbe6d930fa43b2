"""Lean ends over ZeroMQ: a generator and a consumer of raw frames, with nothing, C `zmq.proxy` or a whole controller between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import zmq

from bench import lean
from bench.ports import free_port
from zmqserve import messages as m
from zmqserve.sockets import raw_calls

from .loads import MODEL, ONE, PayloadReader, Scale, Work, asked, begun, chunk, done, send_steps
from .running import Running

SNDMORE = int(zmq.SNDMORE)
Asker = bytes | int


def start_direct(running: Running) -> None:
    """Generator and consumer, connected to each other."""
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    running.spawn("worker", generator, endpoint, "direct")
    running.open_client(Consumer, endpoint)


def start_proxy(running: Running) -> None:
    """With C `zmq.proxy` between them."""
    clients, workers = running.spawn("broker", lean.proxy, "tcp", str(running.folder))
    running.spawn("worker", generator, workers, "proxy")
    running.open_client(Consumer, clients)


def start_controller(running: Running) -> None:
    """With a controller that has every feature on."""
    clients, workers = running.spawn("broker", lean.controller, "tcp", str(running.folder))
    running.spawn("worker", generator, workers, "controller")
    running.open_client(Consumer, clients)


def generator(ready: Connection, endpoint: str, way: str) -> None:
    """Does the work that requests name. `way`: what is before it. Runs until it is killed."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 100_000)
    if way == "direct":
        socket.bind(endpoint)
    else:
        socket.connect(endpoint)
    epoch = _register(socket) if way == "controller" else 0
    ready.send("ready")
    recv, send = raw_calls(socket)
    heads = m.decoder(m.ControllerHead)
    requests = m.decoder(m.Generate)
    waiting: list[tuple[Asker, int]] = []

    def answer(kind: int, client: Asker, rid: int, payload: bytes) -> None:
        if way != "direct":
            send(client if isinstance(client, bytes) else m.encode(m.WorkerHead(kind, epoch, client, rid, "length")), SNDMORE)
        send(payload, 0)

    while True:
        first = recv(0) if way != "direct" else b""
        client: Asker = first
        payload = recv(0)
        if way == "controller":
            head = heads.decode(first)
            if head.kind != m.REQUEST:
                continue
            client = head.client
        request = requests.decode(payload)
        if request.prompt == ONE:
            answer(m.DONE, client, request.rid, done(request.rid, chunk(request.rid, 0)))
            continue
        work = Work.parse(request.prompt or "")
        waiting.append((client, request.rid))
        if len(waiting) < work.streams:
            continue
        rids = [rid for _, rid in waiting]
        for (each, rid), first in zip(waiting, begun(rids), strict=True):
            answer(m.FIRST, each, rid, first)
        more = m.more_head(epoch, client) if isinstance(client, int) else client

        def leave(messages: list[bytes], more: bytes = more) -> None:
            for message in messages:
                if way != "direct":
                    send(more, SNDMORE)
                send(message, 0)

        send_steps(rids, work, leave)
        for each, rid in waiting:
            answer(m.DONE, each, rid, done(rid))
        waiting.clear()


def _register(socket: zmq.Socket[bytes]) -> int:
    card = m.ModelCard(MODEL, verbs=["generate"])
    offer = m.Ready(m.PROTOCOL, "lean", "bench", "ready", [card], 100_000, 1.0, 3_600_000)
    socket.send_multipart([m.encode(m.WorkerHead(m.READY, 0)), m.encode(offer)])
    welcome: m.ControllerHead = m.decoder(m.ControllerHead).decode(socket.recv_multipart()[0])
    return welcome.epoch


class Consumer(PayloadReader):
    """Counts what comes, and decodes it when that is asked."""

    def __init__(self, endpoint: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVHWM, 100_000)
        socket.setsockopt(zmq.RCVTIMEO, 60_000)
        socket.connect(endpoint)
        self._recv: Any
        self._recv, self._send = raw_calls(socket)
        self._socket = socket

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""
        recv, send = self._recv, self._send
        rid, answered = scale.in_flight, 0
        for each in range(1, rid + 1):
            send(asked(each, ONE), 0)
        began_s = time.perf_counter()
        end_s = began_s + scale.run_s
        while time.perf_counter() < end_s:
            recv(0)
            answered += 1
            rid += 1
            send(asked(rid, ONE), 0)
        spent_s = time.perf_counter() - began_s
        for _ in range(scale.in_flight):
            recv(0)
        return answered, spent_s

    def _read(self, work: Work, take: Callable[[bytes], bool]) -> None:
        prompt, recv = work.text, self._recv
        for rid in range(1, work.streams + 1):
            self._send(asked(rid, prompt), 0)
        while not take(recv(0)):
            pass
