"""A client and a worker of the first version: they say its golden bytes (tests/vectors/first.json) and understand no more than it knew."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec
import zmq

GOLDEN: dict[str, dict[str, Any]] = {
    entry["name"]: entry for entry in json.loads((Path(__file__).parents[1] / "vectors" / "first.json").read_text())["messages"]
}
RID, EPOCH, CLIENT = 0x1122334455667788, 0x0123456789ABCDEF, 7
"""The ids that stand in golden bytes."""
SHAPES: dict[str, Any] = {entry["type"]: entry["fields"] for entry in GOLDEN.values()}
"""Each type's fullest content: the names of its fields, in order, inside others too."""
HEADS = ("WorkerHead", "ControllerHead")
UNTAGGED = (*HEADS, "Ready", "Load", "WorkerWelcome", "Refused")
ANY_NAMES = ("data", "counters")
"""Maps whose keys are no fields."""
WAIT_MS = 10_000


def _wire(data: bytes) -> Any:
    return msgspec.msgpack.decode(data)


TAGS: dict[int, str] = {
    wire[0]: entry["type"]
    for entry in GOLDEN.values()
    if entry["type"] not in UNTAGGED and isinstance(wire := _wire(bytes.fromhex(entry["hex"])), list)
}


def golden(name: str, *, rid: int = RID, epoch: int = EPOCH, client: int = CLIENT) -> bytes:
    """The bytes of a golden message, with the ids that it must have here: every other byte is as it was published."""
    data = bytes.fromhex(GOLDEN[name]["hex"])
    at_epoch = msgspec.msgpack.encode(EPOCH)
    for old, new in (
        (at_epoch + bytes([CLIENT]), at_epoch + msgspec.msgpack.encode(client)),
        (at_epoch, msgspec.msgpack.encode(epoch)),
        (msgspec.msgpack.encode(RID), msgspec.msgpack.encode(rid)),
    ):
        data = data.replace(old, new)
    return data


def changed(name: str, **fields: Any) -> bytes:
    """The same with other values in some fields, where an exchange needs them."""
    entry = GOLDEN[name]
    wire = _wire(bytes.fromhex(entry["hex"]))
    first = len(wire) - len(entry["fields"])
    for field, value in fields.items():
        wire[first + list(entry["fields"]).index(field)] = value
    return msgspec.msgpack.encode(wire)


def understood(wire: Any, shape: Any) -> Any:
    """What a reader of then makes of a value: fields by the names that it had then, and nothing that came later."""
    if isinstance(shape, dict) and isinstance(wire, list):
        fields = wire[1:] if shape.keys() == SHAPES["Chunk"].keys() else wire
        return {name: understood(value, shape[name]) for name, value in zip(shape, fields, strict=False)}
    if isinstance(shape, dict) and isinstance(wire, dict):
        return {name: wire[name] if name in ANY_NAMES else understood(wire[name], shape[name]) for name in shape if name in wire}
    if isinstance(shape, list) and isinstance(wire, list):
        return [understood(value, shape[0]) if shape else value for value in wire]
    if isinstance(wire, bytes):
        return wire.hex()
    if wire is not None and shape is not None:
        assert isinstance(wire, type(shape)), f"{wire!r} where the first version had {shape!r}"
    return wire


class Message(NamedTuple):
    """One message as it was understood; `length` is what it really had: fields, and the tag."""

    kind: str
    fields: dict[str, Any]
    length: int


def read(data: bytes, kind: str | None = None) -> Message:
    """Understand a client's message by its tag, or any other by its type."""
    wire = _wire(data)
    if kind is not None:
        return Message(kind, understood(wire, SHAPES[kind]), len(wire))
    kind = TAGS[wire[0]]
    shape = SHAPES[kind]
    if kind == "Error":
        return Message(kind, dict(zip(shape, wire[1:], strict=False)), len(wire))
    return Message(kind, understood(wire if kind == "Chunk" else wire[1:], shape), len(wire))


class _Peer:
    def __init__(self, endpoint: str, kind: int = zmq.DEALER) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.RCVTIMEO, WAIT_MS)
        self.socket.connect(endpoint)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Be gone."""
        self.context.destroy(linger=0)


class FirstClient(_Peer):
    """A client: a DEALER, or a REQ."""

    def say(self, data: bytes) -> None:
        """Send a message."""
        self.socket.send(data)

    def hear(self) -> Message:
        """The next message."""
        return read(self.socket.recv())

    def ask(self, data: bytes) -> Message:
        """Send a message; its answer."""
        self.say(data)
        return self.hear()

    def stream(self) -> tuple[list[dict[str, Any]], Message]:
        """All chunks up to the end of a request, that of a Done included, and that end."""
        chunks: list[dict[str, Any]] = []
        while True:
            message = self.hear()
            if message.kind == "Chunk":
                chunks.append(message.fields)
            elif message.kind == "Chunks":
                chunks += message.fields["chunks"]
            else:
                chunks += [message.fields["last"]] if message.fields.get("last") else []
                return chunks, message


class FirstWorker(_Peer):
    """A worker: head and payload. It has the epoch that the last WELCOME brought."""

    def __init__(self, endpoint: str) -> None:
        super().__init__(endpoint)
        self.epoch = 0
        self.client = 0

    def say(self, head: str, payload: bytes = b"", *, rid: int = RID) -> None:
        """Send a golden head with its ids filled in, and a payload."""
        self.socket.send_multipart([golden(head, rid=rid, epoch=self.epoch, client=self.client), payload])

    def hear(self, *kinds: int) -> tuple[dict[str, Any], bytes]:
        """The next message that is no heartbeat: what its head says, and its payload. It must be of one of `kinds`."""
        while True:
            head_bytes, payload = self.socket.recv_multipart()
            head = read(head_bytes, "ControllerHead").fields
            if head["kind"] != 101 or 101 in kinds:
                assert head["kind"] in kinds, f"expected {kinds}, got {head} {payload!r}"
                return head, payload

    def welcomed(self) -> Message:
        """What the WELCOME that comes next says; its epoch is the worker's own from here on."""
        head, payload = self.hear(97)
        self.epoch = head["epoch"]
        return read(payload, "WorkerWelcome")

    def register(self) -> None:
        """As a worker does that loads its model first: ``loading``, then ``ready``."""
        self.socket.send_multipart([golden("head-ready-first"), golden("ready-minimal")])
        self.welcomed()
        self.say("head-ready", golden("ready-full"))
        self.welcomed()

    def take(self) -> tuple[int, bytes]:
        """The next request: its rid, and the client's bytes."""
        head, payload = self.hear(99)
        self.client = head["client"]
        return head["rid"], payload
