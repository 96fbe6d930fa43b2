"""What the command `zmqserve` prints, and what it does when that cannot be printed."""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from .errors import ZmqserveError
from .results import Completion

_CONTROLS = {code: f"\\u{code:04x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_BUT_LAYOUT = {code: sign for code, sign in _CONTROLS.items() if chr(code) not in "\n\t"}


def escaped(text: str, *, one_line: bool = False) -> str:
    """Text that moves no terminal's cursor and does nothing worse to it: control characters as JSON writes them. Ends of lines and tabs
    stay what they are, unless it is to be `one_line`."""
    return text.translate(_CONTROLS if one_line else _BUT_LAYOUT)


def say(text: str, *, file: TextIO | None = None, end: str = "\n", flush: bool = False) -> None:
    """Print what others may have chosen, to standard output or `file`: escaped on a terminal, else as it is."""
    file = sys.stdout if file is None else file
    print(escaped(text) if _is_terminal(file) else text, end=end, file=file, flush=flush)


def figures(completion: Completion) -> str:
    """One line about an answer: when it began, how fast it came, who gave it."""
    timings, usage = completion.timings, completion.usage
    spent_s = max(timings.total_ms - timings.first_ms, 1e-3) / 1000
    rate = (usage.completion_tokens - 1) / spent_s if usage.completion_tokens > 1 else 0.0
    return (
        f"first token {timings.queue_ms + timings.first_ms:.1f} ms | {usage.completion_tokens} tokens at {rate:.1f} tokens/s | "
        f"prompt {usage.prompt_tokens} tokens | worker {timings.worker}"
    )


def printing(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, told in one sentence when what it prints cannot be written. What the terminal has no sign for becomes ``?``."""

    @functools.wraps(run)
    def printed(args: argparse.Namespace) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        try:
            code = run(args)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is still buffered would fail once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise ZmqserveError(f"the output cannot be written: {error.strerror or error}") from None
        return code

    return printed


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a head, in columns as wide as they need to be. On a terminal nothing in them can look like another row."""
    if _is_terminal(sys.stdout):
        rows = [[escaped(cell, one_line=True) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _is_terminal(file: TextIO | None) -> bool:
    return file is not None and file.isatty()
