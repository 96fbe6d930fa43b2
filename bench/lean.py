"""Lean endpoints for the transport benchmark: raw frames, nothing decoded that need not be, so that the broker is what is measured.

Each runs in a process of its own. A network under test is either a `Controller` with every feature on, or C `zmq.proxy`
(ROUTER to DEALER, no dispatch, no liveness), which carries the same payloads in as many frames.
"""

from __future__ import annotations

import resource
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeAlias

import zmq

from zmqserve import curve
from zmqserve import messages as m
from zmqserve.certificate import read_pair, read_public
from zmqserve.cli import main as cli
from zmqserve.controller import Controller
from zmqserve.curve import Curve
from zmqserve.sockets import Binding

Asker: TypeAlias = int | bytes
"""Who gets an answer: a client's number at a controller, its routing id behind a proxy."""

MODEL = "bench"
_TEXT = "x" * 20


def make_keys(folder: str) -> None:
    """A controller's folder of keys, and in it the pairs of a client and a worker, which it allows."""
    cli(["keys", "init", folder])
    for role in ("client", "worker"):
        cli(["keys", "new", role, "--dir", folder])
        cli(["keys", "allow", folder, role, f"{folder}/{role}.key"])


def prove(socket: zmq.Socket[bytes], keys: str, role: str) -> None:
    """Before it connects to a controller with these keys; none without any."""
    if keys:
        curve.identify(socket, Curve(read_pair(Path(keys, f"{role}.key_secret")), read_public(Path(keys, f"{role}s-port.key"))))


def controller(ready: Connection, transport: str, folder: str, keys: str = "", busy_poll_us: float = 0) -> None:
    """A controller until the pipe says stop; then its CPU seconds go back. `keys`: see make_keys."""
    clients, workers = _endpoints(transport, folder, "curve" if keys else "controller")
    served = Controller(
        clients=[clients], workers=[workers], curve_dir=keys or None, busy_poll_us=busy_poll_us, report=lambda *_a, **_k: None
    )
    served.start()
    ready.send((served.client_endpoints[0], served.worker_endpoints[0]))
    _serve_cpu_seconds(ready)
    served.stop()


def proxy(ready: Connection, transport: str, folder: str) -> None:
    """C `zmq.proxy` until the pipe says stop."""
    context = zmq.Context()
    front, back = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    for socket in (front, back):
        socket.setsockopt(zmq.SNDHWM, 0)  # a ROUTER without ROUTER_MANDATORY drops what is beyond it, and the run would never end
    control = context.socket(zmq.PAIR)
    control.bind("inproc://control")
    bound = [Binding(socket, endpoint) for socket, endpoint in zip((front, back), _endpoints(transport, folder, "proxy"), strict=True)]
    ready.send((bound[0].endpoint, bound[1].endpoint))

    def relay() -> None:
        listener = context.socket(zmq.PAIR)
        listener.connect("inproc://control")
        zmq.proxy_steerable(front, back, None, listener)
        listener.close(0)

    thread = threading.Thread(target=relay)
    thread.start()
    _serve_cpu_seconds(ready)
    control.send(b"TERMINATE")
    thread.join()
    for socket in (front, back, control):
        socket.close(0)
    context.term()


def _endpoints(transport: str, folder: str, name: str) -> tuple[str, str]:
    if transport == "tcp":
        return "tcp://127.0.0.1:*", "tcp://127.0.0.1:*"
    return f"ipc://{folder}/{name}-c.ipc", f"ipc://{folder}/{name}-w.ipc"


def _serve_cpu_seconds(pipe: Connection) -> None:
    while pipe.recv() != "stop":
        used = resource.getrusage(resource.RUSAGE_SELF)
        pipe.send(used.ru_utime + used.ru_stime)


def worker(ready: Connection, endpoint: str, registers: bool, streams: int, tokens: int, step: bool, keys: str = "") -> None:
    """Answers each request with one message (`tokens` 0), or waits for `streams` requests and streams `tokens` to each.

    With `step` the tokens of all streams at one position leave as one message. Runs until it is killed.
    """
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    prove(socket, keys, "worker")
    socket.connect(endpoint)
    heads = m.decoder(m.ControllerHead)
    epoch = 0
    if registers:
        card = m.ModelCard(MODEL, verbs=["generate"])
        offer = m.Ready(m.PROTOCOL, "lean", "bench", "ready", [card], 100_000, 1.0, 3_600_000)
        socket.send_multipart([m.encode(m.WorkerHead(m.READY, 0)), m.encode(offer)])
        epoch = heads.decode(socket.recv_multipart()[0]).epoch
    ready.send("ready")
    waiting: list[tuple[int, Asker]] = []
    client: Asker
    while True:
        first, _payload = socket.recv_multipart()
        if not registers:
            client, rid = first, m.decoder(m.Peek).decode(_payload).rid
        else:
            head = heads.decode(first)
            if head.kind != m.REQUEST:
                continue
            client, rid = head.client, head.rid
        if not tokens:
            done = m.encode(_done(rid, m.Chunk(rid, 0, 0, _TEXT, b"\1\0\0\0")))
            socket.send_multipart([_head(m.DONE, epoch, client, rid), done])
            continue
        waiting.append((rid, client))
        if len(waiting) == streams:
            _stream(socket, epoch, waiting, tokens, step)
            waiting.clear()


def _stream(socket: zmq.Socket[bytes], epoch: int, requests: list[tuple[int, Asker]], tokens: int, step: bool) -> None:
    chunks = [m.Chunk(rid, 1, 0, _TEXT, b"\1\0\0\0") for rid, _client in requests]
    client = requests[0][1]
    for rid, _client in requests:
        socket.send_multipart([_head(m.FIRST, epoch, client, rid), m.encode(m.Chunk(rid, 0, 0, _TEXT, b"\1\0\0\0"))])
    more = client if isinstance(client, bytes) else m.more_head(epoch, client)
    payloads = [m.encode(m.Chunks(chunks))] if step else [m.encode(chunk) for chunk in chunks]
    send = socket.send
    for _ in range(tokens - 1):
        for payload in payloads:
            send(more, zmq.SNDMORE)
            send(payload)
    for rid, _client in requests:
        socket.send_multipart([_head(m.DONE, epoch, client, rid), m.encode(_done(rid, None))])


def _head(kind: int, epoch: int, client: Asker, rid: int) -> bytes:
    return client if isinstance(client, bytes) else m.encode(m.WorkerHead(kind, epoch, client, rid, "length"))


def _done(rid: int, last: m.Chunk | None) -> m.Done:
    return m.Done(rid, 1, ["length"], m.Usage(1, 1), m.Timings("lean"), last)


def round_trips(socket: zmq.Socket[bytes], count: int) -> list[float]:
    """Seconds of each of `count` requests, one after the other."""
    spent = []
    for rid in range(1, count + 1):
        payload = m.encode(m.Generate(rid, MODEL, prompt=_TEXT))
        began = time.perf_counter()
        socket.send(payload)
        socket.recv()
        spent.append(time.perf_counter() - began)
    return spent


def consume(socket: zmq.Socket[bytes], streams: int) -> float:
    """Open `streams` requests, read until each is done; returns seconds from the first chunk to the end."""
    for rid in range(1, streams + 1):
        socket.send(m.encode(m.Generate(rid, MODEL, prompt=_TEXT)))
    done_tag = m.encode(_done(1, None))[:2]
    began, left = 0.0, streams
    recv = socket.recv
    while left:
        data = recv()
        began = began or time.perf_counter()
        if data[:2] == done_tag:
            left -= 1
    return time.perf_counter() - began
