"""What simulated clients ask: all verbs that workers answer, with lengths, stop strings, deadlines, cancels and options by chance."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from zmqserve.messages import ChatMessage, CountTokens, Embed, Generate, ModelDetails, pack_ids
from zmqserve.params import SamplingParams

WORDS = ("a", "b", "ab", "ba", "bab", "tok", "zebra", "naïve", "日本", "語", "🙂", "👩\u200d🚀", "x", "yz", "the", "end")
STOPS = ("b a", "ba b", "ab", "🙂", "日本 語", "zebra t", "x y", "end")
POISON = "!die"
"""A worker whose next token is this word dies. It stands in no other prompt."""


@dataclass(frozen=True)
class Habits:
    """How a run's clients ask. `gap_s`: mean time between requests of one client. Shares are probabilities per request."""

    gap_s: float = 2.0
    longest: int = 30
    deadlines: float = 0.2
    cancels: float = 0.08
    poison: float = 0.0
    light: float = 0.15
    bursts: float = 0.03
    burst: int = 12
    no_resume: float = 0.1
    retries: float = 0.1
    affinity: float = 0.1


@dataclass(frozen=True)
class Plan:
    """One request before it is asked. `cancel_after_s`: the caller gives it up then. `poison`: it kills its worker."""

    request: Generate | Embed | CountTokens | ModelDetails
    timeout_s: float | None
    cancel_after_s: float | None
    collect: bool
    resume: bool
    retries: int
    poison: bool


def draw(random: Random, habits: Habits, model: str) -> Plan:
    """The next request."""
    chance = random.random
    rid = random.getrandbits(62) + 1
    timeout_s = random.uniform(0.5, 25.0) if chance() < habits.deadlines else None
    deadline_ms = None if timeout_s is None else max(1, round(timeout_s * 1000))
    common: dict[str, Any] = {
        "priority": random.choice((-1, 0, 0, 0, 1)),
        "deadline_ms": deadline_ms,
        "affinity": f"session {random.randrange(4)}" if chance() < habits.affinity else None,
    }
    poison = chance() < habits.poison
    request: Generate | Embed | CountTokens | ModelDetails
    if not poison and chance() < habits.light:
        kind = random.randrange(3)
        if kind == 0:
            request = Embed(rid, model, texts=_words(random), **common)
        elif kind == 1:
            request = CountTokens(rid, model, prompt=" ".join(_words(random)), **common)
        else:
            request = ModelDetails(rid, model, **common)
    else:
        request = _generate(random, habits, rid, model, poison, common)
    return Plan(
        request,
        timeout_s,
        cancel_after_s=random.uniform(0.0, 4.0) if chance() < habits.cancels else None,
        collect=chance() < 0.3,
        resume=chance() >= habits.no_resume,
        retries=random.randrange(1, 6) if chance() < habits.retries else 0,
        poison=poison,
    )


def _words(random: Random) -> list[str]:
    return random.choices(WORDS, k=random.randrange(1, 9))


def _generate(random: Random, habits: Habits, rid: int, model: str, poison: bool, common: dict[str, Any]) -> Generate:
    words = _words(random)
    length = 1 + int((habits.longest - 1) * random.random() ** 2)
    stop = [random.choice(STOPS)] if random.random() < 0.3 else []
    if poison:
        place = random.randrange(len(words))
        words[place] = POISON
        length, stop = max(length, place + 1), []
    params = SamplingParams(max_tokens=length, stop=stop)
    form = random.randrange(4)
    if form == 0 and not poison:
        ids = pack_ids(random.choices(range(1000), k=len(words)))
        return Generate(rid, model, token_ids=ids, params=params, **common)
    if form == 1:
        return Generate(rid, model, messages=[ChatMessage("user", word) for word in words], params=params, **common)
    return Generate(rid, model, prompt=" ".join(words), params=params, **common)
