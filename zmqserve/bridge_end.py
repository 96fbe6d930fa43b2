"""One end of a pipeline: the PULL or the PUSH socket of a bridge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import zmq

from .errors import InvalidEndpoint, InvalidParameter
from .params import invalid
from .sockets import Binding, SocketLimits, check_endpoint, pipeline


class PipelineEnd:
    """A socket that is bound, or connected, to all its endpoints. Raises BindFailed and InvalidEndpoint."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], kind: int, endpoints: Sequence[str], limits: SocketLimits, *, bind: bool
    ) -> None:
        self.socket = pipeline(context, kind, limits)
        self._bindings: list[Binding] = []
        try:
            for endpoint in endpoints:
                if bind:
                    self._bindings.append(Binding(self.socket, endpoint))
                else:
                    _connect(self.socket, endpoint)
        except BaseException:
            self.close(0)
            raise
        self.endpoints = [binding.endpoint for binding in self._bindings] or list(endpoints)

    def __repr__(self) -> str:
        return f"PipelineEnd({', '.join(self.endpoints)})"

    def retire(self) -> None:
        """Let no new peer in. Those that are there stay."""
        for binding in self._bindings:
            with suppress(zmq.ZMQError):
                self.socket.unbind(binding.endpoint)

    def close(self, linger_ms: int) -> None:
        """Close the socket; what was sent has `linger_ms` to leave, -1: however long it takes, for as long as the context lives."""
        for binding in self._bindings:
            with suppress(zmq.ZMQError):
                binding.unbind()
        self.socket.close(linger=linger_ms)
        for binding in self._bindings:
            binding.release()


def checked(what: str, endpoints: str | Sequence[str], *, bind: bool) -> list[str]:
    """The endpoints as a list, none empty and each one that a socket takes."""
    if not isinstance(endpoints, Sequence) or not all(isinstance(each, str) for each in endpoints):
        raise invalid(what, endpoints, "an endpoint like tcp://127.0.0.1:5557, or a list of them")
    listed = [endpoints] if isinstance(endpoints, str) else list(endpoints)
    if not listed:
        raise InvalidParameter(f"{what} needs at least one endpoint", data={"parameter": what})
    for endpoint in listed:
        check_endpoint(endpoint, bind=bind)
        if not bind and endpoint.startswith("tcp://*"):
            raise InvalidEndpoint(endpoint, f"* is for binding: bind_{what} (--bind-{what}), or name the host")
    return listed


def _connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    try:
        socket.connect(check_endpoint(endpoint, bind=False))
    except zmq.ZMQError as error:
        raise InvalidEndpoint(endpoint, error.strerror or str(error)) from None
