"""Whether a worker can answer a request, asked before it does: what a backend cannot do is an error, never ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .errors import ModelLoading, UnknownModel, Unsupported, WorkerLost
from .jobs import checked
from .messages import CountTokens, Embed, Generate, ModelCard, ModelDetails, Request
from .resuming import FEATURE, refused

_INSTEAD = {"generate": ("chat", "send messages (client.chat)"), "chat": ("generate", "send a prompt (client.generate)")}
"""What a model may do that does not do the one or the other."""


def by_name(cards: Iterable[ModelCard]) -> dict[str, ModelCard]:
    """Cards by every name that they are asked for."""
    return {name: card for card in cards for name in (*card.aliases, card.name)}


def admit(request: Request, cards: Mapping[str, ModelCard], backend: str, honours: frozenset[str]) -> ModelCard:
    """The card of the model that answers, or the typed error that says why none does.

    `honours` names the parameters (of SamplingParams and EmbedParams) that the backend acts on, and ``token_ids`` if it takes them.
    """
    if not cards:
        raise ModelLoading(f"model {request.model!r} is still loading: try again", retry_after_ms=1000, data={"model": request.model})
    card = cards.get(request.model)
    if card is None:
        known = sorted(cards)
        raise UnknownModel(f"this worker has no model {request.model!r}, only {', '.join(known)}", data={"known_models": known})
    if isinstance(request, ModelDetails):
        return card
    verb = _verb(request)
    if verb not in card.verbs:
        other = _INSTEAD.get(verb)
        hint = f": {other[1]}" if other is not None and other[0] in card.verbs else ""
        _refuse(f"model {card.name!r} ({backend}) does not {verb}; it can: {', '.join(card.verbs)}{hint}", verb)
    checked(request)
    if isinstance(request, CountTokens):
        return card
    for name in _asked(request):
        if name not in honours:
            _refuse(f"{name} is not supported by the {backend} backend of model {card.name!r}", name)
    if isinstance(request, Generate) and request.resume is not None:
        _check_resume(request, card, backend)
    return card


def _verb(request: Generate | Embed | CountTokens) -> str:
    if isinstance(request, Embed):
        return "embed"
    if isinstance(request, CountTokens):
        return "count_tokens"
    return "generate" if request.messages is None else "chat"


def _asked(request: Generate | Embed) -> list[str]:
    """Names of what the request asks beyond the defaults."""
    if isinstance(request, Embed):
        params = request.params
        return [name for name in params.__struct_fields__ if getattr(params, name) is not None]
    return request.params.changed() + (["token_ids"] if request.token_ids is not None else [])


def _check_resume(request: Generate, card: ModelCard, backend: str) -> None:
    why = ""
    unfit = refused(request.params, card)
    if FEATURE not in card.features:
        why = f"the {backend} backend of model {card.name!r} cannot continue an answer"
    elif request.fingerprint is not None and request.fingerprint != card.fingerprint:
        why = f"model {card.name!r} here has fingerprint {card.fingerprint!r}, the answer began with {request.fingerprint!r}"
    elif unfit:
        why = f"the {backend} backend of model {card.name!r} cannot continue one with {', '.join(unfit)}"
    if why:
        # For the caller the answer is lost with the worker that began it. Sending the same again would not help.
        lost = WorkerLost(f"the answer's worker was lost, and {why}", data={"model": card.name, "parameters": unfit})
        lost.retryable = False
        raise lost


def _refuse(why: str, what: str) -> None:
    raise Unsupported(why, data={"parameter": what})
