"""NATS with ends written like the lean ones over ZeroMQ: plain sockets, no event loop; what there is to send leaves in one call."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from zmqserve import messages as m

from .loads import ONE, PayloadReader, Scale, Work, asked, begun, chunk, done, send_steps
from .nats_server import INBOX, WORK, start_server
from .running import Running


def start(running: Running) -> None:
    """nats-server, a generator and a consumer."""
    port = start_server(running)
    running.spawn("worker", generator, port)
    running.open_client(Consumer, port)


class Wire:
    """One connection to nats-server."""

    def __init__(self, port: int, subject: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.settimeout(60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(b'CONNECT {"verbose":false,"pedantic":false,"lang":"raw","version":"0"}\r\nSUB ' + subject + b" 1\r\nPING\r\n")
        self._buffer = b""
        while b"PONG\r\n" not in self._buffer:
            self._buffer += self._socket.recv(65536)
        self._buffer = self._buffer.partition(b"PONG\r\n")[2]

    def received(self) -> list[bytes]:
        """Payloads that are there, or the next."""
        payloads: list[bytes] = []
        buffer, place = self._buffer, 0
        while True:
            end = buffer.find(b"\r\n", place)
            if end >= 0 and buffer.startswith(b"MSG", place):
                begin = end + 2
                after = begin + int(buffer[buffer.rindex(b" ", place, end) : end]) + 2
                if len(buffer) >= after:
                    payloads.append(buffer[begin : after - 2])
                    place = after
                    continue
            elif end >= 0:
                if buffer.startswith(b"PING", place):
                    self._socket.sendall(b"PONG\r\n")
                place = end + 2
                continue
            if payloads:
                self._buffer = buffer[place:]
                return payloads
            more = self._socket.recv(2**17)
            if not more:
                raise ConnectionError("nats-server closed the connection")
            buffer, place = buffer[place:] + more, 0

    def publish(self, subject: bytes, payloads: list[bytes]) -> None:
        """Send them together."""
        self._socket.sendall(b"".join([b"PUB %b %d\r\n%b\r\n" % (subject, len(payload), payload) for payload in payloads]))


def generator(ready: Connection, port: int) -> None:
    """Does the work that requests name, until it is killed."""
    wire = Wire(port, WORK.encode())
    ready.send("ready")
    requests = m.decoder(m.Generate)
    inbox = INBOX.encode()
    waiting: list[int] = []
    while True:
        ended: list[bytes] = []
        for payload in wire.received():
            request = requests.decode(payload)
            if request.prompt == ONE:
                ended.append(done(request.rid, chunk(request.rid, 0)))
                continue
            work = Work.parse(request.prompt or "")
            waiting.append(request.rid)
            if len(waiting) == work.streams:
                wire.publish(inbox, begun(waiting))
                send_steps(waiting, work, lambda messages: wire.publish(inbox, messages))
                ended = [done(rid) for rid in waiting]
                waiting.clear()
        wire.publish(inbox, ended)


class Consumer(PayloadReader):
    """Counts what comes, and decodes it when that is asked."""

    def __init__(self, port: int) -> None:
        self._wire = Wire(port, INBOX.encode())

    def requests(self, scale: Scale) -> tuple[int, float]:
        """Answers of one chunk, and seconds: a new request for each answer, until the time is over."""
        wire, subject = self._wire, WORK.encode()
        rid, answered = scale.in_flight, 0
        wire.publish(subject, [asked(each, ONE) for each in range(1, rid + 1)])
        began_s = time.perf_counter()
        end_s = began_s + scale.run_s
        while time.perf_counter() < end_s:
            came = len(wire.received())
            answered += came
            wire.publish(subject, [asked(each, ONE) for each in range(rid + 1, rid + 1 + came)])
            rid += came
        spent_s = time.perf_counter() - began_s
        left = scale.in_flight
        while left:
            left -= len(wire.received())
        return answered, spent_s

    def _read(self, work: Work, take: Callable[[bytes], bool]) -> None:
        prompt = work.text
        self._wire.publish(WORK.encode(), [asked(rid, prompt) for rid in range(1, work.streams + 1)])
        over = False
        while not over:
            for data in self._wire.received():
                over = take(data)
