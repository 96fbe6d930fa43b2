"""What counts and spells tokens on the tests' side, without the backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

Turns = Sequence[dict[str, str]]


class Tokenizer(Protocol):
    """The model's own, asked directly."""

    def encode(self, text: str) -> list[int]:
        """A prompt's ids, with what the tokenizer puts before it."""
        ...

    def encode_chat(self, turns: Turns) -> list[int]:
        """A conversation's ids, up to where the answer begins."""
        ...

    def decode(self, prompt: object, ids: Sequence[int]) -> str:
        """The text of an answer to `prompt`, without the tokens that a reader does not want to see."""
        ...

    @property
    def end(self) -> str:
        """The text of the token that ends an answer, empty if there is none."""
        ...


class Words:
    """EchoWorker's: a word is a token. Prompts are numbers, so that they have ids; the ids of an answer count its words."""

    def encode(self, text: str) -> list[int]:
        return [int(word) if word.isdigit() else 0 for word in text.split()]

    def encode_chat(self, turns: Turns) -> list[int]:
        return [number for turn in turns for number in self.encode(turn["content"])]

    def decode(self, prompt: object, ids: Sequence[int]) -> str:
        words = str(prompt).split()
        return "".join(" " * (k > 0) + words[k % len(words)] for k in ids)

    @property
    def end(self) -> str:
        return ""


class ModelTokenizer:
    """transformers', loaded from the model's directory when it is first asked."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def __repr__(self) -> str:
        return f"ModelTokenizer({self.directory})"

    @cached_property
    def _loaded(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.directory)

    def encode(self, text: str) -> list[int]:
        return list(self._loaded.encode(text, verbose=False))

    def encode_chat(self, turns: Turns) -> list[int]:
        return list(self._loaded.apply_chat_template(list(turns), add_generation_prompt=True, tokenize=True, return_dict=False))

    def decode(self, prompt: object, ids: Sequence[int]) -> str:
        return str(self._loaded.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    @property
    def end(self) -> str:
        return str(self._loaded.eos_token)
