"""Texts that are too long for a model whatever their tokens are: known before they become tokens, which takes seconds a megabyte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, inf
from typing import Any

from zmqserve.errors import ContextOverflow

_FOLDS = {"NFC": 4, "NFKC": 4, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1}
"""How many characters normalizers make one of, at most: no character has a canonical decomposition into more than four."""
_KEEPING = frozenset({"ByteLevel", "Digits", "Metaspace", "Punctuation", "Split", "UnicodeScripts", "FixedLength"})
"""Pre-tokenizers that lose no character, unless they are told to remove what they split at."""


_CONTROLS = frozenset(map(chr, (*range(0x20), 0x7F)))
"""Characters that no normalizer makes of others."""


@dataclass(frozen=True)
class TextBound:
    """Of a model that takes `context_length` tokens (0: no bound) of at most `longest` characters each. `lost` have no token at all."""

    context_length: int = 0
    longest: float = inf
    lost: str = ""

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at least; 0 for one that may fit, which most are known to at once."""
        if not self.context_length or len(text) <= self.context_length * self.longest:
            return 0
        kept = len(text) - sum(map(text.count, self.lost))
        return ceil(kept / self.longest) if kept > self.context_length * self.longest else 0

    def check(self, text: str, what: str, **data: int) -> None:
        """ContextOverflow for a text that cannot fit: `what` it is, and more for the error's `data`."""
        least = self.least_tokens(text)
        if least:
            why = f"{what} of {len(text)} characters has at least {least} tokens, over the model's context of {self.context_length} tokens"
            raise ContextOverflow(why, data={"context_length": self.context_length, "tokens": least, **data})


def text_bound(tokenizer: Any, context_length: int) -> TextBound:
    """What can be told of texts by their length alone.

    Nothing where a tokenizer drops characters that it knows (white space, accents), or makes one unknown token of many. A token's own
    text, of bytes or of characters, is never shorter than what it stands for.
    """
    library = getattr(tokenizer, "backend_tokenizer", None)
    if library is None:
        return TextBound(context_length)
    parts = json.loads(library.to_str())
    model, added = parts["model"], parts.get("added_tokens") or []
    steps = _steps(parts.get("pre_tokenizer"), "pretokenizers")
    lost = _lost(model, byte_level=any(step["type"] == "ByteLevel" for step in steps)) if model.get("type") == "BPE" else None
    if (
        lost is None
        or any(token.get("lstrip") or token.get("rstrip") for token in added)
        or not all(step["type"] in _KEEPING and step.get("behavior") != "Removed" for step in steps)
    ):
        return TextBound(context_length)
    longest = float(max(map(len, (*model["vocab"], *(token["content"] for token in added)))))
    for step in _steps(parts.get("normalizer"), "normalizers"):
        longest *= _fold(step, lost)
    return TextBound(context_length, longest, lost)


def _steps(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, which may have others in it."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [inner for each in step[name] for inner in _steps(each, name)]


def _fold(step: Mapping[str, Any], lost: str) -> float:
    if step["type"] == "Replace":
        pattern, content = step["pattern"].get("String"), step["content"]
        return 1 if pattern and len(content) >= len(pattern) and not set(content) & set(lost) else inf
    return _FOLDS.get(step["type"], inf)


def _lost(model: Mapping[str, Any], *, byte_level: bool) -> str | None:
    """The characters that a vocabulary cannot tell, if these are controls alone, which some do without; else None."""
    vocabulary = model["vocab"]
    if not byte_level:
        return "" if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)) else None
    signs = _signs()
    # Of a character of several bytes all but the first are among these.
    if model.get("unk_token") is not None or not all(signs[byte] in vocabulary for byte in range(0x80, 0xC0)):
        return None
    lost = [chr(byte) for byte in range(0x80) if signs[byte] not in vocabulary]
    return "".join(lost) if _CONTROLS.issuperset(lost) else None


def _signs() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies: printable bytes their own, others the next free ones."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    free = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(free)) for byte in range(256)]
