"""What a request asks of a worker."""

from __future__ import annotations

from typing import NamedTuple

from .messages import ModelCard

SLOTTED = frozenset({"generate", "embed"})
"""Verbs that take a slot; the others are quick and never wait behind a generation."""


class Need(NamedTuple):
    """What a request asks of a worker: a verb and, when it resumes, a fingerprint.

    `alias`: the name that it calls the model by, where not all of the model's workers know that.
    `trial`: it has lost a worker and may be what killed it. Those who come from one dead worker would meet on the next, and the one
    that kills take the others with it once more: so a worker tries one such request at a time, until its first chunk (several, when
    very many wait).
    """

    verb: str
    fingerprint: str | None = None
    trial: bool = False
    alias: str | None = None

    @property
    def slotted(self) -> bool:
        """Whether it takes a slot."""
        return self.verb in SLOTTED

    def met_by(self, card: ModelCard) -> bool:
        """Whether the model, as offered by one worker, can do it."""
        able = self.verb in card.verbs or (self.verb == "generate" and "chat" in card.verbs)
        named = self.alias is None or self.alias in card.aliases
        return able and named and (self.fingerprint in (None, card.fingerprint) or self.fingerprint in card.fingerprints)
