"""Random clients, workers, faults and time against one Broker: its books agree at every step, and every request ends exactly once."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zmqserve import messages as m
from zmqserve.access import Access
from zmqserve.errors import ZmqserveError
from zmqserve.flight import Client, Envelope
from zmqserve.rules import parse_rules

from .fakes.keys import ALICE, BOB, GPU, GPU2, ROOT, Ring, access
from .fakes.network import Network, card
from .fakes.scripted import ScriptedClient, ScriptedWorker, Task

RIDS = 8
OFFERS = (
    [card("m", fingerprint="f1")],
    [card("m", fingerprint="f2", aliases=["alias"])],
    [card("m", fingerprint="f1"), card("n", verbs=["embed"])],
    [card("n"), card("m", verbs=["generate"])],
)
PLAIN = st.builds(m.Generate, rid=st.integers(1, RIDS), model=st.just("m"), prompt=st.just("hello"))
PARTICULAR = st.one_of(
    st.builds(
        m.Generate,
        rid=st.integers(1, RIDS),
        model=st.sampled_from(["m", "n", "alias", "nobody"]),
        priority=st.integers(-1, 1),
        deadline_ms=st.sampled_from([None, 100, 2500]),
        affinity=st.sampled_from([None, "a", "b"]),
        attempts=st.integers(0, 2),
        fingerprint=st.sampled_from([None, "f1", "f2"]),
    ),
    st.builds(m.Embed, rid=st.integers(1, RIDS), model=st.sampled_from(["m", "n"])),
    st.builds(m.CountTokens, rid=st.integers(1, RIDS), model=st.just("m"), deadline_ms=st.sampled_from([None, 300])),
)
WHO = st.integers(0, 3)
WHICH = st.integers(0, 5)


class BrokerMachine(RuleBasedStateMachine):
    """Rids are unique among clients, so that the broker's line for a request tells whose it is; a client may use one again."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()
        self.clients: list[ScriptedClient] = []
        self.workers: list[ScriptedWorker] = []
        self.present: list[ScriptedClient] = []
        self.untold: Counter[int] = Counter()

    @initialize(
        dispatch=st.sampled_from(["shortest_queue", "lottery"]),
        queue=st.sampled_from([2, 1000]),
        own=st.sampled_from([1, 1000]),
        attempts=st.integers(1, 3),
        offers=st.lists(st.tuples(st.sampled_from(OFFERS), st.integers(1, 3)), min_size=1, max_size=3),
    )
    def begin(self, dispatch: str, queue: int, own: int, attempts: int, offers: list[tuple[list[m.ModelCard], int]]) -> None:
        self.network = Network(
            dispatch=dispatch,
            queue_requests=queue,
            client_requests=own,
            max_attempts=attempts,
            default_deadline_s=20.0,
            stall_s=6.0,
            cancel_timeout_s=1.0,
            orphan_grace_s=2.0,
            access=self.access(),
        )
        self.count_untold()
        for envelope in ((b"\0one",), (b"\0two",), (b"\0proxy", b"a"), (b"\0proxy", b"b")):
            self.connect(*envelope)
        self.present = list(self.clients)
        for number, (cards, slots) in enumerate(offers):
            self.workers.append(self.network.worker(f"w{number}", *cards, slots=slots, user=self.worker_key(number)))

    def access(self) -> Access | None:
        """Whose keys are let in; None: nobody has any."""
        return None

    def client_key(self, envelope: Envelope) -> str | None:
        return None

    def worker_key(self, number: int) -> str | None:
        return None

    def count_untold(self) -> None:
        """A client that is let go of because nobody is there is not told of the ends of what it has open."""
        delivery = self.network.broker.flights.delivery
        detach = delivery.detach

        def counting(client: Client, now: float, why: str, error: ZmqserveError | None = None) -> None:
            if error is None and not client.gone:
                self.untold.update(rid for rid, flight in client.flights.items() if not flight.told)
            detach(client, now, why, error)

        delivery.detach = counting  # type: ignore[method-assign]

    def connect(self, *envelope: bytes) -> ScriptedClient:
        client = self.network.client(*envelope, user=self.client_key(envelope))
        self.clients.append(client)
        return client

    def send(self, who: int, request: m.Generate | m.Embed | m.CountTokens) -> None:
        client = self.present[who]
        client.request(msgspec.structs.replace(request, rid=request.rid + RIDS * self.clients.index(client)))

    # --- clients

    @rule(who=WHO, request=PLAIN)
    def ask(self, who: int, request: m.Generate) -> None:
        self.send(who, request)

    @rule(requests=st.lists(st.tuples(WHO, st.one_of(PLAIN, PARTICULAR)), min_size=2, max_size=8))
    def ask_in_a_burst(self, requests: list[tuple[int, m.Generate | m.Embed | m.CountTokens]]) -> None:
        for who, request in requests:
            self.send(who, request)

    @rule(who=WHO, rid=st.integers(1, RIDS))
    def cancel(self, who: int, rid: int) -> None:
        self.present[who].cancel(rid + RIDS * self.clients.index(self.present[who]))

    @rule(ttl_ms=st.sampled_from([500, 3000]), everybody=st.booleans(), who=WHO)
    def ping(self, ttl_ms: int, everybody: bool, who: int) -> None:
        for client in self.present if everybody else [self.present[who]]:
            client.send(m.Ping(ttl_ms, [1, 2]))

    @rule(who=WHO, how=st.sampled_from(["goes", "does not read", "babbles"]))
    def client_fails(self, who: int, how: str) -> None:
        client = self.present[who]
        if how == "goes":  # with all on its connection; new ones come
            connection = client.envelope[0]
            self.network.gone.add(connection)
            new = b"\0new%d" % len(self.clients)
            for place, other in enumerate(self.present):
                if other.envelope[0] == connection:
                    self.present[place] = self.connect(new, *other.envelope[1:])
        elif how == "babbles":
            client.send(b"\x92\x07" + bytes([who]))
        else:
            self.network.full ^= {client.envelope[0]}

    # --- workers

    def living(self) -> list[ScriptedWorker]:
        return [worker for worker in self.workers if worker.identity not in self.network.gone]

    def tasks(self) -> list[Task]:
        return [task for worker in self.living() for task in worker.tasks]

    @rule(
        name=st.integers(0, 3), cards=st.sampled_from(OFFERS), slots=st.integers(0, 3), state=st.sampled_from(["ready", "ready", "loading"])
    )
    def worker_comes(self, name: int, cards: list[m.ModelCard], slots: int, state: str) -> None:
        if len(self.living()) < 5:
            self.workers.append(
                self.network.worker(f"w{name}", *cards, slots=slots, speed=float(1 + name), state=state, user=self.worker_key(name))
            )

    @rule(which=WHICH, others=st.integers(0, 3), waiting=st.integers(0, 1), step_age_ms=st.sampled_from([0.0, 0.0, 7000.0]))
    def worker_beats(self, which: int, others: int, waiting: int, step_age_ms: float) -> None:
        for worker in self.living()[which : which + 1]:
            own = len(worker.tasks)
            worker.load(own + others, waiting, own, step_age_ms)

    @rule(
        which=WHICH,
        how=st.sampled_from(["dies", "dies", "does not read", "registers again", "says BYE", "drains", "breaks the protocol", "forges"]),
        slots=st.integers(0, 3),
    )
    def worker_fails(self, which: int, how: str, slots: int) -> None:
        for worker in self.living()[which : which + 1]:
            if how == "dies":
                worker.die()
            elif how == "does not read":
                self.network.full ^= {worker.identity}
            elif how == "registers again":
                told = worker.told()
                worker.ready(worker.epoch if worker.is_registered() or not told else told[-1], state="ready", slots=slots)
            elif how == "says BYE":
                worker.say(m.BYE)
            elif how == "drains":
                worker.say(m.DRAINING)
            elif how == "breaks the protocol":
                worker.say(m.LOAD, b"\xc1")
            else:
                done = m.encode(m.Done(1, 0, ["stop"], m.Usage(0, 0), m.Timings("")))
                worker.say(m.DONE, done, epoch=worker.epoch + 1, certain=False, client=1, rid=1)

    @rule(
        steps=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["chunk", "chunk", "done", "failed", "busy", "cancelled"])), max_size=6)
    )
    def workers_answer(self, steps: list[tuple[int, str]]) -> None:
        for number, how in steps:
            tasks = self.tasks()
            if not tasks:
                return
            task = tasks[number % len(tasks)]
            if how == "chunk":
                if task.seq:
                    task.more()
                else:
                    task.first()
            elif how == "done":
                task.done()
            elif how == "failed":
                task.failed()
            elif how == "busy":
                task.busy()
            elif task.cancelled:
                task.done("cancelled")

    @rule()
    def a_connection_breaks(self) -> None:
        self.network.broker.members.disconnected(self.network.now)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.1, 2.5]), beating=st.booleans())
    def time_passes(self, seconds: float, beating: bool) -> None:
        self.network.advance(seconds)
        for worker in self.living() if beating else ():
            worker.load()

    # --- what must hold

    @invariant()
    def books_agree(self) -> None:
        self.network.check()

    @invariant()
    def no_request_ends_twice(self) -> None:
        for client in self.clients:
            for rid, asked in client.asked.items():
                assert len(client.ends(rid)) <= asked
                if asked == 1:
                    seqs = [chunk.seq for chunk in client.got if isinstance(chunk, m.Chunk) and chunk.rid == rid]
                    assert seqs == list(range(len(seqs)))

    def teardown(self) -> None:
        network = self.network
        for _ in range(60):
            for task in self.tasks():
                task.done("cancelled" if task.cancelled else "stop")
            for worker in self.living():
                worker.load()
            network.advance(0.5)
            network.check()
        for client in self.clients:
            assert client.envelope not in network.broker.flights.clients
            if client.envelope[0] not in network.gone:
                for rid, asked in client.asked.items():
                    assert len(client.ends(rid)) + self.untold[rid] == asked, (rid, client.ends(rid))
        assert not network.broker.flights.routes
        assert not network.broker.flights.running


