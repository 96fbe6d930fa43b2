"""The events of an upstream's stream, read as the deltas of an answer.

What upstreams do differently is made the same here: a stop string is never part of the text, every choice ends with ``stop`` or
``length``, and what was asked for and is not there (a choice, log probabilities) is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from zmqserve.jobs import Delta, GenerateJob
from zmqserve.messages import TokenLogprob, TopLogprob
from zmqserve.stopping import StopMatcher, StopStrings

from .hf_errors import Blame

NO_ID = -1
"""The token id in log probabilities of a chat: the API tells none."""

_PART = "\ufffd"
_REASONS = {"stop": "stop", "length": "length", "eos": "stop", "eos_token": "stop", "stop_sequence": "stop"}


class _Choice:
    """One answer as it comes. `reason`: why it ended, None while it goes on; `cut`: it ended here, at a stop string, not upstream."""

    __slots__ = ("_matcher", "cut", "index", "logprobs_seen", "reason")

    def __init__(self, index: int, stop: StopStrings) -> None:
        self._matcher = StopMatcher(stop)
        self.index = index
        self.reason: str | None = None
        self.cut = False
        self.logprobs_seen = False

    def read(self, text: str, ids: tuple[int, ...], logprobs: list[TokenLogprob] | None, reason: str | None) -> Delta | None:
        """The delta for new text, or None where nothing is to be told yet."""
        self.logprobs_seen = self.logprobs_seen or bool(logprobs)
        text, stopped = self._matcher.feed(text)
        if stopped:
            self.cut = reason is None
            reason = "stop"
        elif reason is not None:
            # Some servers end an answer that ends inside a character with what stands for a part of one.
            text = (text + self._matcher.flush()).rstrip(_PART)
        self.reason = reason
        return Delta(text, ids, self.index, logprobs, reason) if text or ids or logprobs or reason is not None else None


class _Reader:
    """Reads one stream for `job`.

    `copies`: how many equal answers the one stands for that was asked for. `started`: a token has come, if only of the model's reasoning.
    `finished`: all choices have ended. `cut`: nothing more is wanted.
    """

    def __init__(self, job: GenerateJob, blame: Blame, context_length: int, copies: int = 1) -> None:
        self._job = job
        self._params = job.request.params
        self._blame = blame
        self._context_length = context_length
        self._copies = copies
        # Before min_tokens a stop string does not count, and only the server knows when that is: it does it alone.
        stop = StopStrings(() if self._params.min_tokens else self._params.stop)
        self._choices = [_Choice(index, stop) for index in range(self._params.n // copies)]
        self._last: list[Delta] = []
        self._before = self._job.request.prompt or "" if self._params.echo else ""
        self.started = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({sum(choice.reason is not None for choice in self._choices)} of {len(self._choices)} ended)"

    @property
    def finished(self) -> bool:
        return all(choice.reason is not None for choice in self._choices)

    @property
    def cut(self) -> bool:
        return self.finished and any(choice.cut for choice in self._choices)

    def copied(self, delta: Delta) -> Iterator[Delta]:
        """The delta, once for each answer that it is part of."""
        yield delta
        for index in range(1, self._copies):
            yield msgspec.structs.replace(delta, index=index)

    def end(self) -> Iterable[Delta]:
        """The stream has ended: the last deltas, kept back until the usage was known. Raises Failure for an answer that is not whole."""
        if not self.finished:
            raise self._blame.broken("the stream ended before the answer did: it gave no finish_reason", transient=not self.started)
        if self._params.logprobs is not None and self.started and not all(choice.logprobs_seen for choice in self._choices):
            raise self._blame.ignored("logprobs")
        # Ids of deltas that have not left are not counted there yet.
        made = self._job.completion_tokens + sum(len(delta.token_ids) for delta in self._last)
        used = self._job.prompt_tokens + made
        wanted = self._params.max_tokens
        cut_short = self._params.n == 1 and self._choices[0].reason == "length" and wanted is not None
        if cut_short and wanted is not None and made < wanted and used >= self._context_length > 0:
            raise self._blame.overflow(self._job.prompt_tokens, wanted, self._context_length)
        return self._last

    def _take(
        self, choice: _Choice, text: str, ids: tuple[int, ...], logprobs: list[TokenLogprob] | None, reason: str | None
    ) -> Iterator[Delta]:
        """What leaves at once of a piece of a choice."""
        if choice.reason is not None:
            return
        delta = choice.read(text, ids, logprobs, reason)
        if delta is None:
            return
        if self._before:
            delta = msgspec.structs.replace(delta, text=self._before + delta.text)
            self._before = ""
        if delta.finish_reason is None:
            yield delta
            return
        if len(self._choices) > 1:
            # Others may still go on for long.
            yield Delta(delta.text, delta.token_ids, delta.index, delta.logprobs)
            delta = Delta("", (), delta.index, None, delta.finish_reason)
        self._last.append(delta)

    def _reason(self, given: Any) -> str | None:
        if given is None:
            return None
        reason = _REASONS.get(given) if isinstance(given, str) else None
        if reason is None:
            raise self._blame.nonsense(f"the upstream ended the answer with finish_reason {given!r}, which is no whole answer")
        return reason


class ChatReader(_Reader):
    """Reads chat completion chunks. Usage is the upstream's; 0 where it tells none. Reasoning is not part of the answer."""

    def read(self, event: Any) -> Iterator[Delta]:
        """The deltas of one event. Raises Failure for one that is none of a chat completion."""
        if event.usage is not None:
            self._read_usage(event.usage)
        for piece in event.choices or ():
            if type(piece.index) is not int or not 0 <= piece.index < len(self._choices):
                raise self._blame.nonsense(f"the stream has a choice with index {piece.index!r}, and {len(self._choices)} were asked for")
            delta = piece.delta or {}
            text = delta.get("content") or ""
            if not isinstance(text, str):
                raise self._blame.nonsense(f"the stream has a piece of content that is no text but {type(text).__name__}")
            if delta.get("tool_calls"):
                raise self._blame.nonsense("the model calls tools, and none were offered")
            logprobs = self._logprobs(piece.logprobs)
            self.started = self.started or bool(text or logprobs or delta.get("reasoning") or delta.get("reasoning_content"))
            yield from self._take(self._choices[piece.index], text, (), logprobs, self._reason(piece.finish_reason))

    def _read_usage(self, usage: Any) -> None:
        counts = [usage.prompt_tokens, usage.completion_tokens]
        if not all(type(count) is int and count >= 0 for count in counts):
            return
        self._job.prompt_tokens, self._job.completion_tokens = counts[0], counts[1] * self._copies
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        self._job.cached_tokens = cached if type(cached) is int and cached >= 0 else 0

    def _logprobs(self, given: Any) -> list[TokenLogprob] | None:
        """As asked for: some servers tell more of the likeliest tokens, and some an empty list."""
        most = self._params.logprobs
        if most is None or given is None or not given.content:
            return None
        return [
            TokenLogprob(
                NO_ID,
                _text(entry.token),
                float(entry.logprob),
                [TopLogprob(NO_ID, _text(top.token), float(top.logprob)) for top in (entry.top_logprobs or ())[:most]],
            )
            for entry in given.content
        ]


class TextReader(_Reader):
    """Reads TGI's token events, which name each token's id. Usage: the ids, and the prompt's length where the server tells it."""

    def read(self, event: Any) -> Iterator[Delta]:
        """The delta of one token. Raises Failure for an event that is none of a text generation."""
        token = event.token
        if token is None or type(token.id) is not int or not isinstance(token.text, str):
            raise self._blame.nonsense("the stream has an event without a token: this is no text generation API (TGI)")
        ended = event.details
        if ended is not None and type(ended.input_length) is int:
            self._job.prompt_tokens = ended.input_length
        text = "" if token.special and self._params.skip_special_tokens else token.text
        reason = None if ended is None else self._reason(ended.finish_reason)
        self.started = True
        yield from self._take(self._choices[0], text, (token.id,), self._logprobs(token, event), reason)

    def _logprobs(self, token: Any, event: Any) -> list[TokenLogprob] | None:
        most = self._params.logprobs
        if most is None:
            return None
        top = [TopLogprob(other.id, _text(other.text), float(other.logprob)) for other in (event.top_tokens or ())[:most]]
        return [TokenLogprob(token.id, token.text, float(token.logprob), top)]


def _text(given: Any) -> str:
    return given if isinstance(given, str) else ""
