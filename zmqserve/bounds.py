"""What a controller has room for: requests, clients, workers and what they offer. Pure. Each bound is a setting, named in its error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from math import ceil
from typing import TYPE_CHECKING

from .bucket import Bucket
from .endings import overloaded
from .errors import InvalidParameter, MalformedMessage, RateLimited, Refused

if TYPE_CHECKING:
    from .config import ControllerConfig
    from .messages import ModelCard, Ready
    from .registry import Registry

BURST_S = 2.0
"""A connection that was quiet may send as many offers at once as it may in so long."""
AUTOMATIC_BYTES = 5
"""Of a routing id that libzmq gives: a zero, which none that is chosen may begin with, and a number."""
SHOWN = 100
"""Characters of a text that an error repeats: some texts of an offer may be as long as it."""
MOST_CONNECTIONS = 10_000
"""Connections whose offers are counted; of more, those that were counted first are not any longer."""


class Offers:
    """How often each connection of the worker side says READY, counted before any of it is read."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._buckets: OrderedDict[bytes, Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def __repr__(self) -> str:
        return f"Offers({len(self)} connections)"

    def take(self, now: float, connection: bytes, size: int) -> None:
        """One more, of so many bytes. Raises Refused when it is too long, and RateLimited when it is one too many."""
        most, rate = self._config.ready_bytes, self._config.readies_per_s
        if size > most:
            text = f"the offer is {size} bytes long, this controller takes {most} (ready_bytes): offer fewer models"
            raise Refused(text, data={"bound": "ready_bytes", "limit": most})
        bucket = self._buckets.get(connection)
        if bucket is None:
            self._forget(now)
            bucket = self._buckets[connection] = Bucket(rate, max(1.0, BURST_S * rate), now)
        self._buckets.move_to_end(connection)
        wait_s = bucket.wait_s(now, 1.0)
        if wait_s > 0:
            text = f"a worker may register or change its offer {rate:g} times a second (readies_per_s)"
            raise RateLimited(text, retry_after_ms=ceil(wait_s * 1000), data={"bound": "readies_per_s", "limit": rate})
        bucket.take(now, 1.0)

    def _forget(self, now: float) -> None:
        """Who was heard of long ago would have a new bucket's fill: connections that have gone are not told of here."""
        while self._buckets:
            oldest = next(iter(self._buckets.values()))
            if oldest.level(now) < oldest.most and len(self._buckets) < MOST_CONNECTIONS:
                break
            self._buckets.popitem(last=False)


def check_offer(config: ControllerConfig, registry: Registry, ready: Ready, *, new: bool) -> None:
    """Whether a worker may offer that, and come if it is `new`. Raises MalformedMessage for texts that no terminal should be shown,
    Refused, and Overloaded where there may be room later."""
    names = {name for card in ready.models for name in (card.name, *card.aliases)}
    for text in (ready.name, ready.backend, ready.version, *ready.controllers, *names, *_texts(ready.models)):
        if not text.isprintable():
            sign = next(sign for sign in text if not sign.isprintable())
            raise MalformedMessage(f"{text[:SHOWN]!r} in the offer holds {sign!r}, a character that cannot be printed: leave it out")
    for bound, what, found, limit in (
        ("worker_models", "names of models", len(names), config.worker_models),
        ("worker_slots", "slots", ready.slots, config.worker_slots),
    ):
        if found > limit:
            text = f"worker {ready.name} offers {found} {what}, this controller takes {limit} ({bound})"
            raise Refused(text, data={"bound": bound, "limit": limit})
    if new and len(registry.workers) >= config.max_workers:
        raise overloaded("max_workers", config.max_workers, f"{len(registry.workers)} workers are registered")
    more = sum(registry.find(name) is None for name in names)
    if more and registry.names + more > config.max_models:
        raise overloaded("max_models", config.max_models, f"{registry.names} names of models are known, {more} more are too many")


def _texts(cards: Iterable[ModelCard]) -> Iterator[str]:
    for card in cards:
        yield from (card.source, card.fingerprint, *card.fingerprints, *card.verbs, *card.features, *card.resume, *card.resume.values())


def check_request(config: ControllerConfig, size: int, *, opened: int, held_bytes: int, clients: int) -> None:
    """Whether a request of so many bytes may be opened, beside those that are, and for so many clients that have some.

    Raises InvalidParameter for one that is too large, and Overloaded.
    """
    check_size(config, size)
    if opened >= config.total_requests:
        raise overloaded("total_requests", config.total_requests, f"{opened} requests are open")
    if held_bytes + size > config.total_bytes:
        raise overloaded("total_bytes", config.total_bytes, f"{held_bytes} bytes of requests are held, {size} more are too many")
    if clients > config.max_clients:
        raise overloaded("max_clients", config.max_clients, f"{clients - 1} clients have open requests")


def check_size(config: ControllerConfig, size: int) -> None:
    """Whether a message of a client's may be so long; else InvalidParameter."""
    if size > config.request_bytes:
        text = f"the request is {size} bytes long, this controller takes {config.request_bytes} (request_bytes): shorten the prompt"
        raise InvalidParameter(text, data={"parameter": "prompt", "bound": "request_bytes", "limit": config.request_bytes})


def check_routing_id(identity: bytes) -> None:
    """Where there are keys, a connection has the routing id that libzmq gave it; else InvalidParameter.

    One that was chosen may be guessed, and who connects with it when its owner has gone gets what is still sent there.
    """
    if len(identity) != AUTOMATIC_BYTES or identity[0]:
        text = f"the socket has the routing id {identity[:20]!r}: with keys leave it to libzmq (set no ZMQ_ROUTING_ID, nor ZMQ_IDENTITY)"
        raise InvalidParameter(text, data={"parameter": "routing_id"})
