"""The controller: two ROUTER sockets, a broker, and the loop that drives it. A process of its own or a thread of yours."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from math import ceil
from pathlib import Path
from random import Random
from socket import gethostname
from types import TracebackType
from typing import Any, Self

import msgspec
import zmq

from .broker import Broker
from .config import ControllerConfig, load_config
from .curve import OPEN_DOOR, exposed
from .errors import MemoryExceeded
from .gate import Gate
from .logs import Logger
from .memory import MemoryWatch, default_limit_bytes, memory_exceeded
from .parents import Parents
from .port import Port
from .relay import Relay, key_of, user_of
from .release import installed_version
from .sockets import Binding, Monitor, SocketLimits, plain, raise_descriptor_limit, router

log = Logger("zmqserve.controller")

DRAIN = 256
"""Messages read from one socket before the other gets its turn. One a poll would be 2.6 times slower than 64."""
FEW_DESCRIPTORS = 1024
LAST_WORDS = 1024
"""Messages read of workers when a connection has broken, before it is asked whose it was."""
MONITORED = 64
"""Events of a socket's monitor read in one turn: connections that never spoke end by the thousand, and streams must not wait for that."""
MOST_POLL_S = 0.25
"""The longest sleep, less with a short ttl: the broker takes a longer gap than half a ttl for a pause of the process."""
FAREWELL_S = 0.1
"""Peers drop what they have not read when a connection ends, so it outlives the last messages (GoAway, errors) by so much."""
LINGER_MS = 200
"""What messages that still wait in libzmq get to leave after that."""


