"""Floods of attempts, each from a process of its own: `attack` runs one until it is told to stop and says how many it made."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import zmq

from zmqserve import messages as m
from zmqserve.certificate import read_pair, read_public
from zmqserve.sockets import raise_descriptor_limit

from .chaos_child import end_with_parent
from .zmtp import COMMAND, frame, greeting

SILENT = 5000
"""Connections open at a time. A controller ends each of them after a second."""
EVENLY_S, AT_ONCE_S = 0.005, 1.5
"""From one time that connections are opened to the next: 25 each time, or all of them, when those of the last time have been ended."""
OPENED_PER_S = 5000
"""At most, of those that are opened evenly."""
HANDSHAKES_PER_S = 1000
REGISTRATIONS_PER_S = 2000


def silent(over: Callable[[], bool], endpoint: str, _keys: dict[str, str]) -> int:
    """5,000 connections that never say a word; those that are ended are opened again, evenly."""
    return _silent(over, endpoint, EVENLY_S, round(OPENED_PER_S * EVENLY_S))


def silent_at_once(over: Callable[[], bool], endpoint: str, _keys: dict[str, str]) -> int:
    """The same, all of them opened at once: so they are all ended at once, too."""
    return _silent(over, endpoint, AT_ONCE_S, SILENT)


def _silent(over: Callable[[], bool], endpoint: str, each_s: float, most: int) -> int:
    """Each time at most so many are opened."""
    address = _address(endpoint)
    there: dict[int, socket.socket] = {}
    poll = select.poll()
    next_s, made = time.monotonic(), 0
    while not over():
        if time.monotonic() >= next_s:
            next_s += each_s
            for _ in range(min(most, SILENT - len(there))):
                one = socket.socket()
                one.setblocking(False)
                with suppress(BlockingIOError):
                    one.connect(address)
                there[one.fileno()] = one
                poll.register(one, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
                made += 1
        for fd, _ in poll.poll(5):
            poll.unregister(fd)
            there.pop(fd).close()
    for one in there.values():
        one.close()
    return made


def bad_handshakes(over: Callable[[], bool], endpoint: str, _keys: dict[str, str]) -> int:
    """1,000 a second: half of them no ZMTP at all, half a CURVE handshake that is made up."""
    said = (b"\xff" * 70, greeting(b"CURVE") + frame(b"\x05HELLO" + bytes(194), COMMAND))
    address = _address(endpoint)
    return _paced(over, HANDSHAKES_PER_S, lambda number: _say(address, said[number % len(said)]))


def registrations(over: Callable[[], bool], endpoint: str, keys: dict[str, str]) -> int:
    """2,000 a second of one name, on one connection."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    if keys:
        own = read_pair(_path(keys["key"]))
        dealer.curve_publickey, dealer.curve_secretkey = own.public, own.secret
        dealer.curve_serverkey = read_public(_path(keys["controller_key"])).encode()
    dealer.connect(endpoint)
    offer = m.encode(m.Ready(m.PROTOCOL, "flood", "raw", "ready", [m.ModelCard("flood")], 4, 1.0, 3000))
    head = m.encode(m.WorkerHead(m.READY, 0))

    def register(_number: int) -> None:
        with suppress(zmq.Again):
            dealer.send_multipart([head, offer], zmq.NOBLOCK)
            while True:
                dealer.recv_multipart(zmq.NOBLOCK)

    made = _paced(over, REGISTRATIONS_PER_S, register)
    dealer.close(0)
    context.term()
    return made


FLOODS: dict[str, Callable[[Callable[[], bool], str, dict[str, str]], int]] = {
    "5,000 silent connections": silent,
    "5,000 silent connections at once": silent_at_once,
    "1,000 bad handshakes/s": bad_handshakes,
    "2,000 registrations/s of one name": registrations,
}


@contextmanager
def flood(name: str, endpoint: str, keys: dict[str, str], made: list[int]) -> Iterator[None]:
    """While this lasts a process makes these attempts; how many is then appended to `made`."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_run, args=(there, name, endpoint, keys), daemon=True)
    process.start()
    there.close()
    here.recv()
    try:
        yield
    finally:
        here.send("stop")
        made.append(here.recv())
        process.join()


def _run(pipe: Connection, name: str, endpoint: str, keys: dict[str, str]) -> None:
    import os

    end_with_parent(os.getppid())
    raise_descriptor_limit()
    pipe.send("ready")
    pipe.send(FLOODS[name](pipe.poll, endpoint, keys))


def _paced(over: Callable[[], bool], per_s: int, act: Callable[[int], Any]) -> int:
    began_s, made = time.monotonic(), 0
    while not over():
        due = int((time.monotonic() - began_s) * per_s)
        for number in range(made, due):
            act(number)
        made = max(made, due)
        time.sleep(0.005)
    return made


def _say(address: tuple[str, int], data: bytes) -> None:
    with suppress(OSError), socket.create_connection(address, 1.0) as one:
        one.sendall(data)


def _address(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return host, int(port)


def _path(name: str) -> Any:
    from pathlib import Path

    return Path(name)
