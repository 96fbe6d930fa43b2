"""What a controller has room for: requests, clients, workers and what they offer. Pure. Each bound is a setting, named in its error."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING
from unicodedata import category

from .bucket import Bucket
from .endings import overloaded
from .errors import InvalidParameter, MalformedMessage, RateLimited, Refused

if TYPE_CHECKING:
    from .config import ControllerConfig
    from .messages import ModelCard, Ready
    from .registry import Registry

BURST_S = 10.0
"""Who was quiet may send as many offers at once as in so long."""
NAMES_AS_ONE = 20
"""An offer counts as one, and as one more for each so many names of models: with these grows what it costs."""
MOST_LATER_S = 10.0
"""Those who come too often are told to come again one after another, but not later than that."""
AUTOMATIC_BYTES = 5
"""Of a routing id that libzmq gives: a zero, which none that is chosen may begin with, and a number."""
NO_SIGNS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of what writes nothing, but may move a cursor. Other spaces are harmless, and stand in paths of models."""
SHOWN = 100
"""Characters of a text that an error repeats: some texts of an offer may be as long as it."""
MOST_OWNERS = 10_000
"""Keys or connections whose offers are counted; of more, those that were counted first are not any longer."""


class Offers:
    """How often each key of the worker side says READY, or each connection where there are no keys, counted before any of it is read."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self._owners: OrderedDict[bytes | str, _Owner] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owners)

    def __repr__(self) -> str:
        return f"Offers({len(self)} owners)"

    def check_size(self, size: int) -> None:
        """Raises Refused for an offer of too many bytes."""
        if size > (most := self._config.ready_bytes):
            text = f"the offer is {size} bytes long, this controller takes {most} (ready_bytes): offer fewer models"
            raise Refused(text, data={"bound": "ready_bytes", "limit": most})

    def wait_s(self, now: float, owner: bytes | str) -> float:
        """Seconds until the next one of `owner` may come."""
        return self._owner(now, owner).bucket.wait_s(now, 1.0)

    def take(self, now: float, owner: bytes | str) -> None:
        """One more. Raises RateLimited when it is one too many: each of those who hear so is given a time of its own."""
        held = self._owner(now, owner)
        wait_s = held.bucket.wait_s(now, 1.0)
        if wait_s > 0:
            rate = self._config.readies_per_s
            held.promised_s = min(max(now + wait_s, held.promised_s + 1 / rate), now + max(wait_s, MOST_LATER_S))
            text = f"workers of one key may register or change their offers {rate:g} times a second, with many models less (readies_per_s)"
            later_ms = ceil((held.promised_s - now) * 1000)
            raise RateLimited(text, retry_after_ms=later_ms, data={"bound": "readies_per_s", "limit": rate})
        held.bucket.take(now, 1.0)

    def charge(self, now: float, owner: bytes | str, names: int) -> None:
        """The one that was taken holds so many names of models: the next may have to wait for it."""
        self._owner(now, owner).bucket.take(now, min(names, self._config.worker_models) // NAMES_AS_ONE)

    def _owner(self, now: float, name: bytes | str) -> _Owner:
        owner = self._owners.get(name)
        if owner is None:
            self._forget(now)
            rate = self._config.readies_per_s
            owner = self._owners[name] = _Owner(Bucket(rate, max(1.0, BURST_S * rate), now))
        self._owners.move_to_end(name)
        return owner

    def _forget(self, now: float) -> None:
        """Who was heard of long ago would have a new bucket's fill: connections that have gone are not told of here."""
        while self._owners:
            oldest = next(iter(self._owners.values())).bucket
            if oldest.level(now) < oldest.most and len(self._owners) < MOST_OWNERS:
                break
            self._owners.popitem(last=False)


@dataclass(slots=True)
class _Owner:
    """Who says READY. `promised_s`: the last time that one of its workers was told to come again at."""

    bucket: Bucket
    promised_s: float = 0.0


def names_of(ready: Ready) -> set[str]:
    """The names and aliases of the models that it offers."""
    return {name for card in ready.models for name in (card.name, *card.aliases)}


def check_offer(config: ControllerConfig, registry: Registry, ready: Ready, names: Collection[str], *, new: bool) -> None:
    """Whether a worker may offer that, by these `names`, and come if it is `new`. Raises MalformedMessage for texts that no terminal should
    be shown, Refused, and Overloaded where there may be room later."""
    for text in (ready.name, ready.backend, ready.version, *ready.controllers, *names, *_texts(ready.models)):
        if not text.isprintable() and (sign := next((sign for sign in text if category(sign) in NO_SIGNS), "")):
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
