"""What can go wrong, named by what the caller does about it.

::

    ZmqserveError
    ├── RequestError                 fix the request
    │   ├── MalformedMessage           40001  a message that is not the protocol
    │   ├── InvalidParameter           40302  also a ValueError; .parameter
    │   │   └── InvalidEndpoint          40305
    │   ├── UnknownModel               40301  .known_models
    │   ├── ContextOverflow            40303  .context_length .tokens
    │   ├── Unsupported                40304  the model's backend cannot do that
    │   ├── DuplicateRequest           40901  a rid that is already in flight
    │   ├── PermissionDenied           40104  the key may not do that
    │   └── Refused                    40103  a worker's registration was turned down for good
    ├── RetryLater                   the same request may work later; .retry_after_ms
    │   ├── Overloaded                 42903  queue full
    │   ├── RateLimited                42901  the key's requests a second, or in flight
    │   ├── QuotaExceeded              42902  the key's tokens a second
    │   ├── ModelLoading               50301
    │   ├── NoWorker                   50005
    │   ├── WorkerLost                 50007
    │   └── GoingAway                  50302  the controller is shutting down
    ├── DeadlineExceeded             give it more time; 40801
    ├── SlowConsumer                 read faster; 42904
    ├── BackendError                 the worker failed on this request; 50001
    │   ├── OutOfMemory                50002
    │   └── UpstreamError              50201  a remote API behind the worker
    ├── BindFailed                   choose another endpoint, or stop who has it; 50405
    ├── MemoryExceeded               give the controller more memory, or lower its limits; 50406
    └── ConnectionFailed             the way to the controller
        ├── ControllerUnreachable    50401  .endpoints
        ├── ControllerLost           50402  it answered before and is silent now
        ├── ProtocolMismatch         40003  .retryable is False
        ├── Unauthenticated          40102  .retryable is False: no controller lets this key in
        └── StreamGap                50403  a chunk is missing: seq jumped

Codes keep FastChat's numbers (``fastchat.constants.ErrorCode``) where it has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from errno import EACCES, EADDRNOTAVAIL, EEXIST, ENODEV, ENOENT, ENOTDIR
from typing import ClassVar

Data = Mapping[str, str | int | float | list[str]]


class ZmqserveError(Exception):
    """Any error of zmqserve. `code` is its number on the wire, `retryable` whether the same request may work later."""

    code: ClassVar[int] = 50000
    retryable: bool = False

    def __init__(self, message: str, *, retry_after_ms: int | None = None, data: Data | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_ms = retry_after_ms
        self.data: Data = dict(data or {})


class RequestError(ZmqserveError):
    """The request itself is wrong; sending it again will not help."""

    code = 40000


class MalformedMessage(RequestError):
    """Bytes that are not a message of this protocol, or not one allowed here."""

    code = 40001


class InvalidParameter(RequestError, ValueError):
    """A parameter has the wrong type or is out of range."""

    code = 40302

    @property
    def parameter(self) -> str:
        """Its name."""
        return str(self.data.get("parameter", ""))


class InvalidEndpoint(InvalidParameter):
    """Not an endpoint that can be used."""

    code = 40305

    def __init__(self, endpoint: str, why: str) -> None:
        super().__init__(f"{endpoint!r} is not a usable endpoint: {why}", data={"parameter": "endpoint", "endpoint": endpoint})


class UnknownModel(RequestError):
    """No worker serves a model of that name."""

    code = 40301

    @property
    def known_models(self) -> list[str]:
        """Names that are served."""
        names = self.data.get("known_models", [])
        return names if isinstance(names, list) else []


class ContextOverflow(RequestError):
    """Prompt and completion together do not fit the model's context; nothing is ever cut silently."""

    code = 40303

    @property
    def context_length(self) -> int:
        """The model's context, in tokens."""
        return _int(self.data, "context_length")

    @property
    def tokens(self) -> int:
        """What the request needs, in tokens."""
        return _int(self.data, "tokens")


class Unsupported(RequestError):
    """The model's backend cannot honour this verb or parameter."""

    code = 40304


class DuplicateRequest(RequestError):
    """The client already has a request with this rid in flight."""

    code = 40901


class PermissionDenied(RequestError):
    """The key may not do that. Whether what was asked for exists is not told."""

    code = 40104


