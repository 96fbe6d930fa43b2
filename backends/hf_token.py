"""Tokens of hosted APIs: read from where the registry says, and shown nowhere."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import NoReturn

from zmqserve.errors import InvalidParameter

from .hf_registry import HostedModel

HIDDEN = "[hidden]"
"""What stands for a token in anything that people read."""

_LEAST_HIDDEN = 4
"""A shorter token is not looked for in texts: it would match words."""


class Token:
    """A secret and where it came from. `value` is None where none is used."""

    __slots__ = ("source", "value")

    def __init__(self, value: str | None, source: str) -> None:
        self.value = value
        self.source = source

    def __repr__(self) -> str:
        return f"Token(from {self.source})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a token is not pickled")

    def hide(self, text: str) -> str:
        """The text without the secret: an upstream may repeat it in its errors."""
        if self.value is None or len(self.value) < _LEAST_HIDDEN:
            return text
        return text.replace(self.value, HIDDEN)


def token_of(model: HostedModel, where: str) -> Token:
    """The model's token. InvalidParameter, which names the source and never the token, if there is none to be had."""
    if model.token_env is not None:
        source = f"environment variable {model.token_env}"
        value = os.environ.get(model.token_env, "").strip()
        if not value:
            _refuse(where, "token_env", f"{source} is not set: set it, or name another")
    elif model.token_file is not None:
        source = f"file {model.token_file}"
        value = _from_file(Path(model.token_file).expanduser(), where)
    elif model.base_url is not None:
        return Token(None, "nowhere")
    else:
        from huggingface_hub import get_token

        source = "the saved login (HF_TOKEN or `hf auth login`)"
        value = get_token() or ""
        if not value:
            _refuse(where, "token_env", "an Inference Provider needs a token: set token_env or token_file, or run `hf auth login`")
    if not (value.isascii() and value.isprintable()) or " " in value:
        _refuse(
            where, "token_env" if model.token_env else "token_file", f"what {source} holds is no token: it has spaces or odd characters"
        )
    return Token(value, source)


def _from_file(path: Path, where: str) -> str:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & stat.S_IRWXO:
            _refuse(where, "token_file", f"{path} is open to every user of this machine (mode {mode:o}): chmod 600 it")
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        # Not the error's own text: of a UnicodeDecodeError it shows bytes of the file.
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        _refuse(where, "token_file", f"{path} cannot be read: {why}")
    if not value:
        _refuse(where, "token_file", f"{path} is empty: it must hold the token and nothing else")
    return value


def _refuse(where: str, key: str, why: str) -> NoReturn:
    # Without the cause, whose frames hold what was read.
    raise InvalidParameter(f"{where}: {key}: {why}", data={"parameter": key}) from None
