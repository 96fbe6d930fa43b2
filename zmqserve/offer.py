"""What a controller offers to its parent of one model: its workers' cards as one."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from .messages import MAX_SLOTS, ModelCard
from .pool import Pool

CAUTION = ("exact", "approximate", "refused")
"""How an answer goes on elsewhere (ModelCard.resume), the least promise last."""


def offer(pool: Pool, slots: int) -> ModelCard:
    """One card for a pool with workers: verbs, features and names that any of them has, and what the most cautious says of a resume.

    Fingerprint and context length are those of the pool's own card. `slots`: of all workers, those of other models too. The model's
    are told where they are fewer.
    """
    bound = min(MAX_SLOTS, pool.slots) if pool.slots < slots else None
    cards = [worker.cards[pool.model] for worker in pool.workers.values() if not worker.loading] or [pool.card]
    cards = [msgspec.structs.replace(card, slots=bound) for card in cards]
    if all(card == cards[0] for card in cards):
        return cards[0]
    promises: dict[str, str] = {}
    for card in cards:
        for parameter, promise in card.resume.items():
            promises[parameter] = max(promises.get(parameter, CAUTION[0]), promise, key=_caution)
    return msgspec.structs.replace(
        pool.card,
        verbs=_union(card.verbs for card in cards),
        features=_union(card.features for card in cards),
        aliases=_union(card.aliases for card in cards),
        resume=promises,
        slots=bound,
    )


def _union(names: Iterable[list[str]]) -> list[str]:
    return sorted({name for each in names for name in each})


def _caution(promise: str) -> int:
    return CAUTION.index(promise) if promise in CAUTION else len(CAUTION)
