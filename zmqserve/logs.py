"""Logging: readable on a terminal, one JSON object per line otherwise.

zmqserve's own processes call `configure`. A program that embeds zmqserve configures structlog as it likes; in one that
configures nothing only warnings appear, on standard error.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import logging
import select
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any, BinaryIO, TextIO, cast

import msgspec
import structlog

from .terminal import escaped

MOST_LINES, MOST_BYTES = 10_000, 16 * 2**20
CLOSE_S = 1.0
GATHER_S = 0.02
"""Lines of so long are written together: a thread that wakes for each takes the interpreter from who serves requests."""
LEVELS = ("debug", "info", "warning", "error")


class Logger:
    """structlog's logger as it is configured when a line is written, or a quiet one where nobody configured it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._config: dict[str, Any] = {}
        self._bound: Any = None

    def __repr__(self) -> str:
        return f"Logger({self._name!r})"

    def __getattr__(self, method: str) -> Any:
        return getattr(self._logger(), method)

    def writes(self, level: int) -> bool:
        """Whether a line of this level (of `logging`) is written at all: who makes one often asks first, before making it."""
        asked = getattr(self._logger(), "is_enabled_for", None)  # another's wrapper class may have its own ways
        return asked is None or bool(asked(level))

    def _logger(self) -> Any:
        if not structlog.is_configured():
            return _quiet()
        config = structlog.get_config()
        if self._bound is None or config != self._config:
            self._config = config
            self._bound = structlog.get_logger(self._name).bind()
        # structlog assembles a logger for each line otherwise, which costs more than the line.
        return self._bound if config["cache_logger_on_first_use"] else structlog.get_logger(self._name)


@functools.cache
def _quiet() -> Any:
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(),
            _printable,
            structlog.processors.ExceptionRenderer(_traceback),
            structlog.processors.LogfmtRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    ).bind()


class Lines:
    """A file for loggers whose writes never block and never fail: a thread passes them on to `file`.

    A reader that pauses (a pager, a full pipe) must not stop a controller, nor one that is gone end it. Up to MOST_LINES and
    MOST_BYTES wait; what comes beyond that is dropped, and said when there is room again.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: deque[bytes] = deque()
        self._bytes = 0
        self._dropped = 0
        self._some = threading.Event()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._pass_on, name="zmqserve-log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def __repr__(self) -> str:
        return f"Lines({len(self._lines)} waiting, {self._dropped} dropped)"

    def write(self, text: str | bytes) -> int:
        """Keep it for the thread."""
        line = text.encode(errors="replace") if isinstance(text, str) else text
        if len(self._lines) < MOST_LINES and self._bytes < MOST_BYTES:
            self._lines.append(line)
            self._bytes += len(line)  # another thread's may be missed; it begins anew each time that they are passed on
        else:
            self._dropped += 1
        if not self._some.is_set():
            self._some.set()
        return len(text)

    def flush(self) -> None:
        """The thread does that."""

    def close(self) -> None:
        """Give what waits a moment to leave."""
        self._ending.set()
        self._some.set()
        self._thread.join(CLOSE_S)

    def _pass_on(self) -> None:
        while not self._ending.is_set() or self._lines:
            self._some.wait()
            self._ending.wait(GATHER_S)
            self._some.clear()
            if self._dropped and len(self._lines) < MOST_LINES:
                dropped, self._dropped = self._dropped, 0
                self._lines.append(f"zmqserve: {dropped} log lines were dropped: they are not read as fast as they come\n".encode())
            parts = [self._lines.popleft() for _ in range(len(self._lines))]
            self._bytes = 0
            with contextlib.suppress(OSError, ValueError):
                for batch in _batches(parts):
                    self._file.write(batch)
                    self._file.flush()


def _batches(lines: list[bytes]) -> Iterator[bytes]:
    """Whole lines, as many at a time as a pipe takes in one piece: who is killed leaves no half of one."""
    batch: list[bytes] = []
    size = 0
    for line in lines:
        if batch and size + len(line) > select.PIPE_BUF:
            yield b"".join(batch)
            batch, size = [], 0
        batch.append(line)
        size += len(line)
    if batch:
        yield b"".join(batch)


_configured: list[Lines] = []


def finish() -> None:
    """Give lines that wait a moment to leave, and take no more: for who has a last word, or ends the process past Python's own exit."""
    for lines in _configured:
        lines.close()


def configure(level: str = "info", as_json: bool | None = None) -> None:
    """Log to standard error. `as_json` None: JSON unless standard error is a terminal. `level` is one of LEVELS."""
    if as_json is None:
        as_json = not sys.stderr.isatty()
    lines = Lines(sys.stderr.buffer)
    _configured.append(lines)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
    ]
    if as_json:
        json = _json_on_a_terminal if sys.stderr.isatty() else _json
        structlog.configure(
            processors=[*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=json)],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
            logger_factory=structlog.BytesLoggerFactory(cast("BinaryIO", lines)),
            cache_logger_on_first_use=True,
        )
    else:
        structlog.configure(
            processors=[*shared, _printable, structlog.dev.ConsoleRenderer(pad_event_to=18, exception_formatter=_add_traceback)],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
            logger_factory=structlog.PrintLoggerFactory(cast("TextIO", lines)),
            cache_logger_on_first_use=True,
        )


def _printable(_logger: object, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """What peers choose must not move a terminal's cursor: a text with such characters is shown as Python would write it."""
    return {name: repr(value) if isinstance(value, str) and not value.isprintable() else value for name, value in line.items()}


def _traceback(exc_info: structlog.typing.ExcInfo) -> str:
    """Of an exception, whose own text peers may have chosen, and without the values of locals: prompts are among them."""
    file = io.StringIO()
    structlog.dev.plain_traceback(file, exc_info)
    return escaped(file.getvalue().strip("\n"))


def _add_traceback(file: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    # structlog's own choice is rich's where that is installed, which shows locals.
    file.write("\n" + _traceback(exc_info))


def _json(event: object, **_: object) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)


def _json_on_a_terminal(event: object, **_: object) -> bytes:
    return escaped(_json(event).decode()).encode()
