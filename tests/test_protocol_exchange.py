"""PROTOCOL.md's whole exchange: a controller really says so, byte by byte, and its readers take what a client and a worker say there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random
from typing import Any, get_args

import msgspec
import pytest

from zmqserve import messages as m
from zmqserve.broker import Broker
from zmqserve.config import ControllerConfig
from zmqserve.delivery import SENT

PAGE = (Path(__file__).parents[1] / "PROTOCOL.md").read_text()
SECTION = PAGE[PAGE.index("\n## A whole exchange\n") : PAGE.index("\n## Worked example\n")]
EPOCH, RID, CLIENT = 0x0123456789ABCDEF, 0x1122334455667788, 1
NAMES = {EPOCH: "EPOCH", RID: "RID"}
HEADS = {*range(65, 74), *range(97, 104)}
KINDS = {value: name for name, value in vars(m).items() if isinstance(value, int) and value in HEADS}
TAGS = {kind.__struct_config__.tag: kind.__name__ for kind in (*get_args(m.FromClient), *get_args(m.ToClient))}
PAYLOADS: dict[int, type] = {m.READY: m.Ready, m.LOAD: m.Load, m.WELCOME: m.WorkerWelcome}


def shown(value: Any) -> str:
    """A decoded message as the page writes it: JSON, with bytes as 0x and the ids by name."""
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{shown(key)}: {shown(item)}' for key, item in value.items())}}}"
    return NAMES.get(value) or json.dumps(value)


class Exchange:
    """A controller without sockets, whose every word is noted as the page has it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.broker = Broker(
            ControllerConfig(),
            controller_id="c0ffee",
            version="0.1.0",
            send_client=lambda _, payload: self._note("controller to client", payload),
            send_worker=lambda _, head, payload: self._note("controller to worker", head, payload),
            report=lambda *_, **__: None,
            random=Random(1),
            new_epoch=lambda: EPOCH,
            now=0.0,
        )

    def client(self, *fields: Any) -> None:
        """A client says this."""
        payload = m.encode(fields)
        m.read(m.decoder(m.FromClient), payload)
        self._note("client to controller", payload)
        self.broker.from_client(0.0, (b"c",), payload)

    def worker(self, head: tuple[Any, ...], *payload: Any) -> None:
        """A worker says this."""
        m.read(m.decoder(m.WorkerHead), m.encode(head))
        frames = m.encode(head), m.encode(payload) if payload else b""
        self._note("worker to controller", *frames)
        self.broker.from_worker(0.0, b"w", *frames)

    def _note(self, who: str, *frames: bytes) -> int:
        head = msgspec.msgpack.decode(frames[0])
        names = [KINDS[head[0]] if len(frames) == 2 else TAGS[head[0]]]
        if len(frames) == 2 and frames[1]:
            kind = PAYLOADS.get(head[0])
            names.append(kind.__name__ if kind is not None else TAGS[msgspec.msgpack.decode(frames[1])[0]])
        self.lines.append(f"{who}: {', '.join(names)}")
        for frame in frames:
            self.lines += [f"  {frame.hex()}", f"    {shown(msgspec.msgpack.decode(frame))}"] if frame else ["  (empty)"]
        return SENT


def whole() -> str:
    """A worker registers, answers one request and leaves; the client greets, asks, Pings and cancels."""
    exchange = Exchange()
    card = {"name": "m", "fingerprint": "9f86d081884c7d65", "verbs": ["generate"]}
    exchange.worker((m.READY, 0), 1, "w1", "mine", "ready", [card], 1, 1.0, 3000)
    exchange.worker((m.LOAD, EPOCH), 0, 0, 0)
    exchange.client(1, 1)
    exchange.client(2, RID, "m", 0, None, None, 0, None, None, True, "a b c", None, None, {"max_tokens": 9})
    exchange.worker((m.FIRST, EPOCH, CLIENT, RID), 36, RID, 0, 0, "a", m.pack_ids([0]), None, card["fingerprint"])
    more = [[36, RID, 1, 0, " b", m.pack_ids([1])], [36, RID, 2, 0, " c", m.pack_ids([2])]]
    exchange.worker((m.MORE, EPOCH, CLIENT), 37, more)
    exchange.client(10, 3000, [RID])
    exchange.client(9, RID)
    done = [38, RID, 3, ["cancelled"], [3, 3], ["w1", 0.0, 1.5, 4.25]]
    exchange.worker((m.DONE, EPOCH, CLIENT, RID, "cancelled", 0, 3, 3), *done)
    exchange.broker.tick(1.0)
    exchange.worker((m.DRAINING, EPOCH))
    exchange.worker((m.BYE, EPOCH))
    return "\n".join(exchange.lines)


def test_the_page_has_the_exchange_as_it_is() -> None:
    """After a change of the example: what `whole()` returns belongs between the fences."""
    block = re.search(r"^```\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    assert block is not None
    assert block[1] == whole() + "\n"


@pytest.mark.parametrize("word", ["EPOCH = 0x0123456789abcdef", "RID = 0x1122334455667788"])
def test_the_page_says_what_its_names_stand_for(word: str) -> None:
    assert f"`{word}`" in SECTION
