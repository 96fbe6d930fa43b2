"""A relay with a broker over real sockets in one thread, and peers on inproc, where what was sent can be received at once."""

from __future__ import annotations

from random import Random

import zmq

from zmqserve import messages as m
from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.port import Port
from zmqserve.relay import Relay
from zmqserve.sockets import SocketLimits, router

from .network import card

PATIENCE_MS = 20_000


def piece(rest: bytes) -> bytes:
    """A payload of MORE, as far as a controller looks at it: an array that begins with the tag of a Chunk."""
    return b"\x97\x24" + rest


class Rig:
    """A relay with a broker, and peers on inproc, where what was sent can be received at once."""

    def __init__(
        self, *, compiled: bool = True, outbox_bytes: int = 1000, pipe_messages: int = 512, outbox_total_bytes: int = 10**9
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.now = 0.0
        self.sockets: list[zmq.Socket[bytes]] = []
        limits = SocketLimits(pipe_messages=pipe_messages)
        ports = []
        for name in ("clients", "workers"):
            socket = self._keep(router(self.context, limits))
            socket.bind(f"inproc://{name}")
            ports.append(Port(socket, outbox_bytes, compiled, outbox_total_bytes))
        self.clients, self.workers = ports
        self._epochs = 0
        self.broker = Broker(
            ControllerConfig(outbox_bytes=outbox_bytes, outbox_total_bytes=outbox_total_bytes),
            controller_id="here",
            version="0",
            send_client=lambda envelope, payload: self.clients.post(*envelope, payload),
            send_worker=self.workers.send,
            post_worker=self.workers.post,
            report=lambda event, **fields: None,
            random=Random(1),
            new_epoch=self._new_epoch,
            now=self.now,
        )
        self.relay = Relay(self.broker, self.clients, self.workers)

    def _new_epoch(self) -> int:
        self._epochs += 1
        return 10**12 + self._epochs

    def _keep(self, socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        self.sockets.append(socket)
        return socket

    def connect(self, name: str, kind: int = zmq.DEALER, *, identity: bytes = b"", receives: int = 512) -> Peer:
        socket = self._keep(self.context.socket(kind))
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, receives)
        if identity:
            socket.setsockopt(zmq.IDENTITY, identity)
        socket.connect(f"inproc://{name}")
        return Peer(self, socket)

    def worker(self, name: str, *, identity: bytes = b"", slots: int = 8) -> Peer:
        peer = self.connect("workers", identity=identity)
        ready = m.Ready(m.PROTOCOL, name, "fake", "ready", [card()], slots, 1.0, 3000)
        peer.send(m.encode(m.WorkerHead(m.READY, 0)), m.encode(ready))
        self.pump()
        head = self.head(peer)
        if head.kind == m.REREGISTER:  # the message before it left the relay unsure
            peer.send(m.encode(m.WorkerHead(m.READY, head.epoch)), m.encode(ready))
            self.pump()
            head = self.head(peer)
        assert head.kind == m.WELCOME
        peer.epoch = head.epoch
        return peer

    def head(self, peer: Peer) -> m.ControllerHead:
        head: m.ControllerHead = m.read(m.decoder(m.ControllerHead), peer.recv()[0])
        return head

    def pump(self) -> None:
        """Let the relay read all there is."""
        for _ in range(2):
            self.relay.from_clients(self.now, 10_000)
            self.relay.from_workers(self.now, 10_000)

    def flight(self, client: Peer, worker: Peer, rid: int = 1) -> int:
        """A request of the client that runs on the worker; returns the client's number."""
        client.send(m.encode(m.Generate(rid, "m", prompt="hi")))
        self.pump()
        head = self.head(worker)
        assert head.kind == m.REQUEST
        return head.client

    def close(self) -> None:
        for socket in self.sockets:
            socket.close(linger=0)
        self.context.term()


class Peer:
    """A DEALER or REQ of somebody's own."""

    def __init__(self, rig: Rig, socket: zmq.Socket[bytes]) -> None:
        self.rig, self.socket = rig, socket
        self.epoch = 0

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart(frames, zmq.NOBLOCK)

    def more(self, number: int, payload: bytes, *extra: bytes) -> None:
        self.send(m.more_head(self.epoch, number), payload, *extra)

    def recv(self) -> list[bytes]:
        assert self.socket.poll(PATIENCE_MS), "nothing came"
        return self.socket.recv_multipart()

    def got(self) -> list[list[bytes]]:
        """All that has come."""
        messages = []
        while self.socket.poll(0):
            messages.append(self.socket.recv_multipart())
        return messages
