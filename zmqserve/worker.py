"""BaseModelWorker: what every worker does. A backend gives `load` and the verbs that it can.

Three threads: the caller's of `run` waits (and gets the signals), one owns the sockets and the heartbeats (linkthread.py), one
runs the backend on an event loop (engine.py). `load` has a fourth, so that a worker is alive from its first second.
"""

from __future__ import annotations

import argparse
import functools
import os
import secrets
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from types import FrameType, TracebackType
from typing import ClassVar, Self

import msgspec
import zmq

from .admission import by_name
from .answers import Job
from .config import WORKER_ENDPOINT
from .credentials import KeyFile, KeyFiles
from .engine import Engine
from .errors import InvalidParameter, Unsupported, ZmqserveError
from .heap import freeze_heap
from .jobs import Delta, GenerateJob, Vectors
from .linkthread import LinkThread
from .logs import Logger
from .messages import MAX_NAME, MAX_SLOTS, MAX_SPEED, PROTOCOL, CountTokens, Embed, ModelCard, ModelDetails, Ready
from .release import installed_version
from .resuming import declared
from .sockets import SocketLimits, check_endpoint

log = Logger("zmqserve.worker")
ENGINE_JOIN_S = 5.0
"""How long the end waits for an engine that may be hung; its thread is a daemon."""
SIGNAL_S = 0.25
"""How late a signal may be noticed that another thread than the main one got."""


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of a worker.

    model: what the backend loads (a path or an id). served_name: the name that clients use; None: `model`, of a path the last part.
    name: the worker's own, unique at its controllers; None: backend-host-6 hex digits.
    controllers: the worker sides of all controllers that it serves. slots: requests at one time; None: as the backend says.
    speed: its weight in dispatch.
    ttl_s: controllers give it up after so much silence; it sends a heartbeat every third of it.
    grace_s: what running requests get to finish when it drains. outbox_bytes: what may wait for a controller that does not
    read; beyond it generation pauses.
    key, controller_key: files of keys, for CURVE: the worker's pair, as `zmqserve keys new` makes it, and the public key of a controller's
    port for workers, one for all controllers or one for each; None: what ``ZMQSERVE_KEY`` and ``ZMQSERVE_CONTROLLER_KEY`` name, if any.
    context: a zmq.Context to use, needed for inproc endpoints; it is left open.
    """

    model: str = ""
    served_name: str | None = None
    name: str | None = None
    controllers: tuple[str, ...] = (WORKER_ENDPOINT,)
    slots: int | None = None
    speed: float = 1.0
    ttl_s: float = 3.0
    grace_s: float = 30.0
    outbox_bytes: int = 16 * 2**20
    limits: SocketLimits = field(default_factory=SocketLimits)
    key: KeyFile | None = None
    controller_key: KeyFiles | None = None
    context: zmq.Context[zmq.Socket[bytes]] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        controllers = self.controllers
        for name, good, expected in (
            ("controllers", bool(controllers) and not isinstance(controllers, str), "a tuple of at least one endpoint"),
            ("controllers", len(set(controllers)) == len(controllers), "different endpoints"),
            ("name", self.name is None or 1 <= len(self.name) <= MAX_NAME, f"1 to {MAX_NAME} characters long"),
            ("slots", self.slots is None or 1 <= self.slots <= MAX_SLOTS, f"an integer from 1 to {MAX_SLOTS}"),
            ("speed", 0 < self.speed <= MAX_SPEED, f"above 0, up to {MAX_SPEED:g}"),
            ("ttl_s", 0.01 <= self.ttl_s <= 1e6, "from 0.01 to 1e6"),
            ("grace_s", 0 <= self.grace_s <= 1e7, "from 0 to 1e7"),
            ("outbox_bytes", self.outbox_bytes >= 1, "1 or more"),
        ):
            if not good:
                raise InvalidParameter(f"{name} must be {expected}, got {getattr(self, name)!r}", data={"parameter": name})
        for name in ("model", "served_name", "name"):
            try:
                (getattr(self, name) or "").encode()
            except UnicodeEncodeError:
                text = f"{name} must be text that can be written as UTF-8, got {getattr(self, name)!r}"
                raise InvalidParameter(text, data={"parameter": name}) from None
        for endpoint in controllers:
            check_endpoint(endpoint, bind=False)


class BaseModelWorker(ABC):
    """A worker: registers, beats, takes requests up to `slots`, streams, cancels, drains and comes back.

    A subclass names its `backend`, says in `honours` which parameters (and ``token_ids``) it acts on, so that any other is
    refused and never ignored, and overrides `load` and its verbs. These run on one event loop: what takes long goes to a
    thread. An exception ends its own request only.

    `resumes` declares that it honours `Generate.resume`, and how by parameter (``greedy``: temperature 0, ``sampling``: above it
    without a seed): ``exact``, ``approximate`` or ``refused``; not named is exact. None: it cannot continue an answer. Its cards must
    have a fingerprint, and may say it otherwise. `resuming.reread` does most of it.

    ``run()`` serves until SIGTERM, SIGINT or a controller's drain; ``start()`` and ``stop()`` do it inside another program.
    """

    backend: ClassVar[str]
    needs_model: ClassVar[bool] = True
    """Whether its command line must have --model."""
    honours: ClassVar[frozenset[str]] = frozenset()
    resumes: ClassVar[Mapping[str, str] | None] = None
    default_slots: ClassVar[int] = 4

    def __init__(self, config: WorkerConfig | None = None) -> None:
        self.config = config or WorkerConfig()
        self.name = self.config.name or f"{self.backend}-{socket.gethostname()}-{secrets.token_hex(3)}"
        self.slots = self.config.slots or self.default_slots
        self.cards: list[ModelCard] = []
        self._loaded = threading.Event()
        self._taken = threading.Event()
        self._lock = threading.Lock()
        self._ended = self._left_engine = self._owns_process = False
        self._links: LinkThread | None = None
        self._engine: Engine | None = None
        self._loading: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @functools.cached_property
    def model_name(self) -> str:
        """The name that clients use for `config.model`."""
        # Looked up once: the directory that a path is relative to may be gone when the worker registers again.
        model = self.config.model
        return self.config.served_name or (os.path.basename(os.path.abspath(model)) if os.path.exists(model) else model)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # --- what a backend gives ---------------------------------------------------------------------

    @classmethod  # noqa: B027 - many have none
    def add_arguments(cls, parser: argparse._ArgumentGroup) -> None:
        """Add the backend's own options to its command line."""

    @classmethod
    def from_arguments(cls, config: WorkerConfig, args: argparse.Namespace) -> Self:  # noqa: ARG003 - for those that override it
        """The worker for a command line; `args` has the options of `add_arguments`."""
        return cls(config)

    @abstractmethod
    def load(self) -> list[ModelCard]:
        """Load and warm up, in a thread of its own; requests come after it returns. May set `slots`.

        A card without `verbs` gets those of the methods that are overridden; ``chat`` is only claimed explicitly. Of several models
        one may have fewer of the `slots` than all together: its card's own `slots` say how many. Beyond them nothing comes.
        """

    def generate(self, job: GenerateJob) -> AsyncIterator[Delta]:  # noqa: ARG002 - for those that override it
        """Yield the answer piece by piece: an async generator. A cancelled request cancels its task."""
        raise self._unsupported("generate")

    async def embed(self, request: Embed) -> Vectors:  # noqa: ARG002 - the same
        """One vector for each of `request.texts`."""
        raise self._unsupported("embed")

    async def count_tokens(self, request: CountTokens) -> int:  # noqa: ARG002 - the same
        """How many tokens the prompt or conversation is."""
        raise self._unsupported("count_tokens")

    async def model_details(self, request: ModelDetails) -> ModelCard:
        """The card of `request.model`: as loaded."""
        return by_name(self.cards)[request.model]

    def step_age_s(self) -> float:
        """Seconds since the engine last made anything; 0 while it has nothing to do. Called from the socket thread: be quick."""
        if self._links is None or self._engine is None or not self._links.workload.running:
            return 0.0
        return self._engine.desk.age_s()

    def waiting(self) -> int:
        """Requests that it took and its engine has not begun. Called from the socket thread: be quick."""
        return 0

    def close(self) -> None:  # noqa: B027 - nothing to let go of, unless a backend says so
        """Let go of the model, after the last job."""

    def begin(self, job: Job) -> None:
        """Start to answer, on the event loop. The default drives `generate` in a task.

        A backend with a step loop of its own overrides this and `abandon`, needs no task per request, and calls `job.emit`
        for all jobs of a step in one callback: they leave together. It should pause a job while `job.congested`.
        """
        if self._engine is not None:
            self._engine.desk.drive(job)

    def abandon(self, job: Job) -> None:  # noqa: B027 - the same
        """Stop a job that `begin` started without a task; it has been answered. Nothing it emits from here on is sent."""

    # --- life -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until told to stop; in the main thread by SIGTERM or SIGINT too (drain; a second SIGINT ends at once).

        For a process that does nothing else: what it holds once the model is loaded is left out of garbage collection, which would
        stop every stream for as long as it looks at all of that (0.3 s with vLLM). In a program of yours, use `start`.

        Raises what `load` raised, Refused if no controller takes the worker, or what broke it.
        """
        self._owns_process = True
        with self._signals():
            self.start()
            self.wait_ended()

    def start(self) -> None:
        """Begin to serve, in threads of its own. A worker starts once. Raises InvalidEndpoint, and InvalidParameter for keys."""
        if self._links is not None:
            raise RuntimeError(f"worker {self.name} was started before: make a new one")
        self._links = links = LinkThread(self)
        self._engine = engine = Engine(self, links, on_crash=self._fail, on_end=self._engine_ended)
        engine.start()
        links.start_with(engine)
        self._loading = threading.Thread(target=self._load, name=f"{self.name} load", daemon=True)
        self._loading.start()

    def drain(self) -> None:
        """Take nothing new, finish what runs within `grace_s`, then end. From any thread; returns at once."""
        if self._links is not None:
            self._links.call(functools.partial(self._links.workload.drain, None))

    def stop(self) -> None:
        """End now, and wait for it. What runs is aborted and moved elsewhere by the controllers. Harmless when it has ended."""
        links, engine = self._links, self._engine
        if links is None or engine is None:
            return
        links.call(links.workload.end)
        links.join()
        engine.join(0 if self._left_engine else ENGINE_JOIN_S)
        if engine.is_alive() and not self._left_engine:
            self._left_engine = True
            log.warning("engine does not end: leaving it", worker=self.name)

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it can be asked: its model is loaded and a controller has taken it.

        Raises what made it fail, TimeoutError after `timeout_s`, RuntimeError if it was stopped.
        """
        until_s = time.monotonic() + timeout_s
        decided = self._loaded.wait(timeout_s)
        if self.failure is not None:
            raise self.failure
        if decided and not self.cards:
            raise RuntimeError(f"worker {self.name} was stopped before {self.model_name!r} was loaded")
        if not decided:
            raise TimeoutError(f"worker {self.name} has not loaded {self.model_name!r} within {timeout_s} s")
        taken = self._taken.wait(max(0.0, until_s - time.monotonic()))
        if self.failure is not None:
            raise self.failure
        if not taken:
            where = ", ".join(self.config.controllers)
            told = f"worker {self.name} has loaded {self.model_name!r}, but no controller at {where} took it within {timeout_s} s"
            links = [] if self._links is None else list(self._links.workload.links)
            raise TimeoutError("; ".join([told, *sorted({link.refusal.why for link in links if link.refusal is not None})]))

    def taken(self) -> None:
        """A controller has it in its registry, with its model, or it has failed. Called from the socket thread."""
        self._taken.set()

    def wait_ended(self, timeout_s: float | None = None) -> None:
        """Wait until it has ended, as after a drain. Raises what ended it, if it was not asked to, or TimeoutError."""
        if self._links is None:
            return
        until_s = inf if timeout_s is None else time.monotonic() + timeout_s
        # A signal wakes this thread only if the kernel hands it to this one of all threads, and not all kernels do.
        while self._links.is_alive() and (left_s := until_s - time.monotonic()) > 0:
            self._links.join(min(left_s, SIGNAL_S))
        if self._links.is_alive():
            raise TimeoutError(f"worker {self.name} has not ended within {timeout_s} s")
        self.stop()
        if self.failure is not None:
            raise self.failure

    @property
    def left_running(self) -> bool:
        """Whether its engine, or `load`, went on when it had ended. Python's exit waits for threads that these may have made, for ever if
        one hangs."""
        return self._left_engine or (self._loading is not None and self._loading.is_alive())

    @property
    def failure(self) -> BaseException | None:
        """What ended the worker, if it was not asked to end."""
        return self._links.workload.failure if self._links is not None else None

    def registration(self, state: str, slots: int) -> Ready:
        """What it says of itself when it registers."""
        cards = self.cards or ([ModelCard(self.model_name)] if self.model_name else [])
        ttl_ms = max(1, int(self.config.ttl_s * 1000))
        return Ready(PROTOCOL, self.name, self.backend, state, cards, slots, self.config.speed, ttl_ms, version=installed_version())

    # --- within -----------------------------------------------------------------------------------

    def _load(self) -> None:
        try:
            cards = [self._completed(card) for card in self.load()]
            if not cards:
                raise InvalidParameter(f"{type(self).__name__}.load returned no model card", data={"parameter": "models"})
            if self._owns_process:
                freeze_heap()
        except ZmqserveError as error:
            log.error("load failed", worker=self.name, model=self.config.model, why=error.message)  # noqa: TRY400 - it says it all
            self._fail(error)
            return
        except BaseException as error:
            log.exception("load failed", worker=self.name, model=self.config.model)
            self._fail(error)
            return
        with self._lock:
            if not self._ended:
                self.cards = cards
        if self.cards and self._links is not None and self._engine is not None:
            self._engine.desk.cards = by_name(cards)
            self._links.call(functools.partial(self._links.workload.announce, self.slots, cards))
            self._loaded.set()
        else:
            self.close()

    def _completed(self, card: ModelCard) -> ModelCard:
        if card.slots is not None and not 1 <= card.slots <= MAX_SLOTS:
            text = f"slots of model {card.name!r} must be None or an integer from 1 to {MAX_SLOTS}, got {card.slots!r}"
            raise InvalidParameter(text, data={"parameter": "slots"})
        verbs = list(card.verbs) or [verb for verb in ("generate", "embed", "count_tokens") if self._overrides(verb)]
        card = msgspec.structs.replace(card, verbs=verbs if "model_details" in verbs else [*verbs, "model_details"])
        return declared(card, self.resumes, self.honours)

    def _overrides(self, verb: str) -> bool:
        return getattr(type(self), verb) is not getattr(BaseModelWorker, verb)

    def _unsupported(self, verb: str) -> Unsupported:
        return Unsupported(f"the {self.backend} backend does not {verb}", data={"parameter": verb})

    def _fail(self, error: BaseException) -> None:
        if self._links is not None:
            self._links.call(functools.partial(self._links.workload.end, error))

    def _engine_ended(self) -> None:
        with self._lock:
            self._ended = True
        self._loaded.set()
        if self.cards:
            try:
                self.close()
            except Exception:
                log.exception("close failed", worker=self.name)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Handlers run between any two instructions of the main thread: they take no lock and log nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        interrupted = False

        def handle(number: int, _frame: FrameType | None) -> None:
            nonlocal interrupted
            if interrupted and number == signal.SIGINT and self._links is not None:
                self._links.call(self._links.workload.end)
            interrupted = True
            self.drain()

        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)
