"""What the command `zmqserve` prints, and what it does when that cannot be printed."""

from __future__ import annotations

import argparse
import functools
import io
import os
import sys
from collections.abc import Callable, Sequence

from .errors import ZmqserveError
from .results import Completion


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
    """Print rows under a head, in columns as wide as they need to be."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
