"""Workers coming and going: registration, changed offers, heartbeats, stalls, draining, and giving a worker up. Pure, as broker.py."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial

from . import messages as m
from .access import UNREAD, Access
from .bounds import Offers, check_offer, check_routing_id, names_of
from .config import ControllerConfig
from .delivery import GONE, SENT
from .endings import BROKE_PROTOCOL, REFUSED, count_error
from .errors import MalformedMessage, ProtocolMismatch, RequestError, ZmqserveError
from .flight import Flight
from .flights import Flights
from .liveness import BEATS_PER_TTL, Agenda, Timer
from .pool import Pool
from .registry import Registry, Worker

DOUBLE_PATH_RETRY_MS = 10_000
"""When a controller below that can be reached by two ways may ask again: the other way may have gone by then."""
PROBE_S, PROBE_EACH_S = 0.02, 1e-4
"""Between two beats to everybody, when connections break; with many workers so much for each of them: strangers, too, connect and go."""
LEAST_WAIT_S = 0.001
"""Of a change that is put off: a bucket may seem to hold a little less than one when it is time for the next."""
MAX_TOLD = 10_000
"""Unknown workers remembered as told to register; each is told once per heartbeat, not once per message."""


class Membership:
    """Who is registered. `alive` and `free` are separate facts: a heartbeat never marks a worker ready."""

    def __init__(
        self,
        config: ControllerConfig,
        registry: Registry,
        flights: Flights,
        agenda: Agenda,
        *,
        controller_id: str,
        version: str,
        send_worker: Callable[[bytes, bytes, bytes], int],
        report: Callable[..., None],
        new_epoch: Callable[[], int],
        access: Access | None = None,
    ) -> None:
        self.drop_outbox: Callable[[bytes], object] = lambda _: None
        """Lets go of what waits for a worker."""
        self.config, self.registry, self.flights, self.agenda = config, registry, flights, agenda
        self.controller_id, self.version = controller_id, version
        self.counters = flights.counters
        self._send_worker, self._report, self._new_epoch = send_worker, report, new_epoch
        self._beat_s = config.ttl_s / BEATS_PER_TTL
        self._access = access
        self._offers = Offers(config)
        self._changing: dict[bytes | str, deque[Worker]] = {}
        self._told: dict[bytes, tuple[float, int, bool]] = {}
        self._probes = 0
        self._probe_timer: Timer | None = None
        self._readies = m.decoder(m.Ready)
        self._loads = m.decoder(m.Load)

    def __repr__(self) -> str:
        return f"Membership({self.registry!r})"

    def register(self, now: float, identity: bytes, payload: bytes, *, update: bool = False, user: str | None = None) -> None:
        """A worker says READY: take it in, or tell it why not. `update`: it repeats its epoch, so that only its offer is another."""
        known = self.registry.workers.get(identity)
        if user == UNREAD and known is not None:
            if not update:  # whose offer it is will be known when it says so once more
                self.fence(known, "it registered again", now, clean=True)
                return
            user = known.user
        owner = identity if user is None or user == UNREAD else user
        try:
            self._offers.check_size(len(payload))
            if update and known is not None and (known.change is not None or self._offers.wait_s(now, owner) > 0):
                self._put_off(now, owner, known, payload)
                return
            self._offers.take(now, owner)
            ready = m.read(self._readies, payload)
            names = names_of(ready)
            self._offers.charge(now, owner, len(names))
            if user is not None:
                check_routing_id(identity)
            key = self._access.worker(user, ready.name, ready.models) if self._access is not None and user is not None else ""
            check_offer(self.config, self.registry, ready, names, new=known is None)
            self._check_ready(now, identity, ready)
            if update and known is not None and ready.name != known.name:
                raise RequestError(f"worker {known.name} cannot become {ready.name}: a name is for as long as a registration")
        except ZmqserveError as error:
            self.counters["refused workers"] += 1
            count_error(self.counters, error)
            self._report("worker refused", why=error.message)
            refused = m.Refused(error.code, error.message, error.retry_after_ms)
            self._send_worker(identity, m.encode(m.ControllerHead(m.REFUSED, 0)), m.encode(refused))
            if known is not None:
                self.lose(known, f"refused: {error.message}", now, clean=True, told=REFUSED)
            return
        if known is not None and update:
            self._update(now, known, ready)
            return
        if known is not None:
            self.lose(known, "it registered again", now, clean=True)
        worker = Worker(identity, ready, self._new_epoch(), now, user, key)
        if not self._welcome(worker):
            return
        told = self._told.pop(identity, None)
        if (told is not None and told[2]) or (known is not None and known.stalled_s is not None):
            worker.stalled_s = worker.hung_s = now  # its engine hung a moment ago: no work before a heartbeat says that it steps
        self.registry.add(worker)
        worker.timers = [
            self.agenda.at(now + self._beat_s, lambda now: self._beat(worker, now)),
            self.agenda.at(worker.lease.ends_s, lambda now: self._check_lease(worker, now)),
        ]
        for pool in worker.pools:
            self.flights.heed_aliases(pool)
            self.look_after(pool, now)
        self._report(
            "worker came", worker=worker.name, state=worker.state, models=sorted(worker.cards), slots=worker.slots, speed=worker.speed
        )
        self.flights.feed(worker, now)

    def _put_off(self, now: float, owner: bytes | str, worker: Worker, payload: bytes) -> None:
        """It changes its offer more often than it may: the last of these changes comes into force when it may, after others of its key."""
        worker.lease.heard_s = now
        self.counters["offers put off"] += 1
        before, worker.change = worker.change, payload
        if before is not None:
            self._welcome(worker)  # that one will not come into force, and each is answered
            return
        queue = self._changing.get(owner)
        if queue is None:
            queue = self._changing[owner] = deque()
            self._catch_up_later(now, owner)
        queue.append(worker)

    def _catch_up_later(self, now: float, owner: bytes | str) -> None:
        self.agenda.at(now + max(LEAST_WAIT_S, self._offers.wait_s(now, owner)), partial(self._catch_up, owner))

    def _catch_up(self, owner: bytes | str, now: float) -> None:
        queue = self._changing[owner]
        while queue:
            if self._offers.wait_s(now, owner) > 0:
                self._catch_up_later(now, owner)
                return
            worker = queue.popleft()
            payload, worker.change = worker.change, None
            if payload is None or self.registry.workers.get(worker.identity) is not worker:
                continue
            self.register(now, worker.identity, payload, update=True, user=worker.user)
        del self._changing[owner]

    def _update(self, now: float, worker: Worker, ready: m.Ready) -> None:
        """It offers something else than before: what runs on it runs on, under the same epoch."""
        left = self.registry.update(worker, ready)
        worker.lease.heard_s = now
        if worker.lease.ends_s < worker.timers[1].when_s:
            worker.timers[1].cancel()
            worker.timers[1] = self.agenda.at(worker.lease.ends_s, lambda now: self._check_lease(worker, now))
        for pool in (*left, *worker.pools):
            self.flights.heed_aliases(pool)
            self.look_after(pool, now)
        self._report(
            "worker changed", worker=worker.name, state=worker.state, models=sorted(worker.cards), slots=worker.slots, speed=worker.speed
        )
        if self._welcome(worker):
            self.flights.feed(worker, now)
        else:
            self.lose(worker, "connection lost", now)

    def _welcome(self, worker: Worker) -> bool:
        welcome = m.WorkerWelcome(m.PROTOCOL, self.controller_id, int(self.config.ttl_s * 1000), self.version, self.config.message_bytes)
        return self._send_worker(worker.identity, m.encode(m.ControllerHead(m.WELCOME, worker.epoch)), m.encode(welcome)) == SENT

    def _check_ready(self, now: float, identity: bytes, ready: m.Ready) -> None:
        if ready.protocol != m.PROTOCOL:
            raise ProtocolMismatch(f"this controller speaks protocol {m.PROTOCOL}, worker {ready.name} {ready.protocol}")
        if ready.state not in ("loading", "ready"):
            raise MalformedMessage(f"Ready.state must be loading or ready, got {ready.state!r}")
        other = self.registry.by_name.get(ready.name)
        if other is not None and other.identity != identity:
            # A restarted worker comes back under its name before the loss of its former self was noticed.
            head = m.encode(m.ControllerHead(m.BEAT, other.epoch))
            if self._send_worker(other.identity, head, b"") == GONE:
                self.lose(other, "connection lost", now)
            else:
                raise RequestError(f"the name {ready.name} is taken by a worker that is connected: choose another", retry_after_ms=1000)
        if ready.controllers:
            self._check_path(identity, ready)

    def _check_path(self, identity: bytes, ready: m.Ready) -> None:
        """A request must reach a controller below by one way only, and never come back here."""
        if self.controller_id in ready.controllers:
            path = f"this controller ({self.controller_id}) is one of those below {ready.name}"
            raise RequestError(f"a loop of --parent links: {path}, and {ready.name} would be below this one")
        below = set(ready.controllers)
        for other in self.registry:
            twice = below.intersection(other.controllers)
            if twice and other.identity != identity:
                paths = f"by way of {other.name} and by way of {ready.name}"
                raise RequestError(f"two paths to controller {min(twice)}: {paths}; keep one", retry_after_ms=DOUBLE_PATH_RETRY_MS)

    def load(self, now: float, worker: Worker, payload: bytes) -> None:
        """A heartbeat."""
        try:
            load = m.read(self._loads, payload)
        except MalformedMessage as error:
            self.violation(now, worker.identity, error.message)
            return
        freed = worker.report(load)
        hung = load.running > 0 and load.step_age_ms > self.config.stall_s * 1000
        if hung and worker.hung_s is None:
            worker.hung_s = now
        elif worker.hangs and not hung and load.running > 0:
            self.registry.steps(worker)
        worker.hangs = hung
        if hung and worker.stalled_s is None:
            worker.stalled_s = worker.hung_s  # one that has made nothing since it hung before is given up the sooner
            self.counters["stalled"] += 1
            self._report("worker stalled", worker=worker.name, why=f"its engine has not stepped for {load.step_age_ms / 1000:.1f} s")
            self.registry.touch(worker)
        elif worker.stalled_s is not None and not hung and not any(flight.ending for flight in worker.flights.values()):
            self.unstall(worker)
            freed = True
        if worker.stalled_s is not None and now - worker.stalled_s > self.config.stall_s:
            self.fence(worker, "stalled for too long", now)
        elif freed:
            self.registry.touch(worker)
            self.flights.feed(worker, now)

    def let_go(self, worker: Worker, flight: Flight) -> None:
        """A stalled worker has ended this: if that was the last that it was told to cancel, it is none any more. Of an engine that hangs
        this tells nothing."""
        if worker.hung_s is None and not any(other.ending for other in worker.flights.values() if other is not flight):
            self.unstall(worker)

    def unstall(self, worker: Worker) -> None:
        """Its engine steps again, or hangs on nothing that anybody waits for."""
        worker.stalled_s = None
        self._report("worker recovered", worker=worker.name)
        self.registry.touch(worker)

    def start_draining(self, worker: Worker) -> None:
        """No new work for this worker."""
        if not worker.draining:
            worker.draining = True
            self._report("worker draining", worker=worker.name, running=worker.running)
            self.registry.touch(worker)

    def _beat(self, worker: Worker, now: float) -> None:
        worker.timers[0] = self.agenda.at(now + self._beat_s, lambda now: self._beat(worker, now))
        self._send_beat(worker, now)

    def _send_beat(self, worker: Worker, now: float) -> None:
        if self._send_worker(worker.identity, m.encode(m.ControllerHead(m.BEAT, worker.epoch)), b"") != SENT:
            self.lose(worker, "connection lost", now)

    def disconnected(self, now: float) -> None:
        """A worker's connection has broken: a beat to each of them finds out whose, and once more later, since the monitor may know of it
        before the socket does."""
        self._probes = 2
        if self._probe_timer is None:
            self._probe(now)

    def _probe(self, now: float) -> None:
        self._probe_timer = None
        if self._probes == 0:
            return
        self._probes -= 1
        self._probe_timer = self.agenda.at(now + max(PROBE_S, PROBE_EACH_S * len(self.registry.workers)), self._probe)
        for worker in list(self.registry):
            self._send_beat(worker, now)

    def _check_lease(self, worker: Worker, now: float) -> None:
        if worker.lease.expired(now):
            self.lose(worker, f"silent for {worker.lease.ttl_s} s", now)
        else:
            worker.timers[1] = self.agenda.at(worker.lease.ends_s, lambda now: self._check_lease(worker, now))

    def tell_to_register(self, now: float, identity: bytes, *, stalled: bool = False) -> None:
        """Answer a frame of a worker that is not registered. Its READY will repeat the number sent here as its epoch.

        `stalled`: its engine hangs, which a new registration does not mend.
        """
        told = self._told.get(identity)
        if told is not None and now < told[0]:
            return
        stalled = stalled or (told is not None and told[2])
        if len(self._told) >= MAX_TOLD:
            self._told = {known: entry for known, entry in self._told.items() if entry[0] > now}
            if len(self._told) >= MAX_TOLD:
                return
        number = self._new_epoch()
        self._told[identity] = (now + self._beat_s / 2, number, stalled)
        self._send_worker(identity, m.encode(m.ControllerHead(m.REREGISTER, number)), b"")

    def was_told(self, identity: bytes, number: int) -> bool:
        """Whether this number was sent to this peer and nobody else."""
        told = self._told.get(identity)
        return told is not None and told[1] == number

    # --- giving a worker up

    def violation(self, now: float, identity: bytes, what: str) -> None:
        """A worker broke the protocol: what it sent is dropped; one that is registered must register again."""
        self.counters["worker violations"] += 1
        worker = self.registry.workers.get(identity)
        if worker is not None:
            self.fence(worker, what, now, told=BROKE_PROTOCOL)

    def fence(self, worker: Worker, why: str, now: float, *, clean: bool = False, told: str = "") -> None:
        """Give up a worker that lives: its epoch is void from here on, and it must register again. `clean` and `told`: as for `lose`."""
        self.lose(worker, why, now, clean=clean, told=told)
        self.tell_to_register(now, worker.identity, stalled=worker.stalled_s is not None)

    def lose(self, worker: Worker, why: str, now: float, *, clean: bool = False, told: str = "") -> None:
        """Forget a worker and move or end its flights; `clean`: not for what it did or what ran on it. Harmless when it is forgotten.

        Clients whose requests end with it are `told` that, where `why` is not for them.
        """
        if self.registry.workers.get(worker.identity) is not worker:
            return
        pools = self.registry.remove(worker)
        self.drop_outbox(worker.identity)
        self.counters["workers left" if clean else "workers lost"] += 1
        self._report("worker gone", worker=worker.name, why=why, running=len(worker.flights))
        self.flights.give_up_worker(worker, told or why, now, clean=clean)
        for pool in pools:
            self.look_after(pool, now)

    def look_after(self, pool: Pool, now: float) -> None:
        """While nobody can answer what waits in a pool, that waits for a grace time only, and so does a pool without workers."""
        pool.note_orphans(now)
        since_s = min(pool.orphans.values(), default=None)
        if pool.empty_s is not None:
            since_s = pool.empty_s if since_s is None else min(since_s, pool.empty_s)
        due_s = None if since_s is None else since_s + self.config.orphan_grace_s
        timer = pool.orphan_timer
        if timer is not None and timer.when_s != due_s:
            timer.cancel()
            timer = None
        if timer is None and due_s is not None:
            timer = self.agenda.at(due_s, lambda now: self._nobody_came(pool, now))
        pool.orphan_timer = timer

    def _nobody_came(self, pool: Pool, now: float) -> None:
        """What has waited for its grace time ends, and so does a pool that was without workers for as long."""
        pool.orphan_timer = None
        pool.note_orphans(now)
        grace_s = self.config.orphan_grace_s
        self.flights.fail_waiting(pool, frozenset(need for need, since_s in pool.orphans.items() if since_s + grace_s <= now), now)
        if pool.empty_s is not None and pool.empty_s + grace_s <= now:
            if not (pool.running or pool.waiting):
                self.registry.discard(pool)
                return
            # What runs on a worker that has left this model may come back here, to wait for another; some may have just now, since who is
            # told of an end may be gone, and a worker found gone when more of that one's is cancelled.
            pool.empty_s = now
        self.look_after(pool, now)
