"""Who may do what at a controller, by the keys of its peers. Pure: it is told whose key a message came with, and `now`.

::

    key unknown or revoked                              Unauthenticated   40102
    over requests_per_s or requests_in_flight           RateLimited       42901
    the verb, or the model, is not the key's            PermissionDenied  40104
    over tokens_per_s                                   QuotaExceeded     42902
    a worker's model or name is not its key's           Refused           40103

What a key uses is counted over all of its connections. Peers without a key are those of the controller's own process (inproc, which
libzmq never secures): they may do everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import ceil
from typing import Protocol

from .bucket import Bucket
from .errors import PermissionDenied, QuotaExceeded, RateLimited, Refused, Unauthenticated, ZmqserveError
from .messages import MOST_URGENT, ModelCard, RequestHeader
from .rules import ClientRules, Globs, Permits, Rules

UNREAD = ""
"""Stands for a user that nobody has looked up, as on the workers' hot path."""
MOST_DEBT_S = 3600.0
"""No charge shuts a key out for longer. The tokens are what a worker says, and workers may lie."""
IN_FLIGHT_RETRY_MS = 1000
"""What a key at its bound of open requests is told: when one of them ends is not known."""
_MOST_MS = 2**53
ADMIN = ClientRules(priority=MOST_URGENT)


