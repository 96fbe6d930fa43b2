"""One request in the making, on the event loop: its choices, each with a sequence in an engine and a reader of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from zmqserve.jobs import Delta
from zmqserve.messages import Resume, TokenLogprob, TopLogprob, unpack_ids
from zmqserve.params import SamplingParams
from zmqserve.resuming import reread
from zmqserve.stopping import StopStrings

from .checkpoint import Checkpoint
from .guided import Grammar, Guide
from .reader import Reader
from .sampling import Likelihood, Sampler
from .sequences import SequenceEngine, Token, TokenSequence

Emit = Callable[[Delta | Exception], None]

STAY_TOKENS = 16
"""What each choice makes at least between two pauses: to leave a batch and to come back into it costs as much as some steps."""


class _Choice:
    """One of the answers. `made` are the ids read so far, `late` is text that leaves with the next."""

    def __init__(self, index: int, reader: Reader, sampler: Sampler, guide: Guide | None, late: str) -> None:
        self.index = index
        self.reader = reader
        self.sampler = sampler
        self.guide = guide
        self.late = late
        self.made: list[int] = []
        self.complete: str | None = None
        self.sequence: TokenSequence | None = None


class Generation:
    """Makes `params.n` answers of at most `max_tokens` tokens each (None: until they end by themselves) to the ids `prompt`.

    Made on any thread, started on an event loop. `echo` is text that comes before each answer. `resume`: go on after what was
    received of the answer already. Raises InvalidParameter if that cannot be. `cached_tokens` of the prompt were not computed again.
    `grammar`: what the answers are held to; where it leaves nothing to say they end, whatever else is asked for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int | None,
        *,
        echo: str = "",
        resume: Resume | None = None,
        grammar: Grammar | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._prompt = prompt
        self._params = params
        self._max_tokens = max_tokens
        self._grammar = grammar
        goes_past_eos = params.ignore_eos and grammar is None
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if goes_past_eos else checkpoint.eos)
        stop = StopStrings(params.stop)
        self._choices = [self._choice(index, echo, stop) for index in range(params.n)]
        self._engine: SequenceEngine | None = None
        self._emit: Emit | None = None
        self._begun = False
        self._paused = False
        self._since_pause = 0
        self.cached_tokens = 0
        if resume is not None:
            first = self._choices[0]
            first.made = unpack_ids(resume.token_ids)
            first.late, first.complete = reread(resume, first.reader.read, echo)

    def __repr__(self) -> str:
        return f"Generation({[len(choice.made) for choice in self._choices]} tokens, {'done' if self.done else 'open'})"

    @property
    def done(self) -> bool:
        """Whether all answers are complete."""
        return all(choice.complete is not None for choice in self._choices)

    @property
    def waits(self) -> bool:
        """Whether the engine has begun with none of it. From any thread."""
        sequence = self._choices[0].sequence
        return not self._begun and (sequence is None or sequence.cached_tokens < 0)

    @property
    def settled(self) -> bool:
        """Whether it has made so much since it last came into the engine that it may be paused."""
        return self._since_pause >= STAY_TOKENS * len(self._choices)

    def start(self, engine: SequenceEngine, emit: Emit) -> None:
        """Begin: `emit` gets each delta, on this event loop, or at last what went wrong. Raises BackendError if the engine is stopping."""
        self._engine = engine
        self._emit = emit
        first = self._choices[0]
        if first.complete is not None:
            emit(Delta(first.late, finish_reason=first.complete))
        else:
            # The others begin when the first one's prompt has been computed: they find it in the engine's cache.
            self._open(first)

    def pause(self) -> None:
        """Make nothing for now, and hold nothing in the engine."""
        self._paused = True
        self._leave()

    def go_on(self) -> None:
        """After a pause: from the ids so far."""
        self._paused = False
        self._since_pause = 0
        for choice in self._choices if self._begun else self._choices[:1]:
            if choice.complete is None:
                self._open(choice)

    def stop(self) -> None:
        """No more is wanted."""
        self._emit = None
        self._leave()

    def _leave(self) -> None:
        for choice in self._choices:
            if self._engine is not None and choice.sequence is not None:
                self._engine.cancel(choice.sequence)
            choice.sequence = None

    def _choice(self, index: int, echo: str, stop: StopStrings) -> _Choice:
        reader = Reader(self._checkpoint, self._prompt, self._params, self._ends, self._max_tokens, stop)
        sampler = Sampler(self._params, len(self._prompt), self._ends, self._checkpoint.device, index)
        return _Choice(index, reader, sampler, self._guide(), echo)

    def _guide(self) -> Guide | None:
        if self._grammar is None:
            return None
        return Guide(self._grammar, self._checkpoint.eos, self._params.stop_token_ids, ignore_eos=self._params.ignore_eos)

    def _open(self, choice: _Choice) -> None:
        if self._engine is None:
            return
        choice.sequence = TokenSequence(
            self._prompt,
            choice.made,
            choice.sampler,
            partial(self._receive, choice),
            ends=self._ends,
            max_tokens=self._max_tokens,
            logprobs=self._params.logprobs,
            request=self,
            guide=choice.guide,
        )
        self._engine.open(choice.sequence)

    def _receive(self, choice: _Choice, token: Token | Exception) -> None:
        emit = self._emit
        if emit is None:
            return
        if isinstance(token, Exception):
            self.stop()
            emit(token)
            return
        try:
            first, self._begun = not self._begun, True
            if first and choice.sequence is not None:
                self.cached_tokens = max(0, min(choice.sequence.cached_tokens, len(self._prompt)))
            delta = self._read(choice, token)
            if delta.finish_reason is not None:
                self._close(choice)
            emit(delta)
            if first and self._emit is not None and not self._paused:
                for other in self._choices[1:]:
                    self._open(other)
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request
            self.stop()
            emit(error)

    def _read(self, choice: _Choice, token: Token) -> Delta:
        self._since_pause += 1
        choice.made.append(token.token_id)
        text, choice.complete = choice.reader.read(token.token_id)
        text, choice.late = choice.late + text, ""
        logprobs = None if token.likelihood is None else [self._logprob(token.token_id, token.likelihood)]
        return Delta(text, (token.token_id,), choice.index, logprobs, choice.complete)

    def _close(self, choice: _Choice) -> None:
        """The engine does not know of stop strings."""
        if self._engine is not None and choice.sequence is not None:
            self._engine.cancel(choice.sequence)
        choice.sequence = None

    def _logprob(self, token_id: int, likelihood: Likelihood) -> TokenLogprob:
        text_of = self._checkpoint.text_of
        top = [TopLogprob(i, text_of(i), logprob) for i, logprob in likelihood.top]
        return TokenLogprob(token_id, text_of(token_id), likelihood.logprob, top)
