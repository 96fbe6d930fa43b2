"""Answers that go on at another worker: what a resume must be, what a backend declares of it, and the received part read again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import msgspec

from .errors import InvalidParameter
from .messages import Generate, ModelCard, Resume, unpack_ids
from .params import SamplingParams

FEATURE = "resume"
"""How a ModelCard says that its answers can go on elsewhere."""

REFUSED = "refused"
GRADES = frozenset({"exact", "approximate", REFUSED})
NEVER_RESUMED = frozenset({"guided", "n"})
"""Parameters whose answers no backend continues: a grammar's state and several choices are not in the ids received."""


def declared(card: ModelCard, resumes: Mapping[str, str] | None, honours: Collection[str]) -> ModelCard:
    """The card with what its backend declares, if it resumes at all and the model generates; what the card says itself goes first.

    Raises InvalidParameter for a grade that is none, and for a card without fingerprint: nobody could tell who may go on.
    """
    if resumes is None or not {"generate", "chat"} & set(card.verbs):
        return card
    if not card.fingerprint:
        text = f"the card of model {card.name!r} needs a fingerprint: its backend declares that answers go on elsewhere"
        raise InvalidParameter(text, data={"parameter": "fingerprint"})
    never = dict.fromkeys(sorted(NEVER_RESUMED & set(honours)), REFUSED)
    grades = {**resumes, **card.resume, **never}
    for name, grade in grades.items():
        if grade not in GRADES:
            text = f"resumes[{name!r}] must be one of {', '.join(sorted(GRADES))}, got {grade!r}"
            raise InvalidParameter(text, data={"parameter": "resumes"})
    features = card.features if FEATURE in card.features else [*card.features, FEATURE]
    return msgspec.structs.replace(card, features=features, resume=grades)


def refused(params: SamplingParams, card: ModelCard) -> list[str]:
    """Names of what keeps an answer with these parameters from going on at the card's model."""
    asked = params.changed()
    if params.temperature == 0:
        asked.append("greedy")
    elif params.seed is None:
        asked.append("sampling")
    return [name for name in asked if name in NEVER_RESUMED or card.resume.get(name) == REFUSED]


def check_resume(request: Generate) -> None:
    """Raise InvalidParameter for a resume that is none of any answer."""
    resume = request.resume
    if resume is None:
        return
    for name, packed in (("token_ids", resume.token_ids), ("prompt_token_ids", resume.prompt_token_ids)):
        if packed is not None and len(packed) % 4:
            raise invalid(f"{name} must be u32, 4 bytes each: got {len(packed)} bytes")
    if resume.prompt_token_ids == b"":
        raise invalid("prompt_token_ids is empty: leave it out where the prompt's ids are not known")
    if not (resume.token_ids or resume.characters):
        return
    if not resume.next_seq:
        received = f"{len(resume.token_ids) // 4} ids and {resume.characters} characters"
        raise invalid(f"next_seq must be 1 or more where something was received, got 0 with {received}")
    if request.fingerprint is None:
        raise invalid("needs the request's fingerprint, which came with the first chunk: another model would go on with another answer")


def reread(resume: Resume, read: Callable[[int], tuple[str, str | None]], before: str = "") -> tuple[str, str | None]:
    """What of the received ids' text was not delivered yet, and why the answer is complete, if it is.

    `read` is what the backend reads new ids with: it gives the text that may leave with an id, and a finish reason with the last. So
    all that it remembers (half a character, the beginning of a stop string, a count) becomes what it was at the lost worker.
    `before`: text that the answer begins with, and that has no ids (echo). Raises InvalidParameter for ids after the answer's end and
    for more characters than there are.
    """
    ids = unpack_ids(resume.token_ids)
    pieces = [before]
    reason: str | None = None
    for position, token_id in enumerate(ids):
        if reason is not None:
            raise invalid(f"holds {len(ids)} ids, but the answer was complete ({reason}) after {position}")
        piece, reason = read(token_id)
        pieces.append(piece)
    text = "".join(pieces)
    if resume.characters > len(text):
        raise invalid(f"characters is {resume.characters}, but the text of the ids received has only {len(text)}")
    return text[resume.characters :], reason


def invalid(why: str) -> InvalidParameter:
    """The error for a resume with which no answer can go on."""
    return InvalidParameter(f"resume {why}", data={"parameter": FEATURE})
