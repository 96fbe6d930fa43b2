"""The models that one HuggingfaceApiWorker serves, and the registry file that lists them.

TOML with one ``[[models]]`` table for each, or JSON with a list ``models`` of objects, with the fields of HostedModel as keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from zmqserve.errors import InvalidParameter

EXTRAS = frozenset({"ignore_eos", "min_p", "min_tokens", "repetition_penalty", "skip_special_tokens", "stop_token_ids", "top_k"})
"""Parameters that OpenAI's API lacks and some servers take under these names."""

Api: TypeAlias = Literal["chat", "text_generation", "feature_extraction"]
Server: TypeAlias = Literal["openai", "tgi", "vllm"]

MOST_SLOTS = 100
"""Connections that the HTTP client keeps to one upstream."""


class HostedModel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model behind an API.

    name: what clients ask for. model: what the upstream calls it (default: `name`). api: ``chat``, ``text_generation`` or
    ``feature_extraction``. base_url: an Inference Endpoint, or an OpenAI-, TGI- or TEI-compatible server; provider: one of Hugging Face's
    Inference Providers; neither: Hugging Face chooses one. server: what is at `base_url`, ``openai`` (the default for chats), ``tgi``
    (for the others; TEI is meant with it where vectors are) or ``vllm``: it decides which parameters can be carried.
    extra: parameters that it takes beyond those, by their own names: see EXTRAS.
    token_env, token_file: where its token comes from; neither: none for a `base_url`, the saved login for a provider.
    context_length: in tokens, 0 if not known. slots: requests at one time. retries: how often a request is tried again that failed
    before its first token. connect_timeout_s, first_token_timeout_s, token_timeout_s: what connecting, the first token (after
    sending), and each later one may take; `first_token_timeout_s` is also for the vectors of a batch.
    """

    name: str
    model: str = ""
    api: Api = "chat"
    base_url: str | None = None
    provider: str | None = None
    server: Server | None = None
    extra: list[str] = []
    token_env: str | None = None
    token_file: str | None = None
    context_length: int = 0
    aliases: list[str] = []
    slots: int = 8
    retries: int = 3
    connect_timeout_s: float = 5.0
    first_token_timeout_s: float = 120.0
    token_timeout_s: float = 60.0

    @property
    def upstream_name(self) -> str:
        """What the upstream calls it."""
        return self.model or self.name

    @property
    def dialect(self) -> str:
        """What takes its requests: ``openai``, ``tgi`` or ``vllm``."""
        return self.server or ("openai" if self.api == "chat" else "tgi")


_SERVERS = {"chat": ("openai", "tgi", "vllm"), "text_generation": ("tgi",), "feature_extraction": ("openai", "tgi")}
_CHOICES = {"api": get_args(Api), "server": get_args(Server)}
_KEYS = ", ".join(HostedModel.__struct_fields__)


def read_registry(path: Path) -> list[HostedModel]:
    """The models that the file lists. InvalidParameter, one sentence, for a file or an entry that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(str(path), f"cannot be read: {getattr(error, 'strerror', None) or error}")
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        elif path.suffix == ".toml":
            content = tomllib.loads(text)
        else:
            _refuse(str(path), "must end in .toml or .json")
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        _refuse(str(path), f"is not {path.suffix[1:].upper()}: {error}")
    if not isinstance(content, dict) or list(content) != ["models"]:
        found = ", ".join(content) or "nothing" if isinstance(content, dict) else f"a {type(content).__name__}"
        _refuse(str(path), f"must hold models, a list of tables, and nothing else; it holds {found}")
    entries = content["models"]
    if not isinstance(entries, list) or not entries:
        _refuse(str(path), "must list at least one model, as [[models]] tables")
    models = [_entry(path, number, entry) for number, entry in enumerate(entries, 1)]
    check_names(models, str(path))
    return models


def check_names(models: Iterable[HostedModel], origin: str) -> None:
    """Raise InvalidParameter where two models answer to one name."""
    taken: dict[str, str] = {}
    for model in models:
        for name in (model.name, *model.aliases):
            if name in taken:
                _refuse(origin, f"model {model.name!r}: the name {name!r} is taken by model {taken[name]!r}: give each its own")
            taken[name] = model.name


