"""Who can answer a request, or why nobody can. The same for a controller's own clients and for what its parents send it."""

from __future__ import annotations

import msgspec

from . import messages as m
from .access import Account
from .errors import MalformedMessage, ModelLoading, NoWorker, UnknownModel, Unsupported, WorkerLost
from .need import Need
from .pool import Pool
from .registry import Registry

MOST_NAMED = 20
"""Models named in the text of an error; its data holds up to 100."""


ASKED = ("generate", "chat", "embed", "count_tokens", "model_details")
"""The verbs that name a model."""
NIL = b"\xc0"


class _GenerateView(m.RequestHeader, array_like=True, frozen=True, gc=False):
    """As far as a Generate must be read to tell whether it is a chat."""

    stream: msgspec.Raw = msgspec.Raw(NIL)
    prompt: msgspec.Raw = msgspec.Raw(NIL)
    messages: msgspec.Raw = msgspec.Raw(NIL)


class Intake:
    """Reads the header of a request and finds the pool that serves it."""

    def __init__(self, registry: Registry, max_attempts: int) -> None:
        self._registry = registry
        self._max_attempts = max_attempts
        self._needs = {tag: Need(verb) for tag, verb in m.VERBS.items()}
        self._headers = msgspec.msgpack.Decoder(m.RequestHeader)
        self._generates = msgspec.msgpack.Decoder(_GenerateView)

    def __repr__(self) -> str:
        return f"Intake({self._registry!r})"

    def read(self, payload: bytes) -> m.RequestHeader | None:
        """The header of a request that a worker answers; None for any other message, or for none."""
        try:
            header = self._headers.decode(payload)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return None
        return header if header.tag in self._needs else None

    def need(self, header: m.RequestHeader) -> Need:
        """What it asks of a worker."""
        need = self._needs[header.tag]
        alias = header.model if header.model in self._registry.partial else None
        if header.fingerprint is None and not header.attempts and alias is None:
            return need
        return Need(need.verb, header.fingerprint, need.slotted and header.attempts > 0, alias)

    def verb(self, header: m.RequestHeader, payload: bytes, account: Account) -> str:
        """What the request is to the rules of its sender's key. Chat is a Generate with messages, which no worker needs to know apart."""
        verb = self._needs[header.tag].verb
        if verb != "generate" or not account.tells_chat:
            return verb
        try:
            messages = self._generates.decode(payload).messages
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            raise MalformedMessage("Generate: its prompt or messages cannot be read") from None
        return verb if bytes(messages) == NIL else "chat"

    def names(self, account: Account | None) -> list[str]:
        """The models that a key may ask anything of, and so learn of: all without one; sorted."""
        registry = self._registry
        if account is None:
            return registry.known_models()
        changes, names = account.seen
        if changes != registry.changes:
            names = [name for name in registry.known_models() if account.sees(ASKED, registry.pools[name].names)]
            account.seen = registry.changes, names
        return names

    def models(self, account: Account | None) -> list[Pool]:
        """Those that have workers."""
        return [pool for name in self.names(account) if (pool := self._registry.pools[name]).workers]

    def pool(self, header: m.RequestHeader, need: Need, account: Account | None = None, verb: str = "") -> Pool:
        """The model's pool, which may have no free worker now. Raises the error that ends a request which nobody can answer.

        With an account whose `verb` is denied for the pool, under whatever name, there is none.
        """
        pool = self._registry.find(header.model)
        if pool is not None and account is not None and pool.aliases and account.hides(verb, pool.names):
            pool = None
        if pool is None:
            models = self.names(account)
            if not models:  # just started, most likely: its workers are on their way
                raise NoWorker(f"no worker serves model {header.model!r}: none has registered yet", retry_after_ms=1000)
            served = f"{', '.join(models[:MOST_NAMED])}{', ...' if len(models) > MOST_NAMED else ''}"
            raise UnknownModel(
                f"no worker serves model {header.model!r}; known: {served}", data={"model": header.model, "known_models": models[:100]}
            )
        if pool.workers and not pool.can(need):
            _refuse(pool, need)
        if header.attempts >= self._max_attempts:
            lost = WorkerLost(f"the request has lost {header.attempts} workers: giving it up", data={"attempts": header.attempts})
            lost.retryable = False
            raise lost
        return pool


def _refuse(pool: Pool, need: Need) -> None:
    named = need.alias or pool.model
    known = [worker.cards[pool.model] for worker in pool.workers.values() if not pool.loads(worker)]
    known = [card for card in known if need.alias in (None, *card.aliases)]
    if not known:
        raise ModelLoading(f"model {named!r} is still loading: try again", retry_after_ms=1000, data={"model": pool.model})
    if need.fingerprint is not None and any(need._replace(fingerprint=None).met_by(card) for card in known):
        lost = WorkerLost(f"no worker of {named!r} left has its fingerprint {need.fingerprint}", data={"model": pool.model})
        lost.retryable = False
        raise lost
    verbs = sorted({verb for card in known for verb in card.verbs})
    raise Unsupported(
        f"model {named!r} does not {need.verb}; it can: {', '.join(verbs)}",
        data={"model": pool.model, "verb": need.verb, "verbs": verbs},
    )
