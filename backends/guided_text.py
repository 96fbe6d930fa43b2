"""What a request's `guided` asks for, as the text of a grammar that llguidance reads."""

from __future__ import annotations

import json
import re

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

_FREE = '%llguidance {"no_forcing": true}\n'
"""Where only one text can come next, the model may still choose among the tokens that spell it."""
_LITERALS = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|#[^\n]*')
_COMBINED = re.compile(r"[&~]")
_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_WITH_BACKSLASH = {"\n": "\\n", "\r": "\\r", "\t": "\\t", **{each: f"\\{each}" for each in '"\\[]'}}


def form_of(kind: str, text: str) -> str:
    """In Lark. `kind` is a field of Guided, `text` its value, a list of choices as JSON. Raises what is raised where it is none.

    Regular expressions match the whole answer, as Rust's regex crate reads them, with the ASCII meaning of \\d, \\w and \\s. Grammars
    are llama.cpp's GBNF, which begins with ``root ::=``, or Lark, which begins with ``start:``.
    """
    if kind == "json":
        return f"{_FREE}start: %json {json.dumps(json.loads(text))}"
    if kind == "regex":
        return f"{_FREE}start: /{regex_to_lark(text, 'dws')}/"
    if kind == "choice":
        # A terminal: as alternatives of a rule there could be no more than the parser has room for in one place.
        return f"{_FREE}start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice) for choice in json.loads(text))
    if "::=" not in text and _COMBINED.search(_LITERALS.sub("", text)):
        raise ValueError("terminals cannot be combined with & or ~: what that takes has no bound")
    lark = any_to_lark(_ESCAPES.sub(_plain, text) if "::=" in text else text).removeprefix("%llguidance {}")
    return lark if "%llguidance" in lark else _FREE + lark


def _plain(escape: re.Match[str]) -> str:
    """The same character as the library's converter takes it: that loses zeros of a number, and refuses ``\\-``."""
    digits = escape[1] or escape[2]
    if digits is None and escape[3].isalnum():
        return escape[0]
    code = ord(escape[3]) if digits is None else int(digits, 16)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        return escape[0]
    # A hyphen and a caret mean something of their own between brackets.
    return _WITH_BACKSLASH.get(chr(code)) or (f"\\x{code:02x}" if code < 0x20 or chr(code) in "-^\x7f" else chr(code))
