"""What an upstream refused or broke, as the error that tells the caller what to do about it."""

from __future__ import annotations

import json
import math
import re
from typing import Any
from urllib.parse import urlsplit

from zmqserve.errors import ContextOverflow, InvalidParameter, Overloaded, Unsupported, UpstreamError, ZmqserveError

from .hf_registry import HostedModel
from .hf_token import HIDDEN, Token

MOST_CHARACTERS = 300
"""Of an upstream's own words in an error."""

# What OpenAI, vLLM, TGI and TEI say of a request that is too long.
_ABOUT_CONTEXT = re.compile(r"context[ _]length|context window|max_model_len|`inputs`(?: tokens \+ `max_new_tokens`)? must", re.IGNORECASE)
_LIMIT = re.compile(
    r"(?:context length is(?: only)?|context window of|max_model_len=|must be <=|must have less than)\s*(\d+)", re.IGNORECASE
)
_NUMBER = re.compile(r"\d+")


class Failure(Exception):
    """One exchange with the upstream failed. `error` is what the caller gets; `transient`: trying again may help, as long as no token
    has come; `told_s`: not before so many seconds, if the upstream said so."""

    def __init__(self, error: ZmqserveError, *, transient: bool = False, told_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.transient = transient
        self.told_s = told_s


class Blame:
    """Composes the errors of one hosted model. None of them shows its token, or the query of its URL."""

    def __init__(self, model: HostedModel, token: Token) -> None:
        self._model = model
        self._token = token
        self._query = urlsplit(model.base_url or "").query

    def __repr__(self) -> str:
        return f"Blame({self._model.name!r})"

    def status(self, status: int, url: str, body: str, told_s: float | None) -> Failure:
        """For an answer that is none, by its HTTP status; `body` is the beginning of what came with it."""
        words = self.words(message_of(body))
        said = (f"{status} at {shown(url)}" if url else str(status)) + (f": {words}" if words else "")
        name = self._model.name
        data: dict[str, str | int] = {"model": name, "status": status}
        if status == 429:
            retry_after_ms = None if told_s is None else math.ceil(told_s * 1000)
            text = f"model {name!r}: the upstream limits its requests ({said})"
            return Failure(Overloaded(text, retry_after_ms=retry_after_ms, data=data), transient=True, told_s=told_s)
        if status in (401, 403):
            token = self._token
            used = f"refused the token from {token.source}" if token.value is not None else "wants a token (token_env or token_file)"
            return Failure(UpstreamError(f"model {name!r}: the upstream {used} ({said})", data=data))
        if status == 404:
            missing = f"there is no model {self._model.upstream_name!r}, or no such API, at the upstream"
            return Failure(UpstreamError(f"model {name!r}: {missing} ({said})", data=data))
        if status in (400, 413, 422):
            overflow = self._overflow(words)
            if overflow is not None:
                return Failure(overflow)
            return Failure(InvalidParameter(f"model {name!r}: the upstream refuses the request ({said})", data=data))
        if 300 <= status < 400:
            text = f"model {name!r}: the upstream has moved ({said}); redirects are not followed, set base_url to where it is now"
            return Failure(UpstreamError(text, data=data))
        # 501 and 505 will be so next time too.
        passing = status in (408, 425) or (status >= 500 and status not in (501, 505))
        error = UpstreamError(f"model {name!r}: the upstream failed ({said})", data=data)
        error.retryable = passing
        if told_s is not None:
            error.retry_after_ms = math.ceil(told_s * 1000)
        return Failure(error, transient=passing and status >= 500, told_s=told_s)

    def broken(self, what: str, *, transient: bool = True) -> Failure:
        """For a connection that failed, or broke off."""
        error = UpstreamError(f"model {self._model.name!r}: {self.words(what)}", data={"model": self._model.name})
        error.retryable = True
        return Failure(error, transient=transient)

    def nonsense(self, what: str) -> Failure:
        """For an answer that is not what the API promises."""
        return Failure(UpstreamError(f"model {self._model.name!r}: {self.words(what)}", data={"model": self._model.name}))

    def late(self, key: str) -> Failure:
        """For what took longer than the setting `key` allows."""
        seconds: float = getattr(self._model, key)
        waited = {
            "first_token_timeout_s": "has sent nothing of the answer",
            "token_timeout_s": "stopped in the middle of its answer: nothing more came",
        }[key]
        text = f"model {self._model.name!r}: the upstream {waited} within {seconds:g} s ({key})"
        error = UpstreamError(text, data={"model": self._model.name, "timeout": key, "seconds": seconds})
        error.retryable = True
        return Failure(error)

    def ignored(self, parameter: str) -> Failure:
        """For a parameter that the upstream took and did not act on."""
        text = f"model {self._model.name!r}: the upstream ignores {parameter}: its answer shows nothing of it"
        return Failure(Unsupported(text, data={"model": self._model.name, "parameter": parameter}))

    def overflow(self, prompt_tokens: int, max_tokens: int, context_length: int) -> Failure:
        """For an answer that the upstream cut where the context was full, below max_tokens."""
        needed = prompt_tokens + max_tokens
        made = f"the prompt's {prompt_tokens} tokens and max_tokens {max_tokens} make {needed}"
        text = f"model {self._model.name!r}: {made}, over its context of {context_length} tokens, where the upstream cut the answer"
        return Failure(ContextOverflow(text, data={"model": self._model.name, "context_length": context_length, "tokens": needed}))

    def reported(self, said: Any) -> Failure:
        """For an error that came as an event of a stream."""
        text = said if isinstance(said, str) else json.dumps(said, default=str)
        status = said.get("code") if isinstance(said, dict) else None
        if isinstance(status, int) and 400 <= status < 600:
            return self.status(status, self._model.base_url or "", text, None)
        overflow = self._overflow(self.words(message_of(text)))
        return Failure(overflow) if overflow is not None else self.broken(f"the upstream broke off with an error: {message_of(text)}")

    def words(self, text: str) -> str:
        """The upstream's own words: on one line, short, and without secrets."""
        text = self._token.hide(text)
        if self._query:
            text = text.replace(self._query, HIDDEN)
        plain = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
        return plain if len(plain) <= MOST_CHARACTERS else plain[: MOST_CHARACTERS - 3] + "..."

    def _overflow(self, words: str) -> ContextOverflow | None:
        """ContextOverflow with the numbers that the upstream names, if that is what its words say."""
        if not _ABOUT_CONTEXT.search(words):
            return None
        limit = _LIMIT.search(words)
        context_length = int(limit[1]) if limit else self._model.context_length
        data: dict[str, str | int] = {"model": self._model.name}
        if context_length:
            data["context_length"] = context_length
            # They name the whole need, or its parts (prompt and max_tokens).
            counts = [int(number) for number in _NUMBER.findall(words) if int(number) != context_length]
            data["tokens"] = next((count for count in counts if count > context_length), max(sum(counts), context_length + 1))
        return ContextOverflow(f"model {self._model.name!r}: the request does not fit its context: {words}", data=data)


def message_of(body: str) -> str:
    """The message in an error's JSON, in one of the forms that are in use; any other text unchanged."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return body
    for _ in range(2):
        if isinstance(content, dict):
            content = next((content[key] for key in ("error", "message", "detail", "errors") if content.get(key)), content)
    return content if isinstance(content, str) else json.dumps(content)


def shown(url: str) -> str:
    """A URL without its query, which may hold a key."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
