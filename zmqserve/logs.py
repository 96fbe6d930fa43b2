"""Logging: readable on a terminal, one JSON object per line otherwise.

zmqserve's own processes call `configure`. A program that embeds zmqserve configures structlog as it likes; in one that
configures nothing only warnings appear, on standard error.
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

import msgspec
import structlog

LEVELS = ("debug", "info", "warning", "error")


class Logger:
    """structlog's logger as it is configured when a line is written, or a quiet one where nobody configured it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"Logger({self._name!r})"

    def __getattr__(self, method: str) -> Any:
        return getattr(structlog.get_logger(self._name) if structlog.is_configured() else _quiet(), method)


@functools.cache
def _quiet() -> Any:
    return structlog.wrap_logger(
        structlog.PrintLogger(sys.stderr),
        processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper(), structlog.processors.LogfmtRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
    )


def configure(level: str = "info", as_json: bool | None = None) -> None:
    """Log to standard error. `as_json` None: JSON unless standard error is a terminal. `level` is one of LEVELS."""
    if as_json is None:
        as_json = not sys.stderr.isatty()
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if as_json else "%H:%M:%S", utc=as_json),
    ]
    if as_json:
        structlog.configure(
            processors=[*shared, structlog.processors.format_exc_info, structlog.processors.JSONRenderer(serializer=_json)],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
            logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
            cache_logger_on_first_use=True,
        )
    else:
        structlog.configure(
            processors=[*shared, structlog.dev.ConsoleRenderer(pad_event_to=18)],
            wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
            cache_logger_on_first_use=True,
        )


def _json(event: object, **_: object) -> bytes:
    return msgspec.json.encode(event, enc_hook=repr)
