"""The engine side of a worker: an event loop in its own thread, where backends run. Sockets and heartbeats are elsewhere."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .desk import Desk
from .lane import Outbound
from .logs import Logger

if TYPE_CHECKING:
    from .worker import BaseModelWorker

log = Logger("zmqserve.worker")
STOP_WAIT_S = 2.0
"""How long what is cancelled at the end may take to clean up."""


class Engine(threading.Thread):
    """Runs a desk. What it is asked to do comes through `call`, from the socket thread.

    `on_crash` gets what broke the loop itself; `on_end` is called last, on the thread.
    """

    def __init__(
        self, worker: BaseModelWorker, out: Outbound, on_crash: Callable[[BaseException], None], on_end: Callable[[], None]
    ) -> None:
        super().__init__(name=f"{worker.name} engine", daemon=True)
        self._worker = worker
        self._on_crash = on_crash
        self._on_end = on_end
        self._loop = loop = asyncio.new_event_loop()
        # An event loop's clock is time.monotonic.
        self.desk = Desk(worker, out, now=time.monotonic, call_soon=loop.call_soon, call_at=loop.call_at, spawn=loop.create_task)
        self._stopping = asyncio.Event()

    def call(self, calls: list[tuple[Any, ...]]) -> None:
        """Run each ``(function, *arguments)``, in order, on the loop. From any thread; harmless when the loop has ended."""
        try:
            self._loop.call_soon_threadsafe(self._run_calls, calls)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def _run_calls(self, calls: list[tuple[Any, ...]]) -> None:
        for function, *arguments in calls:
            function(*arguments)

    def run(self) -> None:
        """The thread."""
        try:
            with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
                runner.run(self._main())
        except BaseException as error:
            log.exception("engine crashed", worker=self._worker.name)
            self._on_crash(error)
        finally:
            self._on_end()

    async def _main(self) -> None:
        await self._stopping.wait()
        tasks = [task for task in self.desk.end() if isinstance(task, asyncio.Task)]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_WAIT_S)

    def halt(self) -> None:
        """End the loop and what still runs in it. From any thread."""
        self.call([(self._stopping.set,)])
