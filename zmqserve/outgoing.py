"""What a client's session has to send and the wire has not taken yet. Pure: a Wire is written to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from .call import Call, ClientRequest
from .errors import InvalidParameter
from .messages import Cancel, encode
from .peer import Wire


class Outgoing:
    """Requests in order, and Cancels, which go before them: to stop work is more urgent than to ask for some."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._calls: deque[Call] = deque()
        self._cancels: deque[bytes] = deque()

    def __repr__(self) -> str:
        return f"Outgoing({len(self._calls)} requests, {len(self._cancels)} cancels)"

    def __bool__(self) -> bool:
        return bool(self._calls or self._cancels)

    def __len__(self) -> int:
        """How many requests wait."""
        return len(self._calls)

    def __iter__(self) -> Iterator[Call]:
        """The requests that wait and are still wanted."""
        return (call for call in self._calls if call.end is None)

    def add(self, call: Call) -> None:
        """Send it after those that wait."""
        self._calls.append(call)

    def renew(self, calls: Iterable[Call]) -> None:
        """The controller was lost: these wait for the next one. Answers that have begun go first, since somebody is reading them."""
        self._cancels.clear()
        self._calls = deque(sorted(calls, key=lambda call: call.next_seq == 0))

    def cancel(self, rid: int) -> None:
        """Tell the controller that nobody wants this any more."""
        self._cancels.append(encode(Cancel(rid)))
        self._flush_cancels()

    def clear(self) -> None:
        """Nothing is to be sent any more."""
        self._calls.clear()
        self._cancels.clear()

    def flush(self) -> None:
        """Send as far as the wire takes it. A request is `there` then."""
        if not self._flush_cancels():
            return
        calls = self._calls
        while calls:
            call = calls[0]
            if call.end is None:
                if not self._wire.send(call.payload):
                    return
                call.left()
            calls.popleft()

    def _flush_cancels(self) -> bool:
        cancels = self._cancels
        while cancels:
            if not self._wire.send(cancels[0]):
                return False
            cancels.popleft()
        return True


def encoded(request: ClientRequest) -> bytes:
    """A request's bytes; InvalidParameter for what has none."""
    try:
        return encode(request)
    except UnicodeEncodeError as error:
        what = f"a text holds {error.object[error.start : error.end]!r}, which is no character (a lone surrogate)"
        raise InvalidParameter(what, data={"parameter": "prompt"}) from None
    except TypeError as error:
        # Of a type derived from one that was checked; elsewhere requests.exact has made it plain.
        raise InvalidParameter(f"a value in params cannot be sent: {error}", data={"parameter": "params"}) from None
