"""One worker's dealings with one controller, without a socket, a thread or a clock: `now` and messages are fed in.

::

    registering ──WELCOME──> registered ──REREGISTER, broken connection, fresh socket──> registering
         └──REFUSED, for good──> refused ──ask_again()──> registering      close() from anywhere ──> closed

`silent` is beside these: the controller's lease ended. What runs for it runs on and its frames wait, until it is heard again
(then they leave) or a WELCOME or REREGISTER says that it no longer knows them (then they are dropped).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf
from random import Random
from typing import TypeAlias

from .errors import MalformedMessage, ProtocolMismatch, Unauthenticated
from .linkhost import LinkHost
from .liveness import BEATS_PER_TTL, Lease
from .messages import (
    BEAT,
    BUSY,
    BYE,
    CANCEL,
    DRAIN,
    DRAINING,
    LOAD,
    PROTOCOL,
    READY,
    REFUSED,
    REQUEST,
    REREGISTER,
    WELCOME,
    ControllerHead,
    Refused,
    WorkerHead,
    WorkerWelcome,
    decoder,
    encode,
    read,
)

Send: TypeAlias = Callable[[bytes, bytes], bool]
"""Gives head and payload to the pipe; False when it does not take them now."""

REGISTER_RETRY_S = 1.0
MOST_REFUSED_S = 60.0
"""However long a controller says that a worker should wait, it is asked again by then: others may have its endpoint, and other rules."""
SETTLE_S = 0.01
"""libzmq tells of a broken connection just before it lets go of the pipe, which would still take, and lose, a message."""
LOAD_GAP_S = 0.02
"""Least time between two LOADs."""
SILENT_TTLS = 2
"""A connection that brought nothing for so many ttls is replaced by a fresh one ..."""
FRESH_SOCKET_S = (2.0, 4.0)
"""... and again after a time between these: a long outage is never followed by a long wait."""

INPROC_FRESH_TTLS = 2 / BEATS_PER_TTL
"""libzmq never connects inproc again, and its pipe, broken or full, just takes nothing: after two missed beats it is broken."""

_heads = decoder(ControllerHead)
_welcomes = decoder(WorkerWelcome)
_refusals = decoder(Refused)


class ControllerLink:
    """Registers, beats, answers BUSY and keeps frames in order while the pipe takes none.

    The owner calls `received` for each message, `tick` at the time that the last `tick` returned (and after anything
    else), and `writable` when the pipe takes messages again while `blocked` is set. `ttl_s` is the worker's own: the
    controller's comes in its WELCOME, and with it `message_bytes`, what it takes as one message (0: unknown). `stale_frames` and
    `bad_frames` count what was dropped.
    """

    def __init__(self, endpoint: str, host: LinkHost, send: Send, *, ttl_s: float, random: Random, now: float) -> None:
        self.endpoint = endpoint
        self.controller = ""
        self.epoch = 0
        self.state = "registering"
        self.silent = False
        self.refusal: Refused | None = None
        self.blocked = False
        self.message_bytes = 0
        self.outbox_bytes = 0
        self.stale_frames = 0
        self.bad_frames = 0
        self._inproc = endpoint.startswith("inproc://")
        self._host = host
        self._send = send
        self._random = random
        self._beat_every_s = ttl_s / BEATS_PER_TTL
        self._lease = Lease(ttl_s, now)
        self._due_s = now
        self._beat_s = -inf
        self._asked_s = inf
        self._fresh_s = now
        self._shut_out = False
        self._renews = False
        self._ready_changed = False
        self._unanswered = 0
        self._readies = 0
        self._draining = False
        self._told_draining = False
        self._outbox: deque[tuple[bytes, bytes]] = deque()

    def __repr__(self) -> str:
        silent = ", silent" if self.silent else ""
        return f"ControllerLink({self.endpoint!r}, {self.state}{silent}, epoch={self.epoch}, {len(self._outbox)} frames waiting)"

    @property
    def known(self) -> bool:
        """Whether the controller has taken what `host.ready()` says."""
        return self.state == "registered" and not self._ready_changed and not self._unanswered

    # --- time ---------------------------------------------------------------------------------

    def tick(self, now: float) -> float:
        """Do what is due; returns when to call again."""
        if self.state in ("refused", "closed"):
            return inf
        if now - self._asked_s > self._lease.ttl_s / 2:
            # This process was stopped for a while: what the controller said meanwhile is still in the socket.
            self._lease.heard_s = max(self._lease.heard_s, now)
        if now >= self._due_s and not self._renews:
            if self.state == "registered":
                self._beat(now)
            else:
                self._register(now)
        if not self.silent and self._lease.expired(now):
            self.silent = True
            self._host.changed(self)
        fresh_s = self._fresh_due_s()
        if now >= fresh_s:
            self._replace(now)
            fresh_s = self._fresh_due_s()
        self._asked_s = min(self._due_s, fresh_s, inf if self.silent else self._lease.ends_s)
        return self._asked_s

    def writable(self, now: float) -> None:
        """The pipe takes messages again: the connection is back, or its queue has room."""
        self.blocked = False
        self._fresh_s = now + self._fresh_gap_s()
        self._due_s = now
        self._flush()

    def disconnected(self, now: float) -> None:
        """The connection has broken. To the controller the next one is a stranger's: what runs for it is lost to it."""
        if self.state in ("registering", "registered"):
            self._unregister("registering")
            self._readies = 0
            self.blocked = False
            self._due_s = inf if self._draining else now + SETTLE_S

    def shut_out(self, now: float, why: str) -> None:
        """A handshake failed, because of keys that may be others in a while. libzmq tries no more then: the connection is replaced."""
        if self.state not in ("refused", "closed") and not self._shut_out:
            self._shut_out = True
            self._fresh_s = now + (gap_s := self._fresh_gap_s())
            self._refused(now, Refused(Unauthenticated.code, why, round(gap_s * 1000)))

    def give_up(self, now: float) -> None:
        """The controller takes too little: what runs for it is lost to it, as by a break, and the next `tick` asks for a fresh connection.

        Not at once: this may be called while the connection is being read.
        """
        if self.state in ("registering", "registered"):
            self._renews = True
            self.disconnected(now)

    def ask_again(self, now: float) -> None:
        """After a refusal for good: register once more in some seconds, on a fresh connection. What became of the old one is not known."""
        if self.state == "refused":
            self.state = "registering"
            self.refusal = None
            self._readies = 0
            self._due_s = inf
            self._shut_out = True
            # Of two that refuse each other one shall be first.
            self._fresh_s = self._lease.heard_s = now + self._fresh_gap_s()

    def others_changed(self, now: float) -> None:
        """The worker's load for other controllers changed: say so soon."""
        if self.state == "registered":
            self._due_s = min(self._due_s, max(now, self._beat_s + LOAD_GAP_S))

    # --- what the worker says -----------------------------------------------------------------

    def announce(self) -> None:
        """`host.ready()` has changed: tell the controller, now or when it has welcomed us."""
        self._ready_changed = True
        self._tell_ready()

    def post(self, epoch: int, head: bytes, payload: bytes) -> None:
        """Send, after what waits already. Frames of a registration that is over are dropped: nobody expects them."""
        if epoch != self.epoch or not epoch:
            self.stale_frames += 1
        elif self._outbox or self.silent or not self._try(head, payload):
            self._outbox.append((head, payload))
            self.outbox_bytes += len(head) + len(payload)

    def drain(self) -> None:
        """Tell the controller that no more work is wanted. From now on the link does not register again."""
        if not self._draining:
            self._draining = True
            self._tell_draining()
            if self.state == "registering":
                self._due_s = inf

    def close(self) -> None:
        """Say BYE, if there is somebody to say it to."""
        if self.state == "registered":
            self._flush()
            self._try(encode(WorkerHead(BYE, self.epoch)), b"")
        self._unregister("closed")

    # --- what the controller says -------------------------------------------------------------

    def received(self, now: float, head: bytes, payload: bytes) -> None:
        """A message came. What is not the protocol, or not of this registration, is counted and dropped."""
        if self.state in ("refused", "closed"):
            return
        try:
            message = read(_heads, head)
        except MalformedMessage:
            self.bad_frames += 1
            return
        self._lease.heard_s = now
        was_silent, self.silent, before = self.silent, False, self.state
        try:
            self._handle(now, message, payload)
        except MalformedMessage:
            self.bad_frames += 1
        if was_silent:
            self._flush()
            if self.state == before:
                self._host.changed(self)

    def _handle(self, now: float, message: ControllerHead, payload: bytes) -> None:
        kind = message.kind
        if kind == WELCOME:
            self._welcomed(now, message.epoch, read(_welcomes, payload))
        elif kind == REFUSED:
            self._refused(now, read(_refusals, payload))
        elif kind == REREGISTER:
            self._reregister(now, message.epoch)
        elif message.epoch != self.epoch or self.state != "registered":
            self.stale_frames += 1
        elif kind == REQUEST and message.rid:
            if not self._host.offer(self, message, payload):
                self.post(self.epoch, encode(WorkerHead(BUSY, self.epoch, message.client, message.rid)), b"")
        elif kind == CANCEL:
            self._host.cancel(self, message.client, message.rid)
        elif kind == DRAIN:
            self._host.drain(None if message.deadline_ms is None else message.deadline_ms / 1000)
        elif kind != BEAT:
            self.bad_frames += 1

    def _welcomed(self, now: float, epoch: int, welcome: WorkerWelcome) -> None:
        if welcome.protocol != PROTOCOL:
            why = f"it speaks protocol {welcome.protocol}, this worker {PROTOCOL}"
            self._refused(now, Refused(ProtocolMismatch.code, why))
        elif not epoch:
            self.bad_frames += 1
        elif epoch == self.epoch:
            # What was announced is taken, in place.
            self._unanswered = max(0, self._unanswered - 1)
            self._host.changed(self)
        else:
            self._unregister("registering")
            self.epoch = epoch
            self.controller = welcome.controller
            self.message_bytes = welcome.message_bytes
            self.refusal = None
            self._lease.ttl_s = welcome.ttl_ms / 1000
            # It should know at once what other controllers have taken.
            self._due_s = now
            self._become("registered")
            # Which of several READYs it answers is not known: say the last once more.
            self._ready_changed = self._ready_changed or self._readies > 1
            self._readies = 0
            self._tell_ready()
            self._tell_draining()

    def _refused(self, now: float, refusal: Refused) -> None:
        if refusal.retry_after_ms is None:
            self.refusal = refusal
            self._unregister("refused")
        else:
            self._unregister("registering")
            if self._readies == 1:  # that is what it answers
                self._readies = 0
            was, self.refusal = self.refusal, refusal
            again_s = now + min(refusal.retry_after_ms / 1000, MOST_REFUSED_S)
            self._due_s = inf if self._draining else again_s
            self._lease.heard_s = again_s  # it has nothing to say to us before
            if was is None or was.why != refusal.why:
                self._host.changed(self)

    def _reregister(self, now: float, epoch: int) -> None:
        """The controller doesn't know us. The number that it sends is repeated in READY: it proves who answers."""
        self._unregister("registering")
        self._register(now, epoch)

    # --- within -------------------------------------------------------------------------------

    def _fresh_due_s(self) -> float:
        """When to replace the connection, if nothing is heard until then."""
        heard_s, ttl_s = self._lease.heard_s, self._lease.ttl_s
        if self._renews:
            return -inf
        if self._draining:
            return inf
        if self._shut_out:
            return self._fresh_s
        if self._inproc:
            # One that takes messages is good for whenever the controller binds again.
            return max(self._fresh_s, heard_s + INPROC_FRESH_TTLS * ttl_s) if self.blocked else inf
        # Behind a pipe that takes nothing is either no connection, which libzmq keeps trying, or a queue that is full.
        return inf if self.blocked else max(self._fresh_s, heard_s + SILENT_TTLS * ttl_s)

    def _replace(self, now: float) -> None:
        """Register on a fresh connection. Where none is to be had this one is kept, with all that it may still be good for, and it is tried
        again after a while."""
        self._fresh_s = now + self._fresh_gap_s()
        self._renews = False
        try:
            self._host.fresh_socket(self)
        except OSError:
            return
        self._shut_out = False
        self._unregister("registering")
        self._register(now)

    def _fresh_gap_s(self) -> float:
        return REGISTER_RETRY_S if self._inproc else self._random.uniform(*FRESH_SOCKET_S)

    def _register(self, now: float, number: int = 0) -> None:
        if self._draining:
            self._due_s = inf
            return
        self._due_s = now + REGISTER_RETRY_S
        if self._try(encode(WorkerHead(READY, number)), encode(self._host.ready())):
            self._ready_changed = False
            self._readies += 1

    def _beat(self, now: float) -> None:
        self._due_s = now + self._beat_every_s
        if self._try(encode(WorkerHead(LOAD, self.epoch)), encode(self._host.load(self))):
            self._beat_s = now
            # The pipe takes messages again, and after this one succeeded nobody waits to be told so.
            self._flush()

    def _unregister(self, state: str) -> None:
        self._host.abort(self)
        self.epoch = 0
        self._outbox.clear()
        self.outbox_bytes = 0
        # A change that the controller has not taken may never have reached it.
        self._ready_changed = self._ready_changed or self._unanswered > 0
        self._unanswered = 0
        self._told_draining = False
        self._become(state)

    def _become(self, state: str) -> None:
        if self.state != state:
            self.state = state
            self._host.changed(self)

    def _try(self, head: bytes, payload: bytes) -> bool:
        sent = self._send(head, payload)
        self.blocked = not sent
        return sent

    def _tell_ready(self) -> None:
        """Not by way of the outbox: only the last of many changes matters."""
        if self._ready_changed and self.state == "registered" and not self.silent and not self._draining:
            self._ready_changed = not self._try(encode(WorkerHead(READY, self.epoch)), encode(self._host.ready()))
            self._unanswered += not self._ready_changed

    def _tell_draining(self) -> None:
        """Not by way of the outbox: whoever waits for that waits for answers only."""
        if self._draining and not self._told_draining and self.state == "registered" and not self.silent:
            self._told_draining = self._try(encode(WorkerHead(DRAINING, self.epoch)), b"")

    def _flush(self) -> None:
        self._tell_ready()
        self._tell_draining()
        outbox = self._outbox
        while outbox and not self.silent and self._try(*outbox[0]):
            head, payload = outbox.popleft()
            self.outbox_bytes -= len(head) + len(payload)
