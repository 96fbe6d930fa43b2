"""A link that takes nothing for a while: what is sent into it waits, and nothing is lost."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

KERNEL_BYTES = 2**16
"""What the kernel may hold of what waits."""


class Gated:
    """Stands before `endpoint` for one connection. While it is shut nothing passes to there; the other way all does."""

    def __init__(self, endpoint: str) -> None:
        self._there = endpoint.removeprefix("tcp://").rsplit(":", 1)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open = threading.Event()
        self._open.set()
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.set()
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for each in self._sockets:
            each.close()

    def shut(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def _serve(self) -> None:
        with suppress(OSError):
            near, _ = self._listener.accept()
            far = socket.create_connection((self._there[0], int(self._there[1])))
            self._sockets += (near, far)
            back = threading.Thread(target=self._pass_on, args=(far, near, None))
            self._threads.append(back)
            back.start()
            self._pass_on(near, far, self._open)

    def _pass_on(self, source: socket.socket, target: socket.socket, gate: threading.Event | None) -> None:
        with suppress(OSError):
            while part := source.recv(KERNEL_BYTES):
                if gate is not None:
                    gate.wait()
                target.sendall(part)
            target.shutdown(socket.SHUT_WR)