def checked(model: HostedModel, where: str) -> HostedModel:
    """The model, if its settings can be used together; InvalidParameter, which begins with `where` and names the key, otherwise."""
    for key, value in (("name", model.name), *(("aliases", alias) for alias in model.aliases)):
        if not 1 <= len(value) <= 256:
            _refuse(where, f"{key} must be 1 to 256 characters long, got {value!r}", key)
    for key, good, allowed in (
        ("slots", 1 <= model.slots <= MOST_SLOTS, f"an integer from 1 to {MOST_SLOTS}"),
        ("retries", 0 <= model.retries <= 20, "an integer from 0 to 20"),
        ("context_length", 0 <= model.context_length < 2**31, "a number of tokens, or 0 where it is not known"),
        ("connect_timeout_s", 0 < model.connect_timeout_s < 1e6, "a number of seconds above 0"),
        ("first_token_timeout_s", 0 < model.first_token_timeout_s < 1e6, "a number of seconds above 0"),
        ("token_timeout_s", 0 < model.token_timeout_s < 1e6, "a number of seconds above 0"),
    ):
        if not good:
            _refuse(where, f"{key} must be {allowed}, got {getattr(model, key)!r}", key)
    if model.base_url is not None:
        _check_url(model.base_url, where)
        if model.provider is not None:
            _refuse(where, "base_url and provider cannot both be set: a URL is its own provider", "provider")
    if model.token_env is not None and model.token_file is not None:
        _refuse(where, "token_env and token_file cannot both be set: choose one", "token_file")
    if model.api == "text_generation" and model.base_url is None and model.provider != "hf-inference":
        _refuse(where, "api text_generation needs a base_url, or provider hf-inference: others stream it in formats of their own", "api")
    if model.server is not None and model.base_url is None:
        _refuse(where, "server is for a base_url: it says what that is", "server")
    servers = _SERVERS[model.api]
    if model.server is not None and model.server not in servers:
        _refuse(where, f"server must be one of {', '.join(servers)} for api {model.api}, got {model.server!r}", "server")
    unknown = sorted(set(model.extra) - EXTRAS)
    if unknown:
        _refuse(where, f"extra must be a list of some of {', '.join(sorted(EXTRAS))}, got {unknown[0]!r}", "extra")
    if model.extra and model.api != "chat":
        _refuse(where, "extra is for api chat: what the others take is known", "extra")
    return model


def _entry(path: Path, number: int, entry: Any) -> HostedModel:
    if not isinstance(entry, Mapping):
        _refuse(f"{path}: model {number}", f"must be a table of settings, got {type(entry).__name__}")
    name = entry.get("name")
    where = f"{path}: model {name!r}" if isinstance(name, str) and name else f"{path}: model {number}"
    if name is None:
        _refuse(where, "name is missing: say what clients ask for", "name")
    for key in entry:
        if key not in HostedModel.__struct_fields__:
            _refuse(where, f"{key!r} is not a key; known: {_KEYS}", key)
    try:
        model = msgspec.convert(entry, HostedModel)
    except msgspec.ValidationError as error:
        # "Expected `int`, got `str` - at `$.slots`"
        why, _, at = str(error).partition(" - at `$.")
        key = at.rstrip("`")
        if key in _CHOICES:
            _refuse(where, f"{key} must be one of {', '.join(_CHOICES[key])}, got {entry[key]!r}", key)
        _refuse(where, f"{key} is wrong: {why[0].lower()}{why[1:].replace('`', '')}", key.partition("[")[0])
    return checked(model, where)


def _check_url(url: str, where: str) -> None:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        _refuse(where, f"base_url is no URL: {error}", "base_url")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        _refuse(where, "base_url must begin with http:// or https:// and a host", "base_url")
    if parts.username or parts.password:
        # Not shown: it holds a secret.
        _refuse(where, "base_url must not hold a user or password: give the secret by token_env or token_file", "base_url")


def _refuse(where: str, why: str, key: str = "registry") -> NoReturn:
    raise InvalidParameter(f"{where}: {why}", data={"parameter": key})
