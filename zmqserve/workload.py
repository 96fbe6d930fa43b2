"""What a worker takes on, for all its controllers together: its state, its slots, and who is told of them. No socket, no thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from math import inf
from typing import Protocol

import msgspec

from .admission import by_name
from .answers import Answer
from .desk import Desk
from .errors import Refused
from .lane import Lane, Outbound
from .link import ControllerLink
from .logs import Logger
from .messages import ControllerHead, Load, ModelCard, Peek, Ready, RequestHeader

log = Logger("zmqserve.worker")
NEVER_HEARD = "trying on; is one running (zmqserve controller), is this its side for workers, and does it ask for a key?"
SLOT_TAGS = (2, 3)
"""Generate and Embed take a slot; what else is asked is quick."""

_peek = msgspec.msgpack.Decoder(Peek)
_header = msgspec.msgpack.Decoder(RequestHeader)


class Served(Protocol):
    """Whose workload it is: a BaseModelWorker, which says what each of these means."""

    name: str

    def registration(self, state: str, slots: int) -> Ready: ...
    def step_age_s(self) -> float: ...
    def waiting(self) -> int: ...
    def taken(self) -> None: ...


class Workload:
    """The LinkHost of a worker's links. It counts slots: a request takes one when it goes to the desk and gives it back with its end.
    One for a model whose card says `slots` takes one of those too; `held` counts them by that model's name, all others by none.

    `links` are added by the owner, which ticks them through `tick` and asks after each turn whether the workload has `finished`.
    What the desk has to do goes through ``hand(function, *arguments)``, which runs such calls in order; what comes back to the owner
    as Outbound goes through `pass_on`. `failure` says why it ended, if not as asked. `desk` is set before anything is received.
    """

    desk: Desk

    def __init__(
        self,
        worker: Served,
        out: Outbound,
        *,
        grace_s: float,
        message_bytes: int,
        now: Callable[[], float],
        hand: Callable[..., None],
        fresh_socket: Callable[[ControllerLink], None],
    ) -> None:
        self.state = "loading"
        self.slots = 0
        self.running = 0
        self.held: Counter[str] = Counter()
        self.links: dict[ControllerLink, Lane | None] = {}
        self.failure: BaseException | None = None
        self.ending = False
        self.drain_ends_s = inf
        self._open = 0
        self._held_up_s = now()
        self._shared: dict[str, ModelCard] = {}
        self._worker = worker
        self._out = out
        self._grace_s = grace_s
        self._message_bytes = message_bytes
        self._now = now
        self._hand = hand
        self._fresh_socket = fresh_socket

    def __repr__(self) -> str:
        return f"Workload({self.state}, {self.running} of {self.slots} slots, {len(self.links)} controllers)"

    def add(self, link: ControllerLink) -> None:
        """One more controller."""
        self.links[link] = None

    # --- what its worker decides ------------------------------------------------------------------

    def announce(self, slots: int, cards: Iterable[ModelCard] = ()) -> None:
        """The models are loaded: all together may have so many slots, and each as many as its card says."""
        if self.state == "loading":
            self.state, self.slots = "ready", slots
            self._shared = by_name(card for card in cards if card.slots is not None)
            for link in self.links:
                link.announce()

    def drain(self, grace_s: float | None) -> None:
        """Take nothing new, finish what runs within `grace_s` (None: the worker's own), then end."""
        if self.state != "draining":
            self.state = "draining"
            grace_s = self._grace_s if grace_s is None else grace_s
            self.drain_ends_s = self._now() + grace_s
            log.info("draining", worker=self._worker.name, running=self._open, grace_s=grace_s)
            for link in self.links:
                link.drain()

    def end(self, failure: BaseException | None = None) -> None:
        """End now. What still runs is aborted; its controllers move it."""
        self.failure = self.failure or failure
        self.ending = True
        if failure is not None:
            self._worker.taken()

    def finished(self, now: float, waiting: int) -> bool:
        """Whether it may end. `waiting`: what the desk has posted and was not passed on yet."""
        if self.ending or now >= self.drain_ends_s:
            return True
        if self.state != "draining" or self._open or waiting:
            return False
        # Nobody takes what waits for a controller that is not there.
        return not any(link.outbox_bytes for link in self.links if link.state == "registered" and not link.silent)

    def tick(self, now: float) -> float:
        """Let each link do what is due; returns when to call again."""
        self._note_hold(now)
        due_s = self.drain_ends_s
        for link, lane in self.links.items():
            due_s = min(due_s, link.tick(now))
            if lane is not None:
                lane.gone_bytes = lane.taken_bytes - link.outbox_bytes
        return due_s

    def pass_on(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None) -> None:
        """Send what the desk has posted, and free the slot of what has ended."""
        if head:
            lane.link.post(lane.epoch, head, payload)
            lane.taken_bytes += len(head) + len(payload)
        if ended is not None:
            self._open -= 1
            if ended.slot:
                self.running -= 1
                self.held[ended.share] -= 1
                lane.yours -= 1
                self._tell_others(lane.link)

    # --- LinkHost ---------------------------------------------------------------------------------

    def ready(self) -> Ready:
        """As LinkHost says."""
        return self._worker.registration(self.state, self.slots)

    def load(self, link: ControllerLink) -> Load:
        """As LinkHost says."""
        lane = self.links[link]
        # An engine may count several for a request (n), or one that has just ended.
        waiting = min(self.running, self._worker.waiting())
        yours = lane.yours if lane is not None else 0
        now = self._now()
        self._note_hold(now)
        return Load(self.running - waiting, waiting, yours, 1000 * min(self._worker.step_age_s(), now - self._held_up_s))

    def offer(self, link: ControllerLink, head: ControllerHead, payload: bytes) -> bool:
        """As LinkHost says."""
        try:
            slot = _peek.decode(payload).tag in SLOT_TAGS
        except (msgspec.DecodeError, RecursionError):
            slot = False
        if slot and (self.running >= self.slots or self.state != "ready"):
            return False
        card = self._shared.get(_model_of(payload)) if slot and self._shared else None
        share = ""
        if card is not None and card.slots is not None:
            share = card.name
            if self.held[share] >= card.slots:
                return False
        lane = self.links[link]
        if lane is None:
            lane = Lane(link, link.epoch, self._out, min(self._message_bytes, link.message_bytes or self._message_bytes))
            self.links[link] = lane
        self._open += 1
        if slot:
            self._note_hold(self._now())
            self.running += 1
            self.held[share] += 1
            lane.yours += 1
            self._tell_others(link)
        self._hand(self.desk.request, lane, head, payload, slot, share, self._now())
        return True

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None:
        """As LinkHost says."""
        lane = self.links[link]
        if lane is not None:
            self._hand(self.desk.cancel, lane, client, rid)

    def abort(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        lane = self.links[link]
        if lane is not None:
            self._note_hold(self._now())
            lane.alive = False
            self._hand(self.desk.abort, lane)
            self.links[link] = None

    def fresh_socket(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        self._fresh_socket(link)
        if link.refusal is None:  # what was refused is tried every few seconds
            log.info("reconnecting", worker=self._worker.name, controller=link.controller, endpoint=link.endpoint)

    def changed(self, link: ControllerLink) -> None:
        """As LinkHost says."""
        note = log.bind(worker=self._worker.name, controller=link.controller, endpoint=link.endpoint)
        refusal = link.refusal
        if link.silent:
            if self.state != "draining" and not self.ending:
                # One that has never answered may be the wrong endpoint.
                note.warning("controller silent", **({} if link.controller else {"hint": NEVER_HEARD}))
        elif link.state == "registered":
            note.info("registered", state=self.state)
            if self.state == "ready" and link.known:
                self._worker.taken()
        elif refusal is not None and link.state == "registering":
            note.warning("registration refused, trying again", why=refusal.why, retry_after_ms=refusal.retry_after_ms)
        elif refusal is not None and link.state == "refused":
            note.error("registration refused", why=refusal.why)
            # With others left the worker still has somebody to serve.
            if all(other.state == "refused" for other in self.links):
                text = f"the controller at {link.endpoint} refused worker {self._worker.name}: {refusal.why}"
                self.end(Refused(text, data={"endpoint": link.endpoint, "code": refusal.code}))

    def _note_hold(self, now: float) -> None:
        """While all that runs, if anything, waits for controllers that take less than is made, an engine that does not step is well; and
        how long it did not says nothing of it when that is over."""
        if self.running == sum(lane.yours for lane in self.links.values() if lane is not None and self._out.pauses(lane)):
            self._held_up_s = now

    def _tell_others(self, link: ControllerLink) -> None:
        if len(self.links) == 1:
            return
        now = self._now()
        for other in self.links:
            if other is not link:
                other.others_changed(now)


def _model_of(payload: bytes) -> str:
    """What the request asks for; empty where that cannot be read, which the desk will say."""
    try:
        return _header.decode(payload).model
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return ""
