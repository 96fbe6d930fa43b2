"""Keys that a controller lets in, without files: what Access asks of a keyring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from zmqserve.access import Access
from zmqserve.rules import parse_rules


@dataclass(frozen=True)
class Key:
    key: str
    name: str
    role: str


def key_of(name: str) -> str:
    """As long as a real one, and nobody's."""
    return f"{name:!<40}"


ALICE, BOB, ROOT, GPU, GPU2 = map(key_of, ("alice", "bob", "root", "gpu", "gpu2"))


def by_key(role: str, *names: str) -> dict[str, Key]:
    return {key_of(name): Key(key_of(name), name, role) for name in names}


@dataclass
class Ring:
    """Clients alice and bob, the admin root, workers gpu and gpu2."""

    clients: dict[str, Key] = field(default_factory=lambda: by_key("client", "alice", "bob") | by_key("admin", "root"))
    workers: dict[str, Key] = field(default_factory=lambda: by_key("worker", "gpu", "gpu2"))

    def without(self, *keys: str) -> Ring:
        """The same, but for keys that are revoked."""
        return Ring(_but(self.clients, keys), _but(self.workers, keys))


def _but(side: dict[str, Key], keys: Iterable[str]) -> dict[str, Key]:
    return {key: peer for key, peer in side.items() if key not in keys}


def access(rules: str = "", ring: Ring | None = None) -> Access:
    """With rules in the text of an access.toml."""
    return Access(ring or Ring(), parse_rules(rules, "access.toml"))
