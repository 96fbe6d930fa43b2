"""What keys may do, as ``access.toml`` beside them says. Pure but for `load_rules`, which reads the file.

::

    [defaults.client]                  # for every client's key
    requests_in_flight = 100
    allow = ["llama-*:*"]              # MODEL:VERB, both may hold * and ?
    [defaults.worker]                  # for every worker's key
    models = ["llama-*"]
    [keys.alice]                       # for one key; what it names stands in place of the default
    tokens_per_s = 2000
    deny = ["llama-70b:embed"]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from fnmatch import translate
from math import inf
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import InvalidParameter
from .messages import Priority

VERBS = ("generate", "chat", "embed", "count_tokens", "model_details", "models", "status")
"""What a client's key may be allowed. `drain` is for admins only."""
MODELLESS = ("models", "status")
"""Verbs that name no model: whoever may ask them at all is told of the models that it may use."""
MOST_REMEMBERED = 4096
"""Decisions that a set of globs remembers; model names come from peers."""

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_Rate = Annotated[float, Meta(gt=0)]
_Number = Annotated[int, Meta(ge=1)]
_TABLES = ("defaults", "keys")


class ClientRules(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a client's key may do.

    requests_in_flight: open requests at a time, over all connections of the key.
    requests_per_s, burst: requests of any kind, on average and at once (burst: one second's, at least 1).
    tokens_per_s: of prompts and answers, as workers count them. They are charged when a request ends: beyond the limit new ones wait.
    priority: the most urgent (lowest) that it may ask for.
    allow, deny: globs of MODEL:VERB. What is denied is not allowed.

    None, and ``inf`` for the rates, is no limit.
    """

    requests_in_flight: _Number | None = None
    requests_per_s: _Rate | None = None
    burst: _Number | None = None
    tokens_per_s: _Rate | None = None
    priority: Priority = 0
    allow: tuple[str, ...] = ("*:*",)
    deny: tuple[str, ...] = ()

    @property
    def rate(self) -> tuple[float, float] | None:
        """Requests a second, and at once; None: no limit."""
        if self.requests_per_s is None or self.requests_per_s == inf:
            return None
        return self.requests_per_s, float(self.burst or max(1.0, self.requests_per_s))

    @property
    def token_rate(self) -> tuple[float, float] | None:
        """Tokens a second, and how many a key that was idle has in hand: one second's. None: no limit."""
        if self.tokens_per_s is None or self.tokens_per_s == inf:
            return None
        return self.tokens_per_s, self.tokens_per_s


class WorkerRules(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a worker's key may do. models: globs of the models (and aliases) that it may serve; names: of what its workers may be called."""

    models: tuple[str, ...] = ("*",)
    names: tuple[str, ...] = ("*",)


class Globs:
    """Names that match any of several patterns of ``*``, ``?`` and ``[...]``; upper and lower case differ."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._match = re.compile("|".join(f"(?:{translate(pattern)})" for pattern in patterns) or r"(?!)").match

    def match(self, name: str) -> bool:
        """Whether it matches one of them."""
        return self._match(name) is not None


class Permits:
    """`allow` and `deny` of a client's rules, ready to be asked."""

    def __init__(self, rules: ClientRules) -> None:
        self._allow = [_split(pattern) for pattern in rules.allow]
        self._deny = [_split(pattern) for pattern in rules.deny]
        self.tells_chat = any(verbs.match("chat") != verbs.match("generate") for _, _, verbs in (*self._allow, *self._deny))
        """Whether chat and generate, which are one message, may be different to it."""
        self._modelless = {verb: self._may_without_model(verb) for verb in MODELLESS}
        self._decided: dict[tuple[str, str], bool] = {}

    def may(self, verb: str, model: str = "") -> bool:
        """Whether the verb may be asked of a model of that name, whether there is one or not."""
        if verb in self._modelless:
            return self._modelless[verb]
        decided = self._decided.get((model, verb))
        if decided is None:
            if len(self._decided) >= MOST_REMEMBERED:
                self._decided.clear()
            decided = self._decided[model, verb] = _any(self._allow, model, verb) and not _any(self._deny, model, verb)
        return decided

    def denied(self, verb: str, model: str) -> bool:
        """Whether it is denied by name, and not only not allowed."""
        return _any(self._deny, model, verb)

    def _may_without_model(self, verb: str) -> bool:
        if any(globs.match(verb) for _, _, globs in self._allow):
            return not any(pattern == "*" and globs.match(verb) for pattern, _, globs in self._deny)
        return False


class Rules:
    """All of a file: `client(name)` and `worker(name)` are those of the key with that name."""

    def __init__(
        self,
        client: ClientRules | None = None,
        worker: WorkerRules | None = None,
        keys: Mapping[str, tuple[ClientRules, WorkerRules]] | None = None,
    ) -> None:
        self._client = client or ClientRules()
        self._worker = worker or WorkerRules()
        self._keys = dict(keys or {})

    def __repr__(self) -> str:
        return f"Rules({len(self._keys)} keys)"

    def client(self, name: str) -> ClientRules:
        """For a client's key."""
        return self._keys[name][0] if name in self._keys else self._client

    def worker(self, name: str) -> WorkerRules:
        """For a worker's key."""
        return self._keys[name][1] if name in self._keys else self._worker


def load_rules(path: Path | None) -> Rules:
    """The file's rules; without a path, or where there is no file, the defaults. Raises InvalidParameter: file, setting and value."""
    if path is None:
        return Rules()
    try:
        return parse_rules(path.read_text(), str(path))
    except FileNotFoundError:
        return Rules()
    except OSError as error:
        raise _wrong(f"cannot read {path}: {error.strerror}", "access") from None
    except UnicodeDecodeError as error:
        raise _wrong(f"{path} is not TOML: {error}", "access") from None


def parse_rules(text: str, where: str) -> Rules:
    """The rules of such a file's text; `where` is what errors call it."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of TOML itself, or a number of thousands of digits
        raise _wrong(f"{where} is not TOML: {error}", "access") from None
    _only(tables, _TABLES, where, "")
    defaults = _table(tables, "defaults", where)
    _only(defaults, ("client", "worker"), where, "defaults.")
    client, worker = (_table(defaults, role, where, "defaults.") for role in ("client", "worker"))
    _only(client, ClientRules.__struct_fields__, where, "defaults.client.")
    _only(worker, WorkerRules.__struct_fields__, where, "defaults.worker.")
    default_client = _checked(client, ClientRules, f"{where}: [defaults.client]")
    default_worker = _checked(worker, WorkerRules, f"{where}: [defaults.worker]")
    keys: dict[str, tuple[ClientRules, WorkerRules]] = {}
    for name, table in _table(tables, "keys", where).items():
        if not _NAME.fullmatch(name):
            raise _wrong(f"{where}: [keys.{name!r}]: a key's name has 1 to 64 of A-Z a-z 0-9 . _ -", f"keys.{name}")
        if not isinstance(table, Mapping):
            raise _wrong(f"{where}: keys.{name} = {table!r}: expected a table, [keys.{name}]", f"keys.{name}")
        _only(table, (*ClientRules.__struct_fields__, *WorkerRules.__struct_fields__), where, f"keys.{name}.")
        own = f"{where}: [keys.{name}]"
        as_client, as_worker = client | _of(table, ClientRules), worker | _of(table, WorkerRules)
        keys[name] = _checked(as_client, ClientRules, own), _checked(as_worker, WorkerRules, own)
    return Rules(default_client, default_worker, keys)


_R = TypeVar("_R", bound=Struct)


def _of(table: Mapping[str, Any], kind: type[Struct]) -> dict[str, Any]:
    return {name: value for name, value in table.items() if name in kind.__struct_fields__}


def _checked(table: Mapping[str, Any], kind: type[_R], where: str) -> _R:
    for setting, value in table.items():
        try:
            msgspec.convert({setting: value}, kind)
            for pattern in value if isinstance(value, list) else ():
                _check_pattern(setting, pattern)
        except (msgspec.ValidationError, ValueError) as error:
            text = str(error).partition(" - at `$")[0]
            raise _wrong(f"{where} {setting} = {value!r}: {text}", setting) from None
    return msgspec.convert(table, kind)


def _check_pattern(setting: str, pattern: str) -> None:
    if setting not in ("allow", "deny"):
        return
    model, colon, verb = pattern.rpartition(":")
    if not colon or not model or not any(map(Globs([verb]).match, VERBS)):
        raise ValueError(f"{pattern!r} is not MODEL:VERB; verbs: {', '.join(VERBS)}, or * for all")


def _table(tables: Mapping[str, Any], name: str, where: str, above: str = "") -> dict[str, Any]:
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise _wrong(f"{where}: {above}{name} = {table!r}: expected a table, [{above}{name}]", f"{above}{name}")
    return table


def _only(table: Mapping[str, Any], known: tuple[str, ...], where: str, above: str) -> None:
    for name, value in table.items():
        if name not in known:
            raise _wrong(f"{where}: {above}{name} = {value!r}: no such setting; there are: {', '.join(known)}", f"{above}{name}")


def _wrong(text: str, parameter: str) -> InvalidParameter:
    return InvalidParameter(text, data={"parameter": parameter})


def _split(pattern: str) -> tuple[str, Globs, Globs]:
    model, _, verb = pattern.rpartition(":")
    return model, Globs([model]), Globs([verb])


def _any(patterns: Iterable[tuple[str, Globs, Globs]], model: str, verb: str) -> bool:
    return any(models.match(model) and verbs.match(verb) for _, models, verbs in patterns)
