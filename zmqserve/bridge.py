"""Jobs from a PULL socket, results to a PUSH socket: language models in a ZeroMQ pipeline that is there already."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Self

import zmq

from .asking import Asking, ClientOptions
from .bridge_end import PipelineEnd, checked
from .bridge_loop import BridgeLoop
from .curve import OPEN_DOOR, exposed
from .errors import InvalidParameter
from .logs import Logger
from .polled import PolledClient
from .requests import check_count, check_name, check_switch, check_wait
from .sockets import SocketLimits, plain

if TYPE_CHECKING:
    from typing import Unpack

log = Logger("zmqserve.bridge")
PULL_PIPE, PUSH_PIPE = 1, 16
"""Messages that libzmq may hold. What lies in the one no other bridge can take, and what lies in the other is lost with the process."""
NO_LIMIT = -1
"""libzmq gives a connection up, and never makes it again, when a message is larger than it may be: a bridge would be deaf from then on."""
CRASH_LINGER_MS = 1000
"""What results have to leave when something broke the bridge."""
LOOK_S = 0.05
"""How often a bridge whose last results wait for the pipeline looks whether it was told to wait no longer."""


class Bridge:
    """Takes jobs from a pipeline, has them answered, and hands the results on: one msgpack or JSON map each, as docs/pipelines.md says.

    controllers: as a client's endpoints. pull, push: one endpoint or several, connected, or bound with `bind_pull` and `bind_push`.
    model: of jobs that name none. concurrency: jobs asked at once. window: jobs taken whose results libzmq has not taken; beyond it no job
    is taken, and the pipeline waits (None: twice `concurrency`). ordered: results in the order of their jobs, not as they end.
    drain_s: how long `stop` goes on taking jobs while more arrive, 0: it takes none. job_bytes: a larger job gets an error.
    insecure: bind `pull` and `push` where other machines may reach them, too: nobody is asked for a key there.
    context: yours, for inproc; it is left open. options: see ClientOptions; `timeout_s` is for jobs that name none.

    What may pass (no controller, no worker, full queues) makes a job wait, until its timeout; what is wrong with it is its result.
    `run()` serves in the calling thread until `stop()`, `start()` in one of its own. Raises InvalidParameter and InvalidEndpoint, and
    BindFailed from `bind`, `run` and `start`.
    """

    def __init__(
        self,
        controllers: str | Sequence[str] | None = None,
        *,
        pull: str | Sequence[str],
        push: str | Sequence[str],
        model: str | None = None,
        bind_pull: bool = False,
        bind_push: bool = False,
        concurrency: int = 64,
        window: int | None = None,
        ordered: bool = False,
        drain_s: float = 10.0,
        job_bytes: int = 16 * 2**20,
        insecure: bool = False,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
        **options: Unpack[ClientOptions],
    ) -> None:
        Asking(controllers, options)  # says what is wrong with them
        self._controllers, self._options = controllers, options
        self._bind_pull, self._bind_push = check_switch("bind_pull", bind_pull), check_switch("bind_push", bind_push)
        self._pulls = checked("pull", pull, bind=bind_pull)
        self._pushes = checked("push", push, bind=bind_push)
        bound = [*(self._pulls if bind_pull else ()), *(self._pushes if bind_push else ())]
        remedy = "bind loopback or ipc, or set insecure (--insecure) in a network that you trust"
        self._exposed = exposed(bound, insecure=check_switch("insecure", insecure), remedy=remedy)
        self._model = None if model is None else check_name("model", model)
        self._concurrency = _positive("concurrency", concurrency)
        self._window = 2 * concurrency if window is None else _positive("window", window)
        self._ordered = check_switch("ordered", ordered)
        self._drain_s = check_wait("drain_s", drain_s)
        self._job_bytes = _positive("job_bytes", job_bytes)
        self._context, self._owns_context = None if context is None else plain(context), context is None
        self._loop: BridgeLoop | None = None
        self._running = self._stopping = False
        self._until_s = inf
        self._lost = 0
        self._counters: Counter[str] = Counter()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __repr__(self) -> str:
        state = "not bound" if self._loop is None else repr(self._loop)
        return f"Bridge(pull={self.pull_endpoints}, push={self.push_endpoints}, {state})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop(None if error is None else 0)

    @property
    def pull_endpoints(self) -> list[str]:
        """Where jobs come from; once bound, the real ones."""
        return list(self._pulls if self._loop is None else self._loop.pull.endpoints)

    @property
    def push_endpoints(self) -> list[str]:
        """Where results go; once bound, the real ones."""
        return list(self._pushes if self._loop is None else self._loop.push.endpoints)

    @property
    def counters(self) -> Mapping[str, int]:
        """So far: `jobs` taken, `results` that have left, `answers` and `errors` among all results, `chunks`, `retries`."""
        return dict(self._counters)

    def bind(self) -> None:
        """Bind and connect the sockets. Harmless when that was done."""
        if self._loop is None:
            self._loop = loop = self._bound()
            where = {"pull": loop.pull.endpoints, "push": loop.push.endpoints, "controllers": loop.client.endpoints}
            if self._exposed:
                log.warning("insecure", endpoints=self._exposed, why=OPEN_DOOR)
            log.info("bridge up", **where, model=self._model, concurrency=self._concurrency, window=self._window, ordered=self._ordered)

    def start(self) -> None:
        """Serve in a thread of its own, until `stop`."""
        if self._thread is not None:
            raise RuntimeError("the bridge runs already")
        self._stopping, self._until_s = False, inf
        self.bind()
        self._failure = None
        self._thread = threading.Thread(target=self._run_in_thread, name="zmqserve-bridge", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Serve in this thread until `stop`. Raises what broke it."""
        self._running = True  # first: from here on a signal handler's `stop` is for the loop
        linger_ms, until_s = CRASH_LINGER_MS, -inf
        try:
            self.bind()
            loop = self._loop
            if loop is None:  # stopped just now
                return
            try:
                if not self._stopping:
                    loop.run()
                until_s = self._until_s
                linger_ms = -1 if until_s == inf else max(0, int((until_s - monotonic()) * 1000))
            except zmq.ContextTerminated:
                linger_ms, until_s = 0, -inf
                log.warning("context terminated", lost=loop.held)
            finally:
                self._lost = loop.held
                log.info("bridge down", lost=loop.held, **self._counters)
                self._close(linger_ms, until_s)
        finally:
            self._running = self._stopping = False
            self._until_s = inf

    def stop(self, timeout_s: float | None = None) -> bool:
        """Stop, from any thread or a signal handler: take what still arrives, finish it, hand its results on; then end.

        timeout_s: what is not done by then is dropped (None: however long that takes); of several, also while another `stop` waits, the
        one that ends first counts. What libzmq had got before that one came may still leave. Waits for the thread of `start`, and raises
        what broke it. Returns whether libzmq has got all results; where it does not wait, whether it has them now. Harmless when it has
        ended.
        """
        if timeout_s is not None:
            self._until_s = min(self._until_s, monotonic() + check_wait("timeout_s", timeout_s))
        self._stopping = True
        loop = self._loop
        if loop is not None and not self._running and self._thread is None:  # bound, and never run
            self._close(0)
        elif loop is not None:
            loop.until_s = self._until_s
            loop.stop()
            self._lost = loop.held
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            self._thread = None
            failure, self._failure = self._failure, None
            if failure is not None:
                raise failure
        return not self._lost

    def tell(self) -> None:
        """Log the counters; from any thread or a signal handler."""
        if self._loop is not None:
            self._loop.tell()

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._failure = error
            log.exception("bridge crashed")

    def _bound(self) -> BridgeLoop:
        context = self._context = self._context or zmq.Context()
        limits = [SocketLimits(NO_LIMIT, pipe) for pipe in (PULL_PIPE, PUSH_PIPE)]
        ends: list[PipelineEnd] = []
        try:
            ends.append(PipelineEnd(context, zmq.PULL, self._pulls, limits[0], bind=self._bind_pull))
            ends.append(PipelineEnd(context, zmq.PUSH, self._pushes, limits[1], bind=self._bind_push))
            client = PolledClient(self._controllers, context=context, **self._options)
        except BaseException:
            for end in ends:
                end.close(0)
            self._end_context()
            raise
        return BridgeLoop(
            client,
            ends[0],
            ends[1],
            self._counters,
            model=self._model,
            timeout_s=self._options.get("timeout_s"),
            concurrency=self._concurrency,
            window=self._window,
            ordered=self._ordered,
            drain_s=self._drain_s,
            job_bytes=self._job_bytes,
        )

    def _close(self, linger_ms: int, until_s: float = -inf) -> None:
        """Let go of everything. `until_s`: what `linger_ms` was made from; a `stop` that came since may allow less."""
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.close(linger_ms)
        self._end_context(until_s)

    def _end_context(self, until_s: float = -inf) -> None:
        if self._owns_context and self._context is not None:
            context, self._context = self._context, None
            # In a thread of its own: a closed socket's linger cannot be shortened any more.
            ending = threading.Thread(target=context.term, name="zmqserve-bridge-end", daemon=True)
            try:
                ending.start()
            except RuntimeError:  # the interpreter is ending and has no threads any more
                context.term()
                return
            while ending.is_alive():
                if monotonic() >= self._until_s < until_s:
                    log.warning("the pipeline does not take the last results: what it has not taken when this process ends is lost")
                    return
                ending.join(LOOK_S)


def _positive(what: str, count: object) -> int:
    number = check_count(what, count)
    if number < 1:
        raise InvalidParameter(f"{what} must be an integer from 1, got {number}", data={"parameter": what})
    return number