RULES = (
    "",
    "[defaults.client]\nrequests_in_flight = 2\npriority = -1",
    "[keys.alice]\nrequests_per_s = 2\ntokens_per_s = 3\n[keys.bob]\ndeny = ['n:*', 'alias:*']\n[keys.gpu]\nmodels = ['m']",
    "[defaults.client]\nallow = ['m:generate', '*:embed']\nrequests_in_flight = 1\n[keys.gpu2]\nnames = ['w1']",
)


class KeyedMachine(BrokerMachine):
    """The same where all have keys, which come and go, and rules that change: what a key's account counts is what is open."""

    def access(self) -> Access | None:
        return access(RULES[1])

    def client_key(self, envelope: Envelope) -> str | None:
        return {b"\0one": ALICE, b"\0two": BOB}.get(envelope[0], ROOT if len(self.clients) % 3 == 0 else ALICE)

    def worker_key(self, number: int) -> str | None:
        return (GPU, GPU2)[number % 2]

    @rule(revoked=st.sets(st.sampled_from([ALICE, BOB, GPU, GPU2]), max_size=2), rules=st.sampled_from([None, *RULES]))
    def keys_change(self, revoked: set[str], rules: str | None) -> None:
        keys = Ring().without(*revoked)
        self.network.broker.keys_changed(self.network.now, keys, None if rules is None else parse_rules(rules, ""))
        users = {worker.user for worker in self.network.broker.registry}
        assert users <= keys.workers.keys()

    @rule(who=WHO)
    def routing_id_is_taken(self, who: int) -> None:
        """By one with another key, after its owner has gone unnoticed."""
        client = self.present[who]
        client.user = BOB if client.user != BOB else ALICE
        client.send(m.Hello(m.PROTOCOL))


for machine in (BrokerMachine, KeyedMachine):
    machine.TestCase.settings = settings(
        max_examples=250, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.timeout(300)
class TestBrokerMachine(BrokerMachine.TestCase):  # type: ignore[misc, valid-type]
    pass


@pytest.mark.timeout(300)
class TestKeyedMachine(KeyedMachine.TestCase):  # type: ignore[misc, valid-type]
    pass
