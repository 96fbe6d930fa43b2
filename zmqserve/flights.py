"""The life of a flight: admit, dispatch, started, settle, cancel. Pure: `now` and the ways to send are given.

A flight ends exactly once, in `settle`: its books are closed first and its last message sent then, because any send may
find out that the peer is gone and come back here to end what that peer still has open. A flight whose client is gone is
settled in silence when its worker has let go of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random

from . import messages as m
from .clients import Clients
from .config import ControllerConfig
from .errors import DeadlineExceeded, NoWorker, Overloaded, SlowConsumer, WorkerLost, ZmqserveError
from .flight import Client, Envelope, Flight, Route
from .liveness import Agenda
from .registry import Need, Pool, Registry, Worker

SENT, GONE, FULL = range(3)
"""What a send says: it is on its way; nobody is there any more; the peer does not read and its outbox is at its limit."""


OUTCOMES = frozenset(
    {"ok", "stop", "length", "cancelled", "failed", "deadline", "worker_lost", "no_worker"}
    | {"client gone", "client silent", "slow consumer", "shut down"}
)
"""What is counted by its name; a worker may say anything, and counters are for good."""


class Flights:
    """Every request in progress. `routes` maps the MORE heads in use to their way, for the relay."""

    def __init__(
        self,
        config: ControllerConfig,
        registry: Registry,
        agenda: Agenda,
        *,
        send_client: Callable[[Envelope, bytes], int],
        send_worker: Callable[[bytes, bytes, bytes], int],
        lose: Callable[[Worker, str, float], None],
        report: Callable[..., None],
        random: Random,
    ) -> None:
        self.config = config
        self.registry = registry
        self.agenda = agenda
        self.clients = Clients()
        self.routes: dict[bytes, Route] = {}
        self.counters: Counter[str] = Counter()
        self.running = 0
        self._homeless: deque[Flight] = deque()
        self._placing = False
        self._send_client, self._send_worker = send_client, send_worker
        self._lose, self._report, self._random = lose, report, random

    def __repr__(self) -> str:
        return f"Flights({self.running} running, {len(self.clients)} clients)"

    # --- towards the client

    def answer(self, client: Client, payload: bytes, now: float) -> None:
        """Send to the client, unless it is gone; learn here that it is."""
        if client.gone:
            return
        status = self._send_client(client.envelope, payload)
        if status != SENT:
            self.connection_failed(client.envelope[0], status, now)

    def connection_failed(self, connection: bytes, status: int, now: float) -> None:
        """A send to this connection was GONE or FULL: let go of every client behind it."""
        for client in self.clients.behind(connection):
            if status == FULL:
                limit = self.config.outbox_bytes
                error = SlowConsumer(
                    f"the client did not read: {limit} bytes wait for it, which is the limit", data={"outbox_bytes": limit}
                )
                self.detach(client, now, "slow consumer", error)
            else:
                self.detach(client, now, "client gone")

    def detach(self, client: Client, now: float, why: str, error: ZmqserveError | None = None) -> None:
        """Let go of a client: its requests are cancelled, with `error` as their end if it is still there to read it."""
        if client.gone:
            return
        client.gone = True
        self.counters[f"clients: {why}"] += 1
        self.clients.forget(client)
        for flight in list(client.flights.values()):
            if error is not None:
                self._send_client(client.envelope, error_message(flight.rid, error))
            self.cancel(flight, now, why)

    # --- admit and dispatch

    def admit(self, client: Client, header: m.RequestHeader, need: Need, pool: Pool, payload: bytes, now: float) -> None:
        """Take a request on: it goes to a worker now or waits. Raises Overloaded when it can do neither."""
        flight = Flight(client, header, need, pool, payload, now)
        worker = self._pick(flight)
        if worker is None and not pool.waiting.has_room(len(payload)):
            self._forget_idle(client)
            raise Overloaded(
                f"{pool.model}: {len(pool.waiting)} requests ({pool.waiting.bytes} bytes) wait already, which is the limit",
                retry_after_ms=pool.waiting.retry_after_ms(),
                data={"model": pool.model, "waiting": len(pool.waiting)},
            )
        client.flights[flight.rid] = flight
        if flight.deadline_s is not None:
            flight.timer = self.agenda.at(flight.deadline_s, lambda now: self._too_late(flight, now))
        if client.timer is None:
            self.watch(client, now)
        if worker is None:
            pool.waiting.push(flight)
        else:
            self._dispatch(flight, worker, now)
            self._place_homeless(now)

    def feed(self, worker: Worker, now: float) -> None:
        """Give a worker what waits for it while it has room: the first by priority and arrival over all its models."""
        while worker.usable:
            first: Flight | None = None
            for pool in worker.pools:
                if len(pool.waiting):
                    able = frozenset(need for need in pool.waiting.needs() if worker.has_room(need) and pool.serves(worker, need))
                    flight = pool.waiting.head(able)
                    if flight is not None and (first is None or (flight.priority, flight.arrived_s) < (first.priority, first.arrived_s)):
                        first = flight
            if first is None:
                break
            first.pool.waiting.take(first, now)
            self._dispatch(first, worker, now)
        self._place_homeless(now)

    def _pick(self, flight: Flight) -> Worker | None:
        if flight.slotted:
            return flight.pool.pick(flight.need, self._random, flight.affinity, flight.avoid)
        return flight.pool.any_usable(flight.need, self._random)

    def _dispatch(self, flight: Flight, worker: Worker, now: float) -> None:
        client = flight.client
        flight.worker = worker
        flight.dispatched_s = now
        worker.flights[client.number, flight.rid] = flight
        self.running += 1
        flight.pool.running += 1
        if flight.slotted:
            self.registry.take(worker)
        head = m.more_head(worker.epoch, client.number)
        route = self.routes.get(head)
        if route is None:
            route = self.routes[head] = Route(worker, client, head)
        route.flights += 1
        flight.route = route
        left_ms = min(2**53, max(1, int((flight.deadline_s - now) * 1000))) if flight.deadline_s is not None else None
        queue_ms = (now - flight.arrived_s) * 1000
        request = m.ControllerHead(m.REQUEST, worker.epoch, client.number, flight.rid, left_ms, flight.attempts, queue_ms)
        status = self._send_worker(worker.identity, m.encode(request), flight.payload)
        if status != SENT:
            self._release(flight)
            self._homeless.append(flight)
            self._lose(worker, "does not read" if status == FULL else "connection lost", now)

    def _place_homeless(self, now: float) -> None:
        """Find another worker for flights whose worker was lost. A loop, so that many dead workers are no deep recursion."""
        if self._placing:
            return
        self._placing = True
        waiting: list[Flight] = []
        while self._homeless:
            flight = self._homeless.popleft()
            if not flight.open:  # cancelled meanwhile
                continue
            worker = self._pick(flight)
            if worker is not None:
                self._dispatch(flight, worker, now)
            else:
                waiting.append(flight)
        for flight in reversed(waiting):  # each goes to the head: the last of them first, so that they keep their order
            if flight.open:
                flight.pool.waiting.push(flight, front=True)
        self._placing = False

    # --- what a worker says of a flight

    def started(self, flight: Flight, now: float) -> None:
        """Its first chunk goes to the client: it can't be sent to another worker unseen any more, so its payload is let go."""
        flight.started = True
        flight.first_s = now
        flight.payload = b""

    def busy(self, flight: Flight, now: float) -> None:
        """Its worker has no slot after all: back to the head of the queue, with no attempt spent.

        Others fill that worker: it counts as full until its next heartbeat tells by how much.
        """
        worker = self._release(flight)
        self.counters["busy"] += 1
        worker.others = max(worker.others, worker.slots - worker.running)
        self.registry.touch(worker)
        if flight.ending is not None:
            self.settle_unsent(flight, now, flight.ending)
            return
        self._homeless.append(flight)
        self._place_homeless(now)

    def settle(self, flight: Flight, now: float, outcome: str, last: bytes, code: int = 0, tokens: tuple[int, int] = (0, 0)) -> None:
        """It has ended: close its books, send its `last` message, and give its slot to who waits."""
        worker = self._release(flight) if flight.worker is not None else None
        client = flight.client
        flight.open = False
        del client.flights[flight.rid]
        for timer in (flight.timer, flight.cancel_timer):
            if timer is not None:
                timer.cancel()
        self.answer(client, last, now)
        self._forget_idle(client)
        self.counters[f"ended: {outcome if outcome in OUTCOMES else 'other'}"] += 1
        waited_until = flight.dispatched_s if worker is not None else now
        self._report(
            "request",
            rid=flight.rid,
            verb=flight.need.verb,
            model=flight.pool.model,
            worker=worker.name if worker is not None else None,
            outcome=outcome,
            code=code,
            queue_ms=round((waited_until - flight.arrived_s) * 1000, 3),
            first_ms=round((flight.first_s - flight.arrived_s) * 1000, 3) if flight.first_s is not None else None,
            total_ms=round((now - flight.arrived_s) * 1000, 3),
            prompt_tokens=tokens[0],
            completion_tokens=tokens[1],
            attempts=flight.attempts,
            trace=flight.trace,
        )
        if worker is not None:
            worker.finished += 1
            self.feed(worker, now)

    def settle_unsent(self, flight: Flight, now: float, outcome: str, error: ZmqserveError | None = None) -> None:
        """End a flight that no worker has: with the error, as too late, or as cancelled."""
        if outcome == "deadline":
            error = DeadlineExceeded("the deadline passed before a worker had answered")
        if error is not None:
            self.settle(flight, now, outcome, error_message(flight.rid, error), error.code)
        else:
            self.settle(flight, now, outcome, m.encode(m.Done(flight.rid, 0, ["cancelled"], m.Usage(0, 0), m.Timings(""))))

    def give_up_worker(self, worker: Worker, why: str, now: float, *, clean: bool = False) -> None:
        """The registry has forgotten this worker: its unstarted flights go elsewhere, the others end as WorkerLost.

        One that left of its own will (`clean`) was not killed by what it ran: that costs no attempt.
        """
        for flight in list(worker.flights.values()):
            self._release(flight)
            flight.attempts += not clean
            flight.avoid = flight.avoid | {worker.name}
            if flight.cancel_timer is not None:
                flight.cancel_timer.cancel()
            if flight.ending is not None:
                self.settle_unsent(flight, now, flight.ending)
            elif flight.started or flight.attempts >= self.config.max_attempts:
                self.settle_unsent(flight, now, "worker_lost", self._worker_lost(flight, worker, why))
            else:
                self.counters["redispatched"] += 1
                self._homeless.append(flight)
        self._place_homeless(now)

    def _worker_lost(self, flight: Flight, worker: Worker, why: str) -> WorkerLost:
        again = flight.attempts < self.config.max_attempts
        text = f"worker {worker.name} was lost ({why})" + (
            "" if again else f", the {flight.attempts}. one that this request lost: giving it up"
        )
        error = WorkerLost(text, data={"worker": worker.name, "attempts": flight.attempts})
        error.retryable = again
        return error

    def fail_waiting(self, pool: Pool, now: float) -> None:
        """Nobody came back to serve this model: whoever waits for it, and for what no other worker can do, ends as NoWorker."""
        hopeless = frozenset(need for need in pool.waiting.needs() if pool.hopeless(need))
        while (flight := pool.waiting.head(hopeless)) is not None:
            pool.waiting.remove(flight)
            text = f"all workers of {pool.model} that could {flight.need.verb} this are gone"
            self.settle_unsent(flight, now, "no_worker", NoWorker(text, retry_after_ms=1000, data={"model": pool.model}))

    # --- cancel and time

    def cancel(self, flight: Flight, now: float, why: str) -> None:
        """Stop it, for the given reason. Where a worker has it, it ends when the worker has let go of it. Idempotent."""
        if not flight.open:
            return
        worker = flight.worker
        if worker is None:
            if flight.waiting:
                flight.pool.waiting.remove(flight)
            self.settle_unsent(flight, now, why)
            return
        if flight.ending is not None:
            return
        flight.ending = why
        flight.cancel_timer = self.agenda.at(now + self.config.cancel_timeout_s, lambda now: self._not_cancelled(worker, now))
        head = m.ControllerHead(m.CANCEL, worker.epoch, flight.client.number, flight.rid)
        if self._send_worker(worker.identity, m.encode(head), b"") == GONE:
            self._lose(worker, "connection lost", now)

    def watch(self, client: Client, now: float) -> None:
        """Arm the client's timer: its lease if it Pings, else the default deadline of its oldest request."""
        if client.timer is not None:
            client.timer.cancel()
        if client.lease is not None:
            when_s = client.lease.ends_s
        else:
            oldest = next(iter(client.flights.values()))
            when_s = max(now + 1.0, oldest.arrived_s + self.config.default_deadline_s)
        client.timer = self.agenda.at(when_s, lambda now: self._look_at(client, now))

    def _look_at(self, client: Client, now: float) -> None:
        client.timer = None
        if client.lease is not None:
            if client.lease.expired(now):
                self.detach(client, now, "client silent")
                return
        else:
            for flight in list(client.flights.values()):
                if flight.arrived_s + self.config.default_deadline_s > now:
                    break
                if flight.deadline_s is None:
                    self.cancel(flight, now, "deadline")
        if client.flights and not client.gone:
            self.watch(client, now)

    def _too_late(self, flight: Flight, now: float) -> None:
        self.cancel(flight, now, "deadline")

    def _not_cancelled(self, worker: Worker, now: float) -> None:
        if worker.stalled_s is None:
            worker.stalled_s = now
            self.counters["stalled"] += 1
            self._report("worker stalled", worker=worker.name, why=f"a cancelled request did not end in {self.config.cancel_timeout_s} s")
            self.registry.touch(worker)

    # --- books

    def _release(self, flight: Flight) -> Worker:
        """Take a flight off its worker."""
        worker, route = flight.worker, flight.route
        if worker is None or route is None:
            raise RuntimeError(f"{flight!r} is on no worker")
        flight.worker = flight.route = None
        del worker.flights[flight.client.number, flight.rid]
        self.running -= 1
        flight.pool.running -= 1
        route.flights -= 1
        if route.flights == 0:
            del self.routes[route.head]
        if flight.slotted:
            self.registry.give_back(worker)
        return worker

    def _forget_idle(self, client: Client) -> None:
        if not client.flights and not client.gone:
            self.clients.forget(client)


def error_message(rid: int, error: ZmqserveError) -> bytes:
    """An exception as the Error message that ends a request."""
    return m.encode(m.Error(rid, error.code, error.message, error.retryable, error.retry_after_ms, dict(error.data)))
