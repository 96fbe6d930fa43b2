"""What a controller offers to its parent: of each model its workers' cards as one, and of all no more than a parent takes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain, islice

import msgspec

from .messages import MAX_LISTED, MAX_MODELS, MAX_SLOTS, ModelCard, encode
from .pool import Pool

CAUTION = ("exact", "approximate", "refused")
"""How an answer goes on elsewhere (ModelCard.resume), the least promise last."""


def offer(pools: Iterable[Pool], slots: int, room_bytes: int) -> tuple[list[ModelCard], list[str]]:
    """A card for each pool with workers, in at most so many bytes, and the names that had to be left out.

    A parent refuses an offer as a whole, so that what one worker offers too much of would cut off all others: of MAX_MODELS names of
    models, and of MAX_LISTED in each list, there are those that came first, models before aliases. `slots`: of all workers.
    """
    left_out: list[str] = []
    cards = [_card(pool, slots, left_out) for pool in pools if pool.workers]
    left_out += [card.name for card in cards[MAX_MODELS:]]
    names = {card.name for card in cards[:MAX_MODELS]}
    offered: list[ModelCard] = []
    for card in cards[:MAX_MODELS]:
        aliases = [alias for alias in card.aliases if alias in names or len(names) < MAX_MODELS]
        if len(aliases) < len(card.aliases):
            left_out += [alias for alias in card.aliases if alias not in aliases]
            card = msgspec.structs.replace(card, aliases=aliases)  # noqa: PLW2901 - the same one, with fewer names
        size = len(encode(card))
        if size <= room_bytes:
            room_bytes -= size
            names.update(aliases)
            offered.append(card)
        else:
            left_out.append(card.name)
    return offered, left_out


def _card(pool: Pool, slots: int, left_out: list[str]) -> ModelCard:
    """One card for a pool with workers: verbs, features, names and fingerprints that any of them has, and what the most cautious says of
    a resume.

    Context length is that of the pool's own card. The model's slots are told where they are fewer than those of all workers.
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
    own = pool.card.fingerprint
    fingerprints = ([each for each in (card.fingerprint, *card.fingerprints) if each not in ("", own)] for card in cards)
    return msgspec.structs.replace(
        pool.card,
        fingerprints=_union(fingerprints, left_out),
        verbs=_union((card.verbs for card in cards), left_out),
        features=_union((card.features for card in cards), left_out),
        aliases=_union((card.aliases for card in cards), left_out),
        resume=promises,
        slots=bound,
    )


def _union(lists: Iterable[list[str]], left_out: list[str]) -> list[str]:
    names = dict.fromkeys(chain.from_iterable(lists))
    left_out += islice(names, MAX_LISTED, None)
    return sorted(islice(names, MAX_LISTED))


def _caution(promise: str) -> int:
    return CAUTION.index(promise) if promise in CAUTION else len(CAUTION)