class Refused(RequestError):
    """A controller turned a worker's registration down for good."""

    code = 40103


class RetryLater(ZmqserveError):
    """The same request may succeed later; `retry_after_ms` says when, if known."""

    code = 42900
    retryable = True


class Overloaded(RetryLater):
    """The queue is full."""

    code = 42903


class RateLimited(RetryLater):
    """The key has sent too many requests in this time, or has too many in flight."""

    code = 42901


class QuotaExceeded(RetryLater):
    """The key has used up its tokens for now."""

    code = 42902


class ModelLoading(RetryLater):
    """Its workers are still loading the model."""

    code = 50301


class NoWorker(RetryLater):
    """The model's workers left while the request waited."""

    code = 50005


class WorkerLost(RetryLater):
    """The worker died or was given up while it answered."""

    code = 50007


class GoingAway(RetryLater):
    """The controller is shutting down."""

    code = 50302


class DeadlineExceeded(ZmqserveError):
    """The request's deadline passed, in the queue or while it ran."""

    code = 40801


class SlowConsumer(ZmqserveError):
    """The client did not read its messages and its outbox reached the limit."""

    code = 42904


class BackendError(ZmqserveError):
    """The worker failed on this request; others are not affected."""

    code = 50001


class OutOfMemory(BackendError):
    """The device had no memory for this request."""

    code = 50002


class UpstreamError(BackendError):
    """A remote API behind the worker failed."""

    code = 50201


_NOT_OURS = "give an address of this machine, or * for all that it has"
_BIND_HINTS = {
    EACCES: "choose a port from 1024, or a path that this user may write",
    EADDRNOTAVAIL: _NOT_OURS,
    EEXIST: "choose another path",
    ENODEV: _NOT_OURS,
    ENOENT: "choose another path",
    ENOTDIR: "choose another path",
}


class BindFailed(ZmqserveError):
    """An endpoint could not be bound, most often because another process has it."""

    code = 50405

    def __init__(self, endpoint: str, why: str, errno: int | None) -> None:
        hint = _BIND_HINTS.get(errno or 0, "stop that process or choose another endpoint")
        super().__init__(f"cannot bind {endpoint}: {why}; {hint}", data={"endpoint": endpoint, "errno": errno or 0})


class MemoryExceeded(ZmqserveError):
    """A controller ended itself because its process held more memory than it may."""

    code = 50406


class ConnectionFailed(ZmqserveError):
    """The way to a controller failed."""

    code = 50400
    retryable = True


class ControllerUnreachable(ConnectionFailed):
    """No controller answered at any of the endpoints."""

    code = 50401

    @property
    def endpoints(self) -> list[str]:
        """Where it was looked for."""
        tried = self.data.get("endpoints", [])
        return tried if isinstance(tried, list) else []


class ControllerLost(ConnectionFailed):
    """The controller answered before and is silent now."""

    code = 50402


class ProtocolMismatch(ConnectionFailed):
    """The two ends speak different versions of the protocol."""

    code = 40003
    retryable = False


class Unauthenticated(ConnectionFailed):
    """The controller lets nobody in with this key, or with none; or it could not prove to be the one whose key was given."""

    code = 40102
    retryable = False


class StreamGap(ConnectionFailed):
    """A chunk is missing. Never seen in a healthy network: it means a lost or doubled message."""

    code = 50403


def _int(data: Data, key: str) -> int:
    value = data.get(key, 0)
    return value if isinstance(value, int) else 0


def _tree(cls: type[ZmqserveError]) -> list[type[ZmqserveError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


BY_CODE: Mapping[int, type[ZmqserveError]] = {cls.code: cls for cls in reversed(_tree(ZmqserveError))}
"""Every class by its number on the wire."""


def from_wire(code: int, message: str, retryable: bool, retry_after_ms: int | None, data: Data) -> ZmqserveError:
    """The typed exception for an Error message. A code that is not known becomes the base class and is named."""
    cls = BY_CODE.get(code)
    kind = cls or ZmqserveError
    error = kind.__new__(kind)
    # Some classes compose their own message; the sender has already done so.
    ZmqserveError.__init__(error, message if cls else f"{message} (error {code})", retry_after_ms=retry_after_ms, data=data)
    error.retryable = retryable
    return error
