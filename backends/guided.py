"""Guided decoding: which tokens may come next in an answer that is held to a form. Without llguidance all else works."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from zmqserve.errors import BackendError, InvalidParameter, Unsupported
from zmqserve.params import Guided

from .guided_errors import cannot_be_followed, check_multiples, kind_of, shortened
from .model_errors import missing_libraries

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_CHARACTERS = 65_536
"""Of a schema, a regular expression or all choices together. What takes longest, an object of nothing but optional properties, is
compiled in about a second then."""
MOST_GRAMMAR_CHARACTERS = 32_768
"""Of a grammar, whose conversion takes time with the square of its rules: about half a second for so many."""
MOST_KEPT = 32
"""Compiled forms that are kept for a model."""
_MOST_STATES = 50_000
"""Of the automaton of one form, which grows with the answers held to it: some 25 MB."""
_STEP_FUEL = 100_000
_STEP_ITEMS = 20_000
"""What one answer may take in a step, in the library's units: some 10 ms, which others in the batch wait for."""


class Grammar(NamedTuple):
    """A compiled form: `start` is at its beginning and is only copied. `name` is the parameter's, as errors tell it."""

    name: str
    start: LLMatcher


class Grammars:
    """Compiles the forms that requests ask for, for a tokenizer and a model of `size` ids of which `eos` end an answer.

    For one thread at a time. It keeps the latest forms. The library's view of the tokenizer takes some tenths of a second, in which no
    other thread of this process runs, so it is made here; where it cannot be made, `compile` says why.
    """

    def __init__(self, tokenizer: Any, size: int, eos: Collection[int]) -> None:
        self._words: LLTokenizer | Unsupported
        try:
            self._words = _words(tokenizer, size, sorted(eos))
        except Unsupported as error:
            self._words = error
        self._kept: OrderedDict[tuple[str, str], Grammar] = OrderedDict()

    def __repr__(self) -> str:
        return f"Grammars({len(self._kept)} kept)"

    def compile(self, guided: Guided) -> Grammar:
        """The form, from its beginning. The first time takes up to about a second, and other threads run meanwhile.

        Raises InvalidParameter for one that is wrong or too large, Unsupported where nothing can be guided.
        """
        kind = kind_of(guided)
        text = json.dumps(guided.choice) if kind == "choice" else getattr(guided, kind)
        found = self._kept.get((kind, text))
        if found is None:
            found = self._kept[kind, text] = self._compiled(f"guided.{kind}", kind, text)
            if len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end((kind, text))
        return found

    def _compiled(self, name: str, kind: str, text: str) -> Grammar:
        most = MOST_GRAMMAR_CHARACTERS if kind == "grammar" else MOST_CHARACTERS
        if len(text) > most:
            raise InvalidParameter(f"{name} has {len(text)} characters, more than {most}", data={"parameter": name})
        check_multiples(name, text)
        if isinstance(self._words, Unsupported):
            raise Unsupported(self._words.message, data=self._words.data)
        from llguidance import LLMatcher, LLParserLimits

        from .guided_text import form_of

        try:
            limits = LLParserLimits(
                max_lexer_states=_MOST_STATES, step_lexer_fuel=_STEP_FUEL, step_max_items=_STEP_ITEMS, verbose_errors=False
            )
            start = LLMatcher(self._words, LLMatcher.grammar_from_lark(form_of(kind, text)), log_level=0, limits=limits)
            # Some forms turn out to be none only here, as one that never ends; and what this computes is shared by all copies.
            start.compute_logit_bias()
            why = "no text fits it" if start.get_error().startswith("NoExtension") else start.get_error()
        except Exception as error:  # noqa: BLE001 - converters in Python raise anything, RecursionError too
            why = str(error) or type(error).__name__
        if why:
            raise cannot_be_followed(name, why)
        return Grammar(name, start)


class Guide:
    """Of one answer in its grammar. On its engine's thread.

    An id of `eos` may come where the form is complete, one of `stop_ids` there and where the form has that token. `ignore_eos`: those
    of `eos` come only when nothing else may.
    """

    def __init__(self, grammar: Grammar, eos: Collection[int], stop_ids: Collection[int] = (), *, ignore_eos: bool = False) -> None:
        self._name = grammar.name
        self._matcher = grammar.start.deep_copy()
        self._eos = torch.tensor(sorted(eos))
        self._stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.long)
        self._ignore_eos = ignore_eos
        self._taken: list[int] = []

    def __repr__(self) -> str:
        return f"Guide({self._name}, {len(self._taken)} ids)"

    def mask(self, answer: Sequence[int], logits: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """`logits` (1, vocabulary) with all that may not come after `answer` at minus infinity; and whether only its end may come.

        Raises InvalidParameter if the form turns out to be too much for the limits of a step, or for the model's tokens.
        """
        self._follow(list(answer))
        allowed, over = self._allowed(logits.shape[-1])
        return logits.masked_fill(~allowed.to(logits.device), float("-inf")), over

    def _follow(self, answer: list[int]) -> None:
        """Come to the end of `answer`. It may be another than the last time: a token that was chosen may never have been taken."""
        matcher, known = self._matcher, len(self._taken)
        if answer[:known] != self._taken:
            matcher.reset()
            known = 0
        matcher.consume_tokens(answer[known:])
        self._check()
        self._taken = answer

    def _allowed(self, size: int) -> tuple[torch.Tensor, bool]:
        bias = self._matcher.compute_logit_bias()
        self._check()
        # The tokenizer may have fewer ids than the model, or more.
        allowed = torch.zeros(max(size, len(bias)), dtype=torch.bool)
        allowed[: len(bias)] = torch.frombuffer(bytearray(bias), dtype=torch.uint8).bool()
        if allowed[self._eos].any():
            allowed[self._stop_ids[self._stop_ids < size]] = True
        if not allowed[:size].any():
            raise InvalidParameter(f"{self._name} asks for text that the model has no token for", data={"parameter": self._name})
        goes_on = allowed[:size].clone()
        goes_on[self._eos] = False
        if self._ignore_eos and goes_on.any():
            allowed[self._eos] = False
        goes_on[self._stop_ids[self._stop_ids < size]] = False
        return allowed[:size], not goes_on.any()

    def _check(self) -> None:
        why = self._matcher.get_error()
        if "doesn't satisfy the grammar" in why:
            raise BackendError(f"{self._name}: a token that it does not allow was chosen: {shortened(why)}")
        # All else is a limit that was reached.
        if why:
            raise InvalidParameter(f"{self._name} is too complex: {shortened(why)}", data={"parameter": self._name})


def _words(tokenizer: Any, size: int, eos: list[int]) -> LLTokenizer:
    """The library's view of a tokenizer. Unsupported, which says what is missing, if there can be none."""
    data: dict[str, Any] = {"parameter": "guided"}
    if not eos:
        raise Unsupported("guided: the model names no token that ends an answer", data=data)
    try:
        from llguidance import hf

        return hf.from_tokenizer(tokenizer, n_vocab=max(size, len(tokenizer)), eos_token=eos)
    except ImportError as error:
        missing = missing_libraries(error)
        raise Unsupported(f"guided: {missing.message}", data={**data, **missing.data}) from error
    except Exception as error:
        raise Unsupported(f"guided: the model's tokenizer cannot be guided: {shortened(str(error))}", data=data) from error
