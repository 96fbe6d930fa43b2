"""How each API is asked for what SamplingParams says, and which of it it cannot be asked for.

Defaults are sent too where upstreams have their own (temperature, top_p, and vLLM's by the model's generation_config).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

from zmqserve.errors import ContextOverflow, InvalidParameter, Unsupported
from zmqserve.messages import Generate
from zmqserve.params import Guided, SamplingParams

from .hf_registry import EXTRAS, HostedModel

_TGI_CHAT = frozenset({"max_tokens", "temperature", "top_p", "stop", "seed", "frequency_penalty", "logprobs", "guided"})
_CHAT = _TGI_CHAT | {"presence_penalty", "n"}
_TEXT = _TGI_CHAT | {"top_k", "repetition_penalty", "echo", "skip_special_tokens"}
_EMBED = frozenset({"dimensions", "normalize"})
_GUIDED = {"openai": ("json",), "tgi": ("json", "regex"), "vllm": ("json", "regex", "choice", "grammar")}

HONOURED_BY_SOME = _CHAT | _TEXT | _EMBED | EXTRAS

_ALWAYS_SENT = frozenset({"top_k", "min_p", "repetition_penalty"})
"""Extras whose defaults a model's generation_config may change."""


class Plan(NamedTuple):
    """What to call the client's method with, and what to put over the body that it makes.

    `copies`: for how many equal answers the one stands that is asked for.
    """

    arguments: dict[str, Any]
    body: dict[str, Any]
    copies: int = 1


def honoured(model: HostedModel) -> frozenset[str]:
    """Names of the parameters that this model's API carries."""
    if model.api == "feature_extraction":
        return _EMBED
    if model.api == "text_generation":
        return _TEXT
    return {"openai": _CHAT, "tgi": _TGI_CHAT, "vllm": _CHAT | EXTRAS}[model.dialect] | frozenset(model.extra)


def plan_of(model: HostedModel, request: Generate) -> Plan:
    """How to ask for it. Raises Unsupported, which names what the model's API cannot carry, and ContextOverflow where that is sure."""
    params = request.params
    carried = honoured(model)
    for name in params.changed():
        if name not in carried:
            refuse(f"{name} is not supported by the {model.dialect} {model.api} API of model {model.name!r}", name)
    limit = model.context_length
    if limit and params.max_tokens is not None and params.max_tokens >= limit:
        text = f"max_tokens {params.max_tokens} and a prompt do not fit the model's context of {limit} tokens"
        raise ContextOverflow(text, data={"context_length": limit, "tokens": params.max_tokens + 1})
    guided = None if params.guided is None else _guided(model, params.guided)
    if model.api == "text_generation":
        return Plan(_text_arguments(request.prompt or "", params, guided), {})
    # vLLM refuses to make several greedy answers: they are equal.
    copies = params.n if model.dialect == "vllm" and params.temperature == 0 else 1
    arguments: dict[str, Any] = {
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages or ()],
        "model": model.upstream_name,
        "temperature": params.temperature,
        # TGI refuses a top_p of 1; it has no other default.
        "top_p": None if model.dialect == "tgi" and params.top_p == 1 else params.top_p,
        "max_tokens": params.max_tokens,
        "stop": params.stop or None,
        "seed": params.seed,
        "presence_penalty": params.presence_penalty or None,
        "frequency_penalty": params.frequency_penalty or None,
        "n": params.n if params.n > copies else None,
        "logprobs": True if params.logprobs is not None else None,
        "top_logprobs": params.logprobs or None,
        "stream_options": {"include_usage": True},
    }
    body = {name: getattr(params, name) for name in sorted(carried & EXTRAS) if name in _ALWAYS_SENT or name in params.changed()}
    if model.base_url is None:
        return Plan({**arguments, **(guided or {})}, body, copies)
    # For a URL the client would rewrite a response_format into TGI's form, which others take for "any JSON".
    return Plan(arguments, {**body, **(guided or {})}, copies)


def refuse(why: str, parameter: str) -> NoReturn:
    """Raise Unsupported."""
    raise Unsupported(why, data={"parameter": parameter})


def _text_arguments(prompt: str, params: SamplingParams, grammar: dict[str, Any] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "details": True,
        "max_new_tokens": params.max_tokens,
        "stop": params.stop or None,
        "repetition_penalty": params.repetition_penalty if params.repetition_penalty != 1 else None,
        "frequency_penalty": params.frequency_penalty or None,
        "top_n_tokens": params.logprobs or None,
        "return_full_text": False,
        **(grammar or {}),
    }
    if params.temperature == 0:
        # TGI is greedy when nothing speaks for sampling, and a temperature of 0 it refuses.
        return {**arguments, "do_sample": False}
    return {
        **arguments,
        "do_sample": True,
        "temperature": params.temperature,
        "top_p": params.top_p if params.top_p != 1 else None,
        "top_k": params.top_k or None,
        "seed": params.seed,
    }


def _guided(model: HostedModel, guided: Guided) -> dict[str, Any]:
    (kind,) = (name for name in ("json", "regex", "choice", "grammar") if getattr(guided, name) is not None)
    if kind not in _GUIDED[model.dialect]:
        refuse(f"guided.{kind} is not supported by the {model.dialect} {model.api} API of model {model.name!r}", "guided")
    value = getattr(guided, kind)
    if kind == "json":
        value = _schema(value)
    if model.api == "text_generation":
        return {"grammar": {"type": kind, "value": value}}
    if model.dialect == "tgi":
        return {"response_format": {"type": "json_object" if kind == "json" else kind, "value": value}}
    if kind == "json":
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}}
    return {"structured_outputs": {kind: value}}


def _schema(text: str) -> dict[str, Any]:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidParameter(f"guided.json is not JSON: {error}", data={"parameter": "guided"}) from None
    if not isinstance(schema, dict):
        raise InvalidParameter("guided.json must be a JSON schema, an object", data={"parameter": "guided"})
    return schema