class Peer(Protocol):
    """A key that is let in: `key` as text (z85), the `name` that it goes by, and its `role`: client, admin or worker."""

    @property
    def key(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...


class Keys(Protocol):
    """The keys that are let in, by key: at the client socket (clients and admins), and at the worker socket."""

    @property
    def clients(self) -> Mapping[str, Peer]: ...
    @property
    def workers(self) -> Mapping[str, Peer]: ...


class Account:
    """What one client's or admin's key may do, and what it uses: `in_flight` requests are open, so many of them `waiting`.

    It is counted on where its requests are, also when its key has gone meanwhile. `seen`: the models that it may know of, and at
    which of the registry's changes that was so.
    """

    __slots__ = (
        "_permits",
        "_requests",
        "_rules",
        "_tokens",
        "admin",
        "group",
        "in_flight",
        "key",
        "name",
        "seen",
        "waiting",
        "waiting_bytes",
    )

    def __init__(self, peer: Peer, rules: Rules, now: float) -> None:
        self.key = peer.key
        self.group = peer.key.encode()
        self.in_flight = self.waiting = self.waiting_bytes = 0
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self.renew(peer, rules, now)

    def __repr__(self) -> str:
        return f"Account({self.name!r}, {self.in_flight} in flight)"

    def renew(self, peer: Peer, rules: Rules, now: float) -> None:
        """Its name, role or rules may have changed; what it has used stays used."""
        self.name = peer.name
        self.admin = peer.role == "admin"
        self._rules = ADMIN if self.admin else rules.client(peer.name)
        self._permits = Permits(self._rules)
        self._requests = _bucket(self._requests, self._rules.rate, now)
        self._tokens = _bucket(self._tokens, self._rules.token_rate, now)
        self.seen: tuple[int, list[str]] = (-1, [])

    # --- permissions

    def check(self, verb: str, model: str = "") -> None:
        """Raises PermissionDenied, the same whether there is such a model or not."""
        if not self._permits.may(verb, model):
            what = f"{verb} {model!r}" if model else verb
            raise PermissionDenied(f"the key {self.name} may not {what}", data={"verb": verb, "model": model})

    def check_request(self, now: float, verb: str, header: RequestHeader) -> None:
        """Whether it may open this request now. Raises PermissionDenied, RateLimited or QuotaExceeded."""
        self.check(verb, header.model)
        if header.priority < self._rules.priority:
            text = f"the key {self.name} may not ask for priority {header.priority}, but for {self._rules.priority} or a higher number"
            raise PermissionDenied(text, data={"parameter": "priority", "value": header.priority})
        self.check_room(now)

    def check_admin(self, what: str) -> None:
        """Raises PermissionDenied unless this is an admin's key."""
        if not self.admin:
            raise PermissionDenied(f"the key {self.name} may not {what}: that needs an admin's key", data={"verb": what})

    @property
    def tells_chat(self) -> bool:
        """Whether it matters to it that generate and chat are two verbs of one message."""
        return self._permits.tells_chat

    def may(self, verb: str, model: str) -> bool:
        """Whether it may ask this of a model of that name."""
        return self._permits.may(verb, model)

    def hides(self, verb: str, names: Iterable[str]) -> bool:
        """Whether one of a model's other names is denied: then the model is none that this key can find."""
        return any(self._permits.denied(verb, name) for name in names)

    def sees(self, verbs: Iterable[str], names: Iterable[str]) -> bool:
        """Whether it may ask anything of a model with these names, and so learn of it."""
        names = tuple(names)
        return any(any(self.may(verb, name) for name in names) and not self.hides(verb, names) for verb in verbs)

    # --- rates

    def count(self, now: float) -> None:
        """One more request of any kind; raises RateLimited when that is too many a second."""
        bucket = self._requests
        if bucket is None:
            return
        wait_s = bucket.wait_s(now, 1.0)
        if wait_s > 0:
            text = f"the key {self.name} may send {bucket.rate:g} requests a second, {bucket.most:g} at once"
            raise RateLimited(text, retry_after_ms=_ms(wait_s), data={"bound": "requests_per_s", "limit": bucket.rate})
        bucket.take(now, 1.0)

    def check_room(self, now: float) -> None:
        """Whether one more request may be opened: raises RateLimited or QuotaExceeded."""
        most = self._rules.requests_in_flight
        if most is not None and self.in_flight >= most:
            text = f"the key {self.name} has {self.in_flight} requests in flight, and may have {most}"
            raise RateLimited(text, retry_after_ms=IN_FLIGHT_RETRY_MS, data={"bound": "requests_in_flight", "limit": most})
        bucket = self._tokens
        if bucket is not None and (wait_s := bucket.wait_s(now)) > 0:
            text = f"the key {self.name} may use {bucket.rate:g} tokens a second, and has used more"
            raise QuotaExceeded(text, retry_after_ms=_ms(wait_s), data={"bound": "tokens_per_s", "limit": bucket.rate})

    def charge(self, now: float, tokens: int) -> None:
        """A request has ended and used so many tokens, prompt and answer."""
        if self._tokens is not None:
            self._tokens.take(now, tokens, least=-MOST_DEBT_S * self._tokens.rate)


class Access:
    """The keys that are let in and what they may do. `keys` are looked up at each use, so one that is revoked ends at once."""

    def __init__(self, keys: Keys, rules: Rules) -> None:
        self._keys = keys
        self._rules = rules
        self._accounts: dict[str, Account] = {}

    def __repr__(self) -> str:
        return f"Access({len(self._keys.clients)} clients, {len(self._keys.workers)} workers)"

    def renew(self, keys: Keys, rules: Rules | None, now: float) -> None:
        """The keys have changed, or the rules (None: they have not)."""
        self._keys = keys
        self._rules = rules = self._rules if rules is None else rules
        self._accounts = {key: account for key, account in self._accounts.items() if key in keys.clients}
        for key, account in self._accounts.items():
            account.renew(keys.clients[key], rules, now)

    def account(self, user: str, now: float) -> Account:
        """Of a message at the client socket. Raises Unauthenticated."""
        account = self._accounts.get(user)
        if account is None:
            peer = self._keys.clients.get(user)
            if peer is None:
                raise unauthenticated()
            account = self._accounts[user] = Account(peer, self._rules, now)
        return account

    def worker(self, user: str, name: str, cards: Iterable[ModelCard]) -> str:
        """The name of the key of a worker with this name, which offers these models. Raises Unauthenticated, or Refused."""
        peer = self._keys.workers.get(user)
        if peer is None:
            raise unauthenticated()
        rules = self._rules.worker(peer.name)
        if not Globs(rules.names).match(name):
            raise Refused(f"the key {peer.name} is not for a worker named {name!r}, but for {', '.join(rules.names) or 'none'}")
        models = Globs(rules.models)
        for model in (name for card in cards for name in (card.name, *card.aliases)):
            if not models.match(model):
                may = ", ".join(rules.models) or "none"
                raise Refused(f"the key {peer.name} may not serve model {model!r}; it may serve: {may}", data={"model": model})
        return peer.name

    def unfit(self, user: str, name: str, cards: Iterable[ModelCard]) -> str:
        """Why such a worker may not go on; empty when it may."""
        try:
            self.worker(user, name, cards)
        except ZmqserveError as error:
            return error.message
        return ""


def unauthenticated() -> Unauthenticated:
    """For a peer whose key is not, or no longer, let in."""
    return Unauthenticated("this key is not one that the controller lets in, or not any more: ask who runs it to allow it")


def _bucket(before: Bucket | None, rate: tuple[float, float] | None, now: float) -> Bucket | None:
    if rate is None:
        return None
    if before is None:
        return Bucket(*rate, now)
    before.change(*rate, now)
    return before


def _ms(seconds: float) -> int:
    return min(_MOST_MS, max(1, ceil(seconds * 1000)))
