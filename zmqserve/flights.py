"""The life of a flight: admit, dispatch, started, settle, cancel. Pure: `now` and the ways to send are given.

A flight ends exactly once, in `settle`: its books are closed before anything follows from its last message, because any send may
find out that the peer is gone, and what follows is that what that peer still has open ends here, too. A flight whose client is gone is
settled in silence when its worker has let go of it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from random import Random

from . import messages as m
from .bounds import check_request
from .config import ControllerConfig
from .deadlines import Deadlines
from .delivery import FULL, GONE, SENT, Delivery
from .endings import cancelled_message, error_message, none_left, too_late, worker_lost
from .errors import NoWorker, ZmqserveError
from .flight import Client, Envelope, Flight, Route
from .liveness import Agenda
from .need import Need
from .pool import Pool
from .registry import Registry, Worker
from .waiting import Crowd, FairQueue

OUTCOMES = (
    *("ok", "stop", "length", "cancelled", "failed", "deadline", "worker_lost", "no_worker"),
    *("client gone", "client silent", "slow consumer", "shut down", "parent gone", "key revoked"),
)
ENDED = {outcome: f"ended: {outcome}" for outcome in OUTCOMES}
"""What is counted by its name; a worker may say anything, and counters are for good."""


class Flights:
    """Every request in progress. `routes` maps the MORE heads in use to their way, for the relay."""

    def __init__(
        self,
        config: ControllerConfig,
        registry: Registry,
        agenda: Agenda,
        *,
        crowd: Crowd,
        send_client: Callable[[Envelope, bytes], int],
        send_worker: Callable[[bytes, bytes, bytes], int],
        lose: Callable[[Worker, str, float], None],
        look_after: Callable[[Pool, float], None],
        report: Callable[..., None],
        random: Random,
    ) -> None:
        self.config = config
        self.registry = registry
        self.agenda = agenda
        self.routes: dict[bytes, Route] = {}
        self.counters: Counter[str] = Counter()
        self.open = self.running = 0
        self.held_bytes = 0
        """Payloads of requests that have not begun: they may have to be sent again."""
        self.reports_requests: Callable[[], bool] = lambda: True
        """Whether the line of a request that has ended would be written at all."""
        self.delivery = Delivery(config, self.counters, send_client=send_client, cancel=self.cancel)
        self.clients = self.delivery.clients
        self.deadlines = Deadlines(self, report)
        self._homeless: deque[Flight] = deque()
        self._placing = False
        self._crowd = crowd
        self._send_worker = send_worker
        self._lose, self._look_after, self._report, self._random = lose, look_after, report, random

    def __repr__(self) -> str:
        return f"Flights({self.running} running, {len(self.clients)} clients)"

    # --- admit and dispatch

    def admit(
        self, client: Client, header: m.RequestHeader, need: Need, pool: Pool, payload: bytes, now: float, queued_ms: float = 0.0
    ) -> None:
        """Take a request on, which waited in other controllers for `queued_ms`: it goes to a worker now or waits.

        Raises Overloaded when it can do neither, and InvalidParameter when it is too large.
        """
        self.counters["requests"] += 1
        size = len(payload)
        try:
            check_request(self.config, size, opened=self.open, held_bytes=self.held_bytes, clients=len(self.clients))
        except ZmqserveError:
            self._forget_idle(client)
            raise
        flight = Flight(client, header, need, pool, payload, now)
        flight.queued_ms = queued_ms
        worker = self._pick(flight, now)
        if worker is None:
            try:
                pool.waiting.check(client, size, pool.model, pool.running)
            except ZmqserveError:
                self._forget_idle(client)
                raise
        status = SENT if worker is None else self._send_request(flight, worker, now)
        client.flights[flight.rid] = flight
        self.open += 1
        self.held_bytes += size
        if client.account is not None:
            client.account.in_flight += 1
        if flight.deadline_s is not None:
            flight.timer = self.agenda.at(flight.deadline_s, lambda now: self.deadlines.too_late(flight, now))
        if client.timer is None:
            self.deadlines.watch(client, now)
        if worker is None:
            before = pool.trials_at_once if need.trial else 0
            pool.waiting.push(flight)
            if need.trial and pool.trials_at_once > before:
                for member in list(pool.workers.values()):
                    self.feed(member, now)
        else:
            self._enter(flight, worker, status, now)
            if self._homeless:
                self._place_homeless(now)

    def feed(self, worker: Worker, now: float) -> None:
        """Give a worker what waits for it while it has room: by priority, then in turn, over all its models."""
        while self._crowd.size and worker.usable:
            first: FairQueue | None = None
            for pool in worker.pools:
                for need, queue in pool.waiting.queues.items():
                    if (first is None or queue.rank() < first.rank()) and worker.has_room(need) and pool.serves(worker, need):
                        first = queue
            flight = first.head() if first is not None else None
            if flight is None:
                break
            flight.pool.waiting.take(flight)
            self._dispatch(flight, worker, now)
        if self._homeless:
            self._place_homeless(now)

    def has_room(self, pool: Pool, need: Need) -> bool:
        """Whether a request that takes a slot would get one at once."""
        return pool.pick(need, self._random) is not None

    def _pick(self, flight: Flight, now: float) -> Worker | None:
        pool = flight.pool
        if not flight.slotted:
            return pool.any_usable(flight.need, self._random)
        worker = pool.pick(flight.need, self._random, flight.affinity, flight.avoid)
        if worker is not None and worker.quiet(now):
            quiet = frozenset(other.name for other in pool.workers.values() if other.quiet(now))
            worker = pool.pick(flight.need, self._random, flight.affinity, flight.avoid | quiet)
        return worker

    def _dispatch(self, flight: Flight, worker: Worker, now: float) -> None:
        self._enter(flight, worker, self._send_request(flight, worker, now), now)

    def _send_request(self, flight: Flight, worker: Worker, now: float) -> int:
        """Send it to a worker. Before any books, so that the worker wakes up meanwhile; `_enter` gets what this returns."""
        left_ms = min(2**53, max(1, int((flight.deadline_s - now) * 1000))) if flight.deadline_s is not None else None
        queue_ms = flight.queued_ms + (now - flight.arrived_s) * 1000
        head = m.ControllerHead(m.REQUEST, worker.epoch, flight.client.number, flight.rid, left_ms, flight.attempts, queue_ms)
        return self._send_worker(worker.identity, m.encode(head), flight.payload)

    def _enter(self, flight: Flight, worker: Worker, status: int, now: float) -> None:
        """A worker has it, if it was SENT there."""
        flight.dispatched_s = now
        if status != SENT:
            self._homeless.append(flight)
            self._lose(worker, "does not read" if status == FULL else "connection lost", now)
            return
        client = flight.client
        flight.worker = worker
        worker.flights[client.number, flight.rid] = flight
        flight.on_trial = flight.need.trial
        worker.trials += flight.on_trial
        self.running += 1
        flight.pool.running += 1
        if flight.slotted:
            self.registry.take(worker, flight.pool.model)
        head = m.more_head(worker.epoch, client.number)
        route = self.routes.get(head)
        if route is None:
            route = self.routes[head] = Route(worker, client, head)
        route.flights += 1
        flight.route = route

    def _place_homeless(self, now: float) -> None:
        """Find another worker for flights whose worker was lost. A loop, so that many dead workers are no deep recursion."""
        if self._placing:
            return
        self._placing = True
        while self._homeless:
            self._place_round(now)
        self._placing = False

    def _place_round(self, now: float) -> None:
        """The same for those whose worker was lost until now: who is handed back may find a parent gone, and that one more worker is."""
        waiting: list[Flight] = []
        in_vain: set[tuple[Pool, Need]] = set()  # nobody gets room meanwhile, and a pick that finds none looks at all workers
        while self._homeless:
            flight = self._homeless.popleft()
            if not flight.open:  # cancelled meanwhile
                continue
            asked = flight.pool, flight.need
            worker = self._pick(flight, now) if asked not in in_vain else None
            if worker is not None:
                self._dispatch(flight, worker, now)
            else:
                in_vain.add(asked)
                waiting.append(flight)
        for flight in reversed(waiting):  # each goes to the head: the last of them first, so that they keep their order
            if flight.open and not self._hand_back(flight, now):
                flight.pool.waiting.push(flight, front=True)
                if flight.pool.hopeless(flight.need):
                    self._look_after(flight.pool, now)

    def _hand_back(self, flight: Flight, now: float) -> bool:
        """The parent that sent it keeps the queue, and may know another way. Of an attempt that was spent here an error tells it: so goes
        what would wait here for nobody."""
        above = flight.client.above
        if above is None or not flight.slotted:
            return False
        if flight.attempts != flight.attempts_before:
            if flight.pool.has_hope(flight.need, flight.avoid):
                return False
            self.settle_unsent(flight, now, "worker_lost", none_left(flight))
            return True
        self._close(flight)
        above.busy(flight.rid, now)
        self._forget_idle(flight.client)
        return True

    # --- what a worker says of a flight

    def started(self, flight: Flight, now: float) -> None:
        """Its first chunk goes to the client: it can't be sent to another worker unseen any more, so its payload is let go."""
        flight.started = True
        flight.first_s = now
        self.held_bytes -= len(flight.payload)
        flight.payload = b""
        worker = flight.worker
        if worker is not None and (flight.on_trial or worker.hung_s is not None):
            worker.trials -= flight.on_trial
            flight.on_trial = False
            if worker.hung_s is not None:
                self.registry.steps(worker)
            self.feed(worker, now)

    def busy(self, flight: Flight, now: float) -> None:
        """Its worker has no slot after all: back to the head of the queue, with no attempt spent."""
        self.counters["busy"] += 1
        self._turned_away(flight, now)

    def _turned_away(self, flight: Flight, now: float) -> None:
        """Its worker, which stays, has let go of it before it began."""
        worker = self._release(flight)
        self.registry.refused(worker, flight.pool.model)
        if flight.ending is not None:
            self.settle_unsent(flight, now, flight.ending)
        else:
            self._homeless.append(flight)
        self.feed(worker, now)

    def lost_below(self, flight: Flight, attempts: int, now: float) -> bool:
        """The controller below that has it lost its worker, and has no other: it goes elsewhere, unseen. False where `attempts` is not more
        than before, or all that it has: then it ends."""
        worker = flight.worker
        if worker is None or flight.started or flight.ending is not None or not flight.slotted:
            return False
        if not flight.attempts < attempts < self.config.max_attempts:
            return False
        self.counters["redispatched"] += 1
        flight.attempts = attempts
        flight.avoid = flight.avoid | {worker.name}
        flight.need = flight.need._replace(trial=True)
        self._turned_away(flight, now)
        return True

    def settle(self, flight: Flight, now: float, outcome: str, last: bytes, code: int = 0, tokens: tuple[int, int] = (0, 0)) -> None:
        """It has ended: send its `last` message, close its books, and give its slot to who waits.

        Its client may read the message while the books are closed. What its send finds out waits for that, and a parent is told after it:
        either may come back here to end what else there is.
        """
        client = flight.client
        at_once = client.above is None and not (flight.told or client.gone)
        status = self.delivery.send(client, last) if at_once else SENT
        worker = self._release(flight) if flight.worker is not None else None
        if worker is not None and flight.slotted:
            flight.pool.waiting.rate.served(now - flight.dispatched_s)
        self._close(flight)
        if client.account is not None:
            client.account.charge(now, sum(tokens))
        if status != SENT:
            self.delivery.connection_failed(client.envelope[0], status, now)
        elif not (at_once or flight.told):
            self.delivery.last(flight, last, now, outcome, code, tokens)
        self._forget_idle(client)
        self.counters[ENDED.get(outcome, "ended: other")] += 1
        if self.reports_requests():
            flight.log(self._report, worker, now, outcome, code, tokens)
        if worker is not None:
            worker.finished += 1
            self.feed(worker, now)

    def _close(self, flight: Flight) -> None:
        client = flight.client
        flight.open = False
        del client.flights[flight.rid]
        self.open -= 1
        self.held_bytes -= len(flight.payload)
        if client.account is not None:
            client.account.in_flight -= 1
        if flight.timer is not None:
            flight.timer.cancel()
        if flight.cancel_timer is not None:
            flight.cancel_timer.cancel()

    def settle_unsent(self, flight: Flight, now: float, outcome: str, error: ZmqserveError | None = None) -> None:
        """End a flight that no worker has: with the error, as too late, or as cancelled."""
        if outcome == "deadline":
            error = too_late()
        if error is not None:
            self.settle(flight, now, outcome, error_message(flight.rid, error), error.code)
        else:
            self.settle(flight, now, outcome, cancelled_message(flight.rid))

    def give_up_worker(self, worker: Worker, why: str, now: float, *, clean: bool = False) -> None:
        """The registry has forgotten this worker: its unstarted flights go elsewhere, the others end as WorkerLost.

        One that left of its own will (`clean`) was not killed by what it ran, nor was one that was silent before it got the request
        and ever since (found dead by two controllers, it would count twice): that costs no attempt.
        """
        lost = list(worker.flights.values())
        for flight in lost:
            self._release(flight)
            flight.attempts += not (clean or worker.quiet(flight.dispatched_s))
            flight.avoid = flight.avoid | {worker.name}
            if flight.cancel_timer is not None:
                flight.cancel_timer.cancel()
            if flight.ending is not None or flight.client.gone:
                self.settle_unsent(flight, now, flight.ending or "client gone")
            elif flight.started or flight.attempts >= self.config.max_attempts:
                error = worker_lost(flight, worker.name, why, self.config.max_attempts, len(lost) - 1)
                self.settle_unsent(flight, now, "worker_lost", error)
            else:
                self.counters["redispatched"] += 1
                flight.need = flight.need._replace(trial=flight.slotted and flight.attempts > 0)
                self._homeless.append(flight)
        self._place_homeless(now)

    def fail_waiting(self, pool: Pool, needs: frozenset[Need], now: float) -> None:
        """Nobody came back who can do that: whoever waits for it goes back to the parent that sent it, or ends as NoWorker."""
        for need in pool.waiting.needs():  # one by one: a look for whose turn it is among all would cost each of them as much as all
            while need in needs and (flight := pool.waiting.head(frozenset((need,)))) is not None:
                pool.waiting.remove(flight)
                if self._hand_back(flight, now):
                    continue
                text = f"all workers of {pool.model} that could {need.verb} this are gone"
                self.settle_unsent(flight, now, "no_worker", NoWorker(text, retry_after_ms=1000, data={"model": pool.model}))

    def heed_aliases(self, pool: Pool) -> None:
        """Workers have come that do not know all of the model's names: what asks by one of these is not for them."""
        names, pool.unheeded = pool.unheeded, frozenset()
        if not names:
            return
        for client in self.clients.values():
            for flight in client.flights.values():
                if flight.pool is not pool or flight.alias not in names:
                    continue
                waits = flight.waiting
                if waits:
                    pool.waiting.remove(flight)
                flight.need = flight.need._replace(alias=flight.alias)
                if waits:
                    pool.waiting.push(flight)

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
        self.deadlines.expect_end(flight, worker, now)
        head = m.ControllerHead(m.CANCEL, worker.epoch, flight.client.number, flight.rid)
        if self._send_worker(worker.identity, m.encode(head), b"") == GONE:
            self._lose(worker, "connection lost", now)

    # --- books

    def _release(self, flight: Flight) -> Worker:
        """Take a flight off its worker."""
        worker, route = flight.worker, flight.route
        if worker is None or route is None:
            raise RuntimeError(f"{flight!r} is on no worker")
        flight.worker = flight.route = None
        del worker.flights[flight.client.number, flight.rid]
        worker.trials -= flight.on_trial
        flight.on_trial = False
        self.running -= 1
        flight.pool.running -= 1
        route.flights -= 1
        route.told -= flight.told
        if route.flights == 0:
            del self.routes[route.head]
        if flight.slotted:
            self.registry.give_back(worker, flight.pool.model)
        return worker

    def _forget_idle(self, client: Client) -> None:
        if not client.flights and not client.gone:
            self.clients.forget(client)
