"""From the engine to one controller, on the engine's event loop: chunks are gathered per client and handed to the socket thread.

The first chunk of a request never waits; later ones of all of a client's requests leave as one message at the end of the
event loop's turn in which they were made, without a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from .messages import Chunk, Chunks, encode, more_head

if TYPE_CHECKING:
    from .answers import Answer
    from .link import ControllerLink

GATHER_BYTES = 2**20
"""Gathered chunks that may be longer than this together leave before the turn ends: a message must not get over the limit, and
a backend that never pauses must notice that its lane is congested."""


class Outbound(Protocol):
    """The way to the thread that owns the sockets."""

    def behind(self, lane: Lane) -> bool:
        """Whether more is made than leaves: for this lane's controller, or for all together."""

    def pauses(self, lane: Lane) -> bool:
        """Whether the lane is congested and will stay so for now."""

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        """Send it soon. `ended`: with it this answer's slot is free. Empty frames only free the slot."""

    def wake(self) -> None:
        """Something was posted."""


class Lane:
    """The way back to one controller during one registration. A later registration has another Lane.

    Two threads use it, without a lock: each attribute has one writer. The engine writes `posted_bytes`, the socket thread
    `taken_bytes`, `gone_bytes` (taken and out of the outbox too), `yours` and `alive`. What is posted and not gone waits;
    beyond a limit the lane is `congested`, and generation pauses. `message_bytes`: a larger message breaks the connection, and
    with it all that runs for this controller.
    """

    __slots__ = (
        "alive",
        "answers",
        "congested",
        "epoch",
        "gathers",
        "gone_bytes",
        "link",
        "message_bytes",
        "out",
        "posted_bytes",
        "taken_bytes",
        "waiters",
        "yours",
    )

    def __init__(self, link: ControllerLink, epoch: int, out: Outbound, message_bytes: int) -> None:
        self.link = link
        self.epoch = epoch
        self.out = out
        self.message_bytes = message_bytes
        self.alive = True
        self.congested = False
        self.posted_bytes = 0
        self.taken_bytes = 0
        self.gone_bytes = 0
        self.yours = 0
        self.answers: dict[tuple[int, int], Answer] = {}
        self.gathers: dict[int, Gather] = {}
        self.waiters: list[asyncio.Future[None]] = []

    def __repr__(self) -> str:
        return f"Lane(epoch={self.epoch}, {len(self.answers)} answers, {self.posted_bytes - self.gone_bytes} bytes waiting)"

    def post(self, head: bytes, payload: bytes, ended: Answer | None = None) -> None:
        """Hand a message over, and note when the controller takes less than the engine makes."""
        self.posted_bytes += len(head) + len(payload)
        self.out.post(self, head, payload, ended)
        if self.out.behind(self):
            # The other thread looks at the flag after it has sent something: set it, then look once more.
            self.congested = True
            if not self.out.behind(self):
                self.congested = False

    def relieved(self) -> None:
        """The controller takes messages again."""
        self.congested = False
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def relief(self) -> None:
        """Wait until the lane is not congested."""
        while self.congested:
            waiter = asyncio.get_running_loop().create_future()
            self.waiters.append(waiter)
            await waiter


class Gather:
    """The chunks for one client that were made in this turn of the event loop."""

    __slots__ = ("bound_bytes", "chunks", "client", "head", "lane", "most_bytes", "turn", "users")

    def __init__(self, lane: Lane, client: int, turn: Turn) -> None:
        self.lane = lane
        self.client = client
        self.turn = turn
        self.head = more_head(lane.epoch, client)
        self.users = 0
        self.chunks: list[Chunk] = []
        self.bound_bytes = 0
        self.most_bytes = min(GATHER_BYTES, lane.message_bytes)

    def __repr__(self) -> str:
        return f"Gather(client={self.client}, {len(self.chunks)} chunks)"

    def add(self, chunk: Chunk, bound_bytes: int) -> None:
        """One more, no longer than `bound_bytes` in a message. What would make the message too long leaves without it."""
        if self.bound_bytes + bound_bytes > self.most_bytes and self.chunks:
            self.flush()
            self.lane.out.wake()
        if not self.chunks:
            self.turn.add(self)
        self.chunks.append(chunk)
        self.bound_bytes += bound_bytes

    def flush(self) -> None:
        """Let them leave as one message."""
        chunks = self.chunks
        if chunks:
            self.chunks = []
            self.bound_bytes = 0
            if self.lane.alive:
                self.lane.post(self.head, encoded(chunks[0] if len(chunks) == 1 else Chunks(chunks)))


class Turn:
    """Flushes what was gathered, at the end of the event loop's turn. `stepped_s`: when, by the clock `now`, anything was last made."""

    __slots__ = ("_call_soon", "_gathers", "_wake", "now", "stepped_s")

    def __init__(self, call_soon: Callable[[Callable[[], None]], object], wake: Callable[[], None], now: Callable[[], float]) -> None:
        self.now = now
        self._call_soon = call_soon
        self._wake = wake
        self._gathers: list[Gather] = []
        self.stepped_s = now()

    def __repr__(self) -> str:
        return f"Turn({len(self._gathers)} clients)"

    def add(self, gather: Gather) -> None:
        """`gather` gets its first chunk."""
        if not self._gathers:
            self._call_soon(self._end)
        self._gathers.append(gather)

    def _end(self) -> None:
        gathers, self._gathers = self._gathers, []
        self.stepped_s = self.now()
        for gather in gathers:
            gather.flush()
        self._wake()


def encoded(message: msgspec.Struct) -> bytes:
    """The message as bytes, whatever a backend put into its texts: one bad text must not cost others theirs."""
    try:
        return encode(message)
    except UnicodeEncodeError:
        return encode(clean(msgspec.to_builtins(message, builtin_types=(bytes,))))


def clean(value: Any) -> Any:
    """Half a surrogate pair, which JSON can bring in, is no text that can be sent: it becomes a question mark."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    return {name: clean(item) for name, item in value.items()} if isinstance(value, dict) else value
