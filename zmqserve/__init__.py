"""Language models over ZeroMQ: a controller, workers and clients. Start with `Client`; README.md shows the rest."""

from __future__ import annotations

from importlib.metadata import version as _version_of
from typing import Any

from . import errors
from .aio import AsyncClient
from .async_stream import AsyncStream
from .bridge import Bridge
from .client import Client
from .config import ControllerConfig
from .controller import Controller
from .errors import (
    BackendError,
    BindFailed,
    ConnectionFailed,
    ContextOverflow,
    ControllerLost,
    ControllerUnreachable,
    DeadlineExceeded,
    GoingAway,
    InvalidParameter,
    MemoryExceeded,
    ModelLoading,
    NoWorker,
    Overloaded,
    PermissionDenied,
    ProtocolMismatch,
    QuotaExceeded,
    RateLimited,
    RequestError,
    SlowConsumer,
    StreamGap,
    Unauthenticated,
    UnknownModel,
    Unsupported,
    WorkerLost,
    ZmqserveError,
)
from .jobs import Delta, GenerateJob, Vectors
from .messages import ChatMessage, ModelCard
from .params import EmbedParams, Guided, SamplingParams
from .polled import Pending, PolledClient, PolledStream
from .results import Completion, CompletionChoice, MapResult, ServedModel, StreamChunk
from .stream import Stream
from .worker import BaseModelWorker, WorkerConfig

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "BackendError",
    "BaseModelWorker",
    "BindFailed",
    "Bridge",
    "ChatMessage",
    "Client",
    "Completion",
    "CompletionChoice",
    "ConnectionFailed",
    "ContextOverflow",
    "Controller",
    "ControllerConfig",
    "ControllerLost",
    "ControllerUnreachable",
    "DeadlineExceeded",
    "Delta",
    "EmbedParams",
    "GenerateJob",
    "GoingAway",
    "Guided",
    "InvalidParameter",
    "MapResult",
    "MemoryExceeded",
    "ModelCard",
    "ModelLoading",
    "NoWorker",
    "Overloaded",
    "Pending",
    "PermissionDenied",
    "PolledClient",
    "PolledStream",
    "ProtocolMismatch",
    "QuotaExceeded",
    "RateLimited",
    "RequestError",
    "SamplingParams",
    "ServedModel",
    "SlowConsumer",
    "Stream",
    "StreamChunk",
    "StreamGap",
    "Unauthenticated",
    "UnknownModel",
    "Unsupported",
    "Vectors",
    "WorkerConfig",
    "WorkerLost",
    "ZmqserveError",
    "errors",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version_of("zmqserve")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
