"""The worker's logic without threads or sockets: its slots are exact, and each request ends once, whatever happens in what order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from zmqserve import messages as m
from zmqserve.link import LOAD_GAP_S
from zmqserve.params import SamplingParams

from .fakes.desktop import FEW, Desktop, Peer

CONTROLLERS = 3
SLOTS = 2
each = st.integers(0, CONTROLLERS - 1)
some = st.integers(0, 7)


class WorkerMachine(RuleBasedStateMachine):
    """Controllers ask, cancel, forget, vanish and return, while the engine and the socket thread get on as far as they get."""

    @initialize(in_tasks=st.booleans())
    def start(self, in_tasks: bool) -> None:
        self.desktop = Desktop(CONTROLLERS, SLOTS, in_tasks=in_tasks)
        self.serial = count(1)
        self.desktop.tick()
        for peer in self.desktop.peers:
            self.register(peer)

    def register(self, peer: Peer) -> None:
        if peer.ready is not None:
            peer.welcome(self.desktop.loop.now, next(self.serial))

    def ask(self, peer: Peer, request: m.Request, client: int, deadline_ms: int | None = None) -> None:
        if peer.epoch:
            peer.open[client, request.rid] = 0
            peer.say(self.desktop.loop.now, m.REQUEST, m.encode(request), client=client, rid=request.rid, deadline_ms=deadline_ms)

    # --- what controllers do ----------------------------------------------------------------------

    @rule(
        which=each,
        client=st.integers(1, 2),
        model=st.sampled_from(["m", "few", "alias"]),
        tokens=st.integers(1, 6),
        stream=st.booleans(),
        deadline_ms=st.none() | st.integers(1, 60),
    )
    def generate(self, which: int, client: int, model: str, tokens: int, stream: bool, deadline_ms: int | None) -> None:
        params = SamplingParams(max_tokens=tokens)
        request = m.Generate(next(self.serial), model, stream=stream, prompt="a", params=params)
        self.ask(self.desktop.peers[which], request, client, deadline_ms)

    @rule(which=each, kind=st.sampled_from(["embed", "count", "unknown model", "garbage"]))
    def ask_something_else(self, which: int, kind: str) -> None:
        rid = next(self.serial)
        peer = self.desktop.peers[which]
        if kind == "embed":
            self.ask(peer, m.Embed(rid, "m", texts=["a"]), 1)
        elif kind == "count":
            self.ask(peer, m.CountTokens(rid, "m", prompt="a"), 1)
        elif kind == "unknown model":
            self.ask(peer, m.Generate(rid, "other", prompt="a"), 1)
        elif peer.epoch:
            peer.open[1, rid] = 0
            peer.say(self.desktop.loop.now, m.REQUEST, b"\xc1", client=1, rid=rid)

    @rule(which=each, nth=some)
    def cancel(self, which: int, nth: int) -> None:
        peer = self.desktop.peers[which]
        if peer.epoch and peer.open:
            client, rid = list(peer.open)[nth % len(peer.open)]
            peer.say(self.desktop.loop.now, m.CANCEL, client=client, rid=rid)

    @rule(which=each)
    def forget(self, which: int) -> None:
        if self.desktop.peers[which].connected:
            self.desktop.peers[which].forget(self.desktop.loop.now, next(self.serial))

    @rule(which=each)
    def welcome_anew(self, which: int) -> None:
        peer = self.desktop.peers[which]
        if peer.connected:
            peer.welcome(self.desktop.loop.now, next(self.serial))

    @rule(which=each)
    def disconnect(self, which: int) -> None:
        self.desktop.peers[which].disconnect(self.desktop.loop.now)

    @rule(which=each)
    def come_back(self, which: int) -> None:
        peer = self.desktop.peers[which]
        if not peer.connected:
            peer.connected = True
            peer.link.writable(self.desktop.loop.now)
            self.desktop.tick()
        self.register(peer)

    # --- how far the worker gets ------------------------------------------------------------------

    @rule()
    def the_engine_hears(self) -> None:
        self.desktop.take_calls()

    @rule()
    def the_engine_makes_a_step(self) -> None:
        self.desktop.loop.turn()

    @rule(most=st.integers(1, 3))
    def some_of_it_is_sent(self, most: int) -> None:
        self.desktop.pass_on(most)

    @rule(ms=st.integers(1, 50))
    def time_passes(self, ms: int) -> None:
        self.desktop.loop.now += ms / 1000
        self.desktop.tick()

    # --- what holds -------------------------------------------------------------------------------

    @invariant()
    def slots_are_never_overbooked(self) -> None:
        assert 0 <= self.desktop.workload.running <= SLOTS
        assert 0 <= self.desktop.workload.held["few"] <= FEW

    @invariant()
    def each_controllers_share_adds_up(self) -> None:
        shares = [self.desktop.workload.load(peer.link).yours for peer in self.desktop.peers]
        assert min(shares) >= 0
        assert sum(shares) <= self.desktop.workload.running

    def teardown(self) -> None:
        """Let everything run out: each request that somebody waits for has ended, and all slots are free."""
        if not hasattr(self, "desktop"):
            return
        desktop = self.desktop
        desktop.run_out()
        for peer in desktop.peers:
            if peer.connected and peer.epoch:
                assert not peer.open, f"{peer.name} still waits for {peer.open}"
        assert desktop.workload.running == 0
        assert not any(desktop.workload.held.values())
        assert all(lane is None or lane.yours == 0 for lane in desktop.workload.links.values())
        assert repr(desktop.desk) == "Desk(0 answers)"
        assert all(link.outbox_bytes == 0 for link in desktop.workload.links if link.epoch)
        desktop.workload.drain(None)
        assert desktop.workload.finished(desktop.loop.now, len(desktop.frames))


class TestWorker(WorkerMachine.TestCase):  # type: ignore[misc, valid-type]
    """Runs it."""

    settings = settings(max_examples=150, stateful_step_count=40)


@pytest.fixture(params=["tasks", "step loop"])
def desktop(request: pytest.FixtureRequest) -> Iterator[Desktop]:
    desktop = Desktop(2, SLOTS, in_tasks=request.param == "tasks")
    desktop.tick()
    for peer in desktop.peers:
        peer.welcome(desktop.loop.now, 7)
    desktop.tick()
    yield desktop
    desktop.desk.end()
    desktop.run_out()
    assert desktop.workload.running == 0


def ask(
    desktop: Desktop, peer: Peer, rid: int, tokens: int = 100, model: str = "m", deadline_ms: int | None = None, stream: bool = True
) -> None:
    peer.open[1, rid] = 0
    request = m.Generate(rid, model, stream=stream, prompt="a", params=SamplingParams(max_tokens=tokens))
    peer.say(desktop.loop.now, m.REQUEST, m.encode(request), client=1, rid=rid, deadline_ms=deadline_ms)
    desktop.take_calls()


def kinds(peer: Peer) -> list[int]:
    """What came since the last call, heartbeats and registrations left out."""
    heads, peer.left = peer.left, []
    return [head.kind for head in heads if head.kind not in (m.LOAD, m.READY)]


def test_a_cancelled_request_ends_within_one_step(desktop: Desktop) -> None:
    first = desktop.peers[0]
    ask(desktop, first, 1)
    turns = 5
    for _ in range(turns):
        desktop.loop.turn()
    first.say(desktop.loop.now, m.CANCEL, client=1, rid=1)
    desktop.take_calls()
    desktop.loop.turn()
    desktop.pass_on()
    (done,) = [head for head in first.left if head.kind == m.DONE]
    assert (done.outcome, done.completion_tokens) == ("cancelled", turns), "what was made before was sent, and nothing after it"
    assert kinds(first)[-1] == m.DONE
    assert desktop.workload.running == 0
    desktop.loop.turn()
    desktop.pass_on()
    assert kinds(first) == [], "the step that was due already makes nothing that is sent"


def test_a_request_that_is_cancelled_before_it_began_makes_nothing(desktop: Desktop) -> None:
    first = desktop.peers[0]
    ask(desktop, first, 1)
    first.say(desktop.loop.now, m.CANCEL, client=1, rid=1)
    desktop.take_calls()
    desktop.pass_on()
    assert kinds(first) == [m.DONE], "at once"
    desktop.loop.turn()
    desktop.pass_on()
    assert kinds(first) == []
    assert desktop.workload.running == 0


def test_nothing_is_kept_for_deadlines_of_what_has_ended(desktop: Desktop) -> None:
    first = desktop.peers[0]
    for rid in range(1, 100):
        ask(desktop, first, rid, 1, deadline_ms=86_400_000)
        desktop.run_out()
        desktop.loop.now += 0.005 * (rid % 5)
    assert desktop.loop.waiting <= 1, "some began in the same step as the one before them, some later"


def test_a_deadline_holds_for_who_is_left_of_those_that_had_it(desktop: Desktop) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1, 1, deadline_ms=1000)
    ask(desktop, other, 2, deadline_ms=1000)
    ask(desktop, first, 3, 1, deadline_ms=2000)
    desktop.loop.turn()
    desktop.loop.turn()
    desktop.pass_on()
    assert (kinds(first)[-1], desktop.workload.running) == (m.DONE, 1)
    desktop.loop.now += 1.02
    desktop.run_out()
    assert (kinds(other)[-1], desktop.workload.running) == (m.FAILED, 0)
    ask(desktop, first, 4, deadline_ms=1)
    desktop.loop.now += 0.02
    desktop.run_out()
    assert kinds(first) == [m.FAILED]


@pytest.mark.parametrize("how", ["cancelled", "its controller gone", "a count"])
def test_an_engine_that_hangs_is_no_younger_for_what_ends_without_it(desktop: Desktop, how: str) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1)
    desktop.loop.now += 20.0
    if how == "a count":
        other.open[1, 2] = 0
        other.say(desktop.loop.now, m.REQUEST, m.encode(m.CountTokens(2, "m", prompt="a")), client=1, rid=2)
        desktop.take_calls()
        count_task = desktop.loop.tasks.pop()
        while not count_task.ended:
            count_task.step()
    else:
        ask(desktop, other, 2)
        if how == "cancelled":
            other.say(desktop.loop.now, m.CANCEL, client=1, rid=2)
        else:
            other.disconnect(desktop.loop.now)
        desktop.take_calls()
    desktop.pass_on()
    assert desktop.workload.running == 1
    assert desktop.step_age_s() == 20.0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_an_engine_steps_with_each_piece_that_it_makes(desktop: Desktop, stream: bool) -> None:
    ask(desktop, desktop.peers[0], 1, stream=stream)
    for _ in range(3):
        desktop.loop.now += 20.0
        desktop.loop.turn()
        desktop.loop.turn()  # what was gathered leaves at the end of a turn
        assert desktop.step_age_s() == 0.0


def test_a_worker_whose_controller_takes_nothing_is_well_for_another_one(desktop: Desktop) -> None:
    first, other = desktop.peers

    def told_ms(peer: Peer) -> float:
        desktop.loop.now += 0.5
        peer.link.others_changed(desktop.loop.now)
        desktop.tick()
        assert peer.load is not None
        return peer.load.step_age_ms

    ask(desktop, first, 1)
    desktop.full.add(first.link)
    assert (told_ms(other), told_ms(other)) == (0.0, 0.0)
    ask(desktop, other, 2)
    assert (told_ms(other), told_ms(other)) == (500.0, 1000.0), "since it has something to make"
    desktop.full.clear()
    desktop.run_out()


@pytest.mark.parametrize("how", ["it takes again", "its connection breaks"])
def test_the_time_for_which_a_controller_took_nothing_is_not_told_when_it_is_over(desktop: Desktop, how: str) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1)
    desktop.full.add(first.link)
    desktop.tick()
    desktop.loop.now += 70.0
    desktop.tick()
    desktop.full.clear()
    if how == "its connection breaks":
        first.disconnect(desktop.loop.now)
    desktop.loop.now += LOAD_GAP_S
    other.link.others_changed(desktop.loop.now)
    desktop.tick()
    assert other.load is not None
    assert other.load.step_age_ms <= 1000 * LOAD_GAP_S + 0.1
    desktop.run_out()


def test_what_a_broken_connection_left_in_the_engine_and_on_the_way_never_leaves(desktop: Desktop) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1)
    ask(desktop, other, 2)
    desktop.loop.turn()
    desktop.loop.turn()
    first.disconnect(desktop.loop.now)
    assert desktop.workload.running == SLOTS, "they are free when they have really ended"
    desktop.take_calls()
    desktop.loop.turn()
    desktop.pass_on()
    assert kinds(first) == []
    assert kinds(other)[:1] == [m.FIRST]
    assert desktop.workload.running == 1
    desktop.loop.now += LOAD_GAP_S
    desktop.tick()
    assert other.load is not None
    assert (other.load.running, other.load.yours) == (1, 1)


def test_others_load_is_told_within_20_ms_and_decides_who_is_busy(desktop: Desktop) -> None:
    first, other = desktop.peers
    for rid in range(1, SLOTS + 1):
        ask(desktop, first, rid)
    desktop.loop.now += LOAD_GAP_S
    desktop.tick()
    assert other.load is not None
    assert (other.load.running, other.load.yours) == (SLOTS, 0)
    ask(desktop, other, 9)
    assert kinds(other) == [m.BUSY]
    first.say(desktop.loop.now, m.CANCEL, client=1, rid=1)
    desktop.take_calls()
    desktop.loop.turn()
    desktop.pass_on()
    desktop.loop.now += LOAD_GAP_S
    desktop.tick()
    assert (other.load.running, other.load.yours) == (SLOTS - 1, 0)
    ask(desktop, other, 10)
    assert kinds(other) == []


def refused(peer: Peer) -> list[int]:
    """The requests to which BUSY came since the last call."""
    heads, peer.left = peer.left, []
    return [head.rid for head in heads if head.kind == m.BUSY]


def test_a_model_with_fewer_slots_is_full_for_all_controllers_while_another_is_not(desktop: Desktop) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1, model="few")
    ask(desktop, other, 2, model="alias")
    ask(desktop, first, 3, model="few")
    assert (refused(first), refused(other)) == ([3], [2])
    ask(desktop, other, 4, tokens=1)
    desktop.run_out()
    assert refused(other) == []
    first.say(desktop.loop.now, m.CANCEL, client=1, rid=1)
    desktop.take_calls()
    desktop.loop.turn()
    ask(desktop, other, 5, model="few")
    assert refused(other) == [5], "a slot is free when the end leaves"
    desktop.pass_on()
    ask(desktop, other, 6, model="few")
    assert refused(other) == []


def test_what_takes_no_slot_or_cannot_be_read_is_not_counted_for_its_model(desktop: Desktop) -> None:
    first, _ = desktop.peers
    ask(desktop, first, 1, model="few")
    for rid, request in ((2, m.CountTokens(2, "few", prompt="a")), (3, [2, 3, b"few"])):
        first.open[1, rid] = 0
        first.say(desktop.loop.now, m.REQUEST, m.encode(request), client=1, rid=rid)
    desktop.run_out()
    ends = {head.rid: head.kind for head in first.left if head.kind in (m.DONE, m.FAILED, m.BUSY)}
    assert ends == {2: m.DONE, 3: m.FAILED}
    assert desktop.workload.held["few"] == 1


def test_a_drain_lets_the_rest_go_when_its_time_is_over(desktop: Desktop) -> None:
    first, other = desktop.peers
    ask(desktop, first, 1)
    desktop.workload.drain(2.0)
    ask(desktop, other, 2)
    assert kinds(other) == [m.DRAINING, m.BUSY]
    assert not desktop.workload.finished(desktop.loop.now, 0)
    assert desktop.workload.finished(desktop.loop.now + 2.0, 0)
    desktop.workload.drain(100.0)
    assert desktop.workload.finished(desktop.loop.now + 2.0, 0), "a drain is not prolonged by another"


def test_a_worker_that_was_taken_while_it_loaded_is_not_taken_for_ready() -> None:
    desktop = Desktop(1, SLOTS, in_tasks=False, loaded=False)
    (peer,) = desktop.peers
    desktop.tick()
    assert peer.ready is not None
    assert peer.ready.state == "loading"
    desktop.workload.announce(SLOTS)
    peer.welcome(desktop.loop.now, 7)
    assert desktop.times_taken == 0, "the controller has heard of the loading one"
    assert peer.ready is not None
    assert (peer.ready.state, peer.ready.slots) == ("ready", SLOTS)
    peer.welcome(desktop.loop.now, 7)
    assert desktop.times_taken == 1


def test_what_the_engine_has_not_begun_is_told_as_waiting_and_counted_once(desktop: Desktop) -> None:
    first, other = desktop.peers
    for rid in range(1, SLOTS + 1):
        ask(desktop, first, rid)
    for queued, waiting in ((1, 1), (50, SLOTS)):  # an engine may count several for a request
        desktop.queued = queued
        for peer, yours in ((first, SLOTS), (other, 0)):
            load = desktop.workload.load(peer.link)
            assert (load.running, load.waiting, load.yours) == (SLOTS - waiting, waiting, yours)