class Controller:
    """Broker of a network. `start()` and `stop()` run it in a thread, `run()` in the calling one until `stop()`.

    `config` says all; keywords change single settings of it. `context`: yours, for inproc endpoints; else its own. When you end it, the
    controller ends. Raises InvalidParameter, and BindFailed or InvalidEndpoint from `start`, `run` or `bind`. When the process holds more
    memory than the controller may let it (`memory_bytes`), it ends; `run` raises MemoryExceeded then, or `stop` after `start`.
    """

    def __init__(
        self,
        config: ControllerConfig | None = None,
        *,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        report: Callable[..., None] | None = None,
        **settings: Any,
    ) -> None:
        self.config = load_config(None, **((msgspec.structs.asdict(config) if config is not None else {}) | settings))
        self.id = ""  # of one start: `bind` draws it
        self.client_endpoints: list[str] = []
        self.worker_endpoints: list[str] = []
        self._own_context = context is None
        self._context = None if context is None else plain(context)
        self._reporter = report or _log
        self._bindings: list[Binding] = []
        self._relay: Relay | None = None
        self._parents: Parents | None = None
        self._gate: Gate | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stopping = self._running = False
        self._wake_r, self._wake_w = -1, -1
        self._wake_lock = threading.RLock()  # a signal handler may call `stop` in the thread that has it

    def _report(self, event: str, **fields: object) -> None:
        """Log a line. A log that cannot be written (a full disk, a closed pipe) must not end the controller."""
        try:
            self._reporter(event, **fields)
        except Exception:  # noqa: BLE001 - whatever a caller's function raises
            if self._relay is not None:
                self._relay.broker.counters["log lines lost"] += 1

    def __repr__(self) -> str:
        return f"Controller({self.id!r}, clients={self.client_endpoints}, workers={self.worker_endpoints})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def bind(self) -> None:
        """Bind all endpoints; `client_endpoints` and `worker_endpoints` then hold the real ones. Harmless when bound."""
        self._relay = self._relay or self._bound()

    def _bound(self) -> Relay:
        descriptors = raise_descriptor_limit()
        if descriptors < FEW_DESCRIPTORS:
            why = "each peer takes one, and beyond the limit nobody new is heard: raise the hard limit (ulimit -Hn)"
            self._report("few file descriptors", level="warning", limit=descriptors, why=why)
        self.id = secrets.token_hex(8)
        config = self.config
        self._context = self._context or zmq.Context()
        limits = SocketLimits(config.message_bytes, config.pipe_messages)
        self._wake_r, self._wake_w = os.pipe()
        os.set_blocking(self._wake_w, False)
        sockets: list[zmq.Socket[bytes]] = []
        try:
            self._check_exposure()
            sockets += (router(self._context, limits), router(self._context, limits))
            if config.curve_dir is not None:
                self._gate = Gate(Path(config.curve_dir), self._context, self._report, handshakes_per_s=config.handshakes_per_s)
                self._gate.guard(*sockets)
            for socket, endpoints, bound in zip(
                sockets, (config.clients, config.workers), (self.client_endpoints, self.worker_endpoints), strict=True
            ):
                for endpoint in endpoints:
                    self._bindings.append(Binding(socket, endpoint))
                    bound.append(self._bindings[-1].endpoint)
            return self._relay_of(sockets)
        except Exception:
            self._close(sockets)
            raise

    def _check_exposure(self) -> None:
        """What other machines may reach is guarded by keys, or knowingly not."""
        if self.config.curve_dir is None:
            remedy = "give --curve-dir (`zmqserve keys init DIR` makes one), or --insecure in a network that you trust"
            found = exposed([*self.config.clients, *self.config.workers], insecure=self.config.insecure, remedy=remedy)
            if found:
                self._report("insecure", level="warning", endpoints=found, why=OPEN_DOOR)

    def _relay_of(self, sockets: list[zmq.Socket[bytes]]) -> Relay:
        config = self.config
        clients = Port(sockets[0], config.outbox_bytes, total_bytes=config.outbox_total_bytes)
        workers = Port(sockets[1], config.outbox_bytes, total_bytes=config.outbox_total_bytes)
        broker = Broker(
            config,
            controller_id=self.id,
            version=installed_version(),
            send_client=lambda envelope, payload: clients.post(*envelope, payload),
            send_worker=workers.send,
            post_worker=workers.post,
            report=self._report,
            random=Random(config.seed),
            new_epoch=lambda: secrets.randbits(63) | 1,
            now=time.monotonic(),
            access=None if self._gate is None else self._gate.access,
        )
        if self._gate is not None:
            self._gate.attach(broker)
        if self._reporter is _log:
            broker.flights.reports_requests = lambda: log.writes(logging.INFO)
        broker.endpoints = (self.client_endpoints, self.worker_endpoints)
        broker.outbox_bytes = lambda: clients.waiting_bytes + workers.waiting_bytes
        broker.outbox_drops = lambda: clients.dropped + workers.dropped
        if config.parents and self._context is not None:
            name = config.name or f"controller-{gethostname()[:64]}-{self.id[:6]}"
            self._parents = Parents(broker, self._context, name, self._report, Random(), time.monotonic())
        ends = {"clients": self.client_endpoints, "workers": self.worker_endpoints}
        self._report("controller up", controller=self.id, **ends, dispatch=config.dispatch)
        within = any(endpoint.startswith("inproc://") for endpoint in (*config.clients, *config.workers))
        return Relay(broker, clients, workers, None if self._gate is None else user_of if within else key_of)

    def reload(self) -> None:
        """Look at the folder of keys at once, not within the second; from any thread or a signal handler."""
        if self._gate is not None:
            self._gate.look_soon()
            self._wake()

    def _wake(self) -> None:
        with self._wake_lock:
            if self._wake_w >= 0:
                with contextlib.suppress(BlockingIOError):
                    os.write(self._wake_w, b"x")

    def start(self) -> None:
        """Bind, and run in a thread of its own."""
        if self._thread is not None:
            raise RuntimeError("the controller runs already")
        self.bind()
        self._stopping = False
        self._failure = None
        self._thread = threading.Thread(target=self._run_in_thread, name="zmqserve-controller", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread of `start` serves. It ends by itself only when the context does, when memory is exceeded, or by a bug."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """Stop from any thread or a signal handler: clients are told, sockets closed.

        Waits for the thread of `start`, and raises what broke it, if something did.
        """
        self._stopping = True
        self._wake()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        relay = self._relay
        if relay is not None and not self._running:  # bound, and never run
            self._relay = None
            self._close([relay.clients.socket, relay.workers.socket])
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def run(self) -> None:
        """Serve in this thread until `stop`. Raises MemoryExceeded."""
        self._running = True
        exceeded: MemoryExceeded | None = None
        try:
            relay = self._relay = self._relay or self._bound()
            try:
                exceeded = self._loop(relay)
                if relay.broker.shut_down(time.monotonic()):
                    self._farewell(relay)
            except zmq.ContextTerminated:
                self._report("context terminated", controller=self.id)
            finally:
                self._report("controller down", controller=self.id)
                self._relay = None
                self._close([relay.clients.socket, relay.workers.socket])
        finally:
            self._running = self._stopping = False
        if exceeded is not None:
            raise exceeded

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except MemoryExceeded as error:  # it has said so
            self._failure = error
        except BaseException as error:
            self._failure = error
            log.exception("controller crashed")

    def _loop(self, relay: Relay) -> MemoryExceeded | None:
        """Serve until `stop`, or until memory is exceeded."""
        broker, clients, workers = relay.broker, relay.clients.socket, relay.workers.socket
        pollin = int(zmq.POLLIN)
        most_poll_s = min(MOST_POLL_S, self.config.ttl_s / 6)
        gate, door = self._gate, None
        busy_s, busy_until_s = self.config.busy_poll_us / 1e6, 0.0
        limit_bytes = default_limit_bytes() if self.config.memory_bytes is None else self.config.memory_bytes
        with contextlib.ExitStack() as stack:
            memory = stack.enter_context(contextlib.closing(MemoryWatch(limit_bytes)))
            monitor = stack.enter_context(contextlib.closing(Monitor(workers) if gate is None else gate.watch(workers, breaks=True)))
            watched: list[tuple[Any, int]] = [(workers, pollin), (clients, pollin), (monitor.fd, pollin), (self._wake_r, pollin)]
            if gate is not None:
                door = stack.enter_context(contextlib.closing(gate.watch(clients, breaks=False)))
                watched += [(gate.socket, pollin), (door.fd, pollin)]
            while not self._stopping:
                now = time.monotonic()
                if held_bytes := memory.look(now):
                    self._report("memory exceeded", level="critical", held_bytes=held_bytes, limit_bytes=limit_bytes, **broker.held())
                    return memory_exceeded(held_bytes, limit_bytes)
                due_s = broker.tick(now)
                retry_s = None
                if relay.clients.outboxes or relay.workers.outboxes:
                    relay.flush(now)
                    retry_s = relay.next_s()
                next_s = min(when_s for when_s in (now + most_poll_s, due_s, retry_s) if when_s is not None)
                above = self._parents.polled() if self._parents is not None else []
                at_once = monitor.more or (door is not None and door.more) or now < busy_until_s
                ready = dict(zmq.zmq_poll(watched + above, 0 if at_once else max(0, ceil((next_s - now) * 1000))))
                now = time.monotonic()
                if busy_s and ready:
                    busy_until_s = now + busy_s
                elif now < busy_until_s:
                    os.sched_yield()  # where cores are few, whoever makes the next message may need this one
                if self._parents is not None:
                    self._parents.serve(now, ready, DRAIN)
                if workers in ready:
                    relay.from_workers(now, DRAIN)
                if clients in ready:
                    relay.from_clients(now, DRAIN)
                if (monitor.more or monitor.fd in ready) and monitor.take(MONITORED):
                    relay.from_workers(now, LAST_WORDS)  # a BYE that came before its connection broke is heard before
                    broker.members.disconnected(now)
                if self._wake_r in ready:
                    os.read(self._wake_r, 4096)
                if gate is not None and door is not None:
                    if gate.socket in ready:
                        gate.serve(now)
                    if door.more or door.fd in ready:
                        door.take(MONITORED)
                    gate.look(now)
        return None

    def _farewell(self, relay: Relay) -> None:
        until_s = time.monotonic() + FAREWELL_S
        while (now := time.monotonic()) < until_s:
            relay.flush(now)
            time.sleep(0.01)

    def _close(self, sockets: list[zmq.Socket[bytes]]) -> None:
        with self._wake_lock:
            pipe, self._wake_r, self._wake_w = (self._wake_r, self._wake_w), -1, -1  # first: a signal handler may call `stop` now
            for end in pipe:
                os.close(end)
        if self._parents is not None:
            self._parents.close(LINGER_MS)
            self._parents = None
        for binding in self._bindings:
            binding.unbind()
        for socket in sockets:
            socket.close(linger=LINGER_MS)
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        if self._own_context and self._context is not None:
            self._context.term()
            self._context = None
        for binding in self._bindings:  # last: until here the sockets have the paths that the locks stand for
            binding.release()
        self._bindings.clear()
        self.client_endpoints.clear()
        self.worker_endpoints.clear()


def _log(event: str, level: object = "info", **fields: object) -> None:
    getattr(log, str(level))(event, **fields)
