"""ControllerLink, fed with time and messages: no socket, no thread."""

from __future__ import annotations

import errno
from itertools import pairwise
from random import Random

import pytest

from zmqserve import messages as m
from zmqserve.link import FRESH_SOCKET_S, LOAD_GAP_S, SETTLE_S, ControllerLink

READY = m.Ready(m.PROTOCOL, "w", "echo", "ready", [], 4, 1.0, 3000)
heads = m.decoder(m.WorkerHead)


class Host:
    """Records what the link asks for; `busy` refuses requests.

    `connected` is whether the pipe takes messages, `connects` whether a fresh one does; `exhausted`: there is no fresh one.
    """

    def __init__(self, endpoint: str = "tcp://c:1") -> None:
        self.now = 100.0
        self.busy = False
        self.connected = True
        self.connects = False
        self.exhausted = False
        self.sent: list[m.WorkerHead] = []
        self.payloads: list[bytes] = []
        self.events: list[object] = []
        self.link = ControllerLink(endpoint, self, self.send, ttl_s=3.0, random=Random(1), now=self.now)

    def send(self, head: bytes, payload: bytes) -> bool:
        if self.connected:
            self.sent.append(heads.decode(head))
            self.payloads.append(payload)
        return self.connected

    def ready(self) -> m.Ready:
        return READY

    def load(self, link: ControllerLink) -> m.Load:
        return m.Load(2, 0, 1)

    def offer(self, link: ControllerLink, head: m.ControllerHead, payload: bytes) -> bool:
        self.events.append(("offer", head.client, head.rid, payload))
        return not self.busy

    def cancel(self, link: ControllerLink, client: int, rid: int) -> None:
        self.events.append(("cancel", client, rid))

    def abort(self, link: ControllerLink) -> None:
        self.events.append("abort")

    def drain(self, grace_s: float | None) -> None:
        self.events.append(("drain", grace_s))

    def fresh_socket(self, link: ControllerLink) -> None:
        if self.exhausted:
            self.events.append("no socket")
            raise OSError(errno.EMFILE, "too many")
        self.events.append("fresh socket")
        self.connected |= self.connects

    def changed(self, link: ControllerLink) -> None:
        self.events.append(f"{link.state}{' silent' if link.silent else ''}")

    # --- the test's side

    def take(self) -> list[int]:
        """Kinds sent since the last take; forgets the events too."""
        kinds = [head.kind for head in self.sent]
        self.sent.clear()
        self.payloads.clear()
        self.events.clear()
        return kinds

    def hear(self, kind: int, epoch: int = 7, payload: bytes = b"", **head: int) -> None:
        self.link.received(self.now, m.encode(m.ControllerHead(kind, epoch, **head)), payload)

    def welcome(self, epoch: int = 7, ttl_ms: int = 3000) -> None:
        self.hear(m.WELCOME, epoch, m.encode(m.WorkerWelcome(m.PROTOCOL, "c", ttl_ms)))

    def run(self, seconds: float, *, beats: bool = False) -> None:
        """Let time pass, calling tick when it asks for it; with `beats` the controller beats each second."""
        ends_s = self.now + seconds
        beat_s = self.now
        while True:
            if beats and self.now >= beat_s:
                beat_s += 1.0
                self.hear(m.BEAT, self.link.epoch)
            due_s = self.link.tick(self.now)
            following = min(due_s, beat_s if beats else due_s)
            assert following > self.now, "tick asks to be called again at once, for ever"
            if following > ends_s:
                break
            self.now = following
        self.now = ends_s


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def registered(host: Host) -> Host:
    host.run(0)
    host.welcome()
    host.run(0)
    assert host.take() == [m.READY, m.LOAD]
    assert host.link.known
    return host


def test_registers_and_asks_again_each_second_until_welcomed(host: Host) -> None:
    host.run(2.5)
    assert [head.kind for head in host.sent] == [m.READY] * 3
    assert m.decoder(m.Ready).decode(host.payloads[0]) == READY
    host.welcome()
    assert host.link.state == "registered"
    assert host.link.epoch == 7
    host.take()
    host.run(0.9)
    assert host.take() == [m.LOAD], "what others have taken"


def test_beats_three_times_per_ttl_with_its_epoch(registered: Host) -> None:
    registered.run(3.5, beats=True)
    assert [(head.kind, head.epoch) for head in registered.sent] == [(m.LOAD, 7)] * 3
    assert m.decoder(m.Load).decode(registered.payloads[0]) == m.Load(2, 0, 1)


def test_says_at_once_that_others_load_changed_but_not_more_often_than_every_20_ms(registered: Host) -> None:
    for _ in range(90):
        registered.link.others_changed(registered.now)
        registered.link.tick(registered.now)
        registered.now += 0.001
    assert len(registered.take()) == 0.090 // LOAD_GAP_S


def test_offers_cancels_and_drains(registered: Host) -> None:
    registered.hear(m.REQUEST, payload=b"x", client=3, rid=5)
    registered.hear(m.CANCEL, client=3, rid=5)
    registered.hear(m.CANCEL, client=3, rid=5)
    registered.hear(m.DRAIN, deadline_ms=1500)
    registered.hear(m.DRAIN)
    assert registered.events == [("offer", 3, 5, b"x"), ("cancel", 3, 5), ("cancel", 3, 5), ("drain", 1.5), ("drain", None)]
    assert registered.take() == []


def test_a_request_without_a_slot_is_answered_busy(registered: Host) -> None:
    registered.busy = True
    registered.hear(m.REQUEST, client=3, rid=5)
    assert registered.sent == [m.WorkerHead(m.BUSY, 7, 3, 5)]


def test_frames_of_another_epoch_are_dropped_and_counted(registered: Host) -> None:
    registered.hear(m.REQUEST, epoch=6, client=3, rid=5)
    registered.hear(m.CANCEL, epoch=0, client=3, rid=5)
    registered.link.post(6, m.more_head(6, 1), b"late")
    assert registered.events == []
    assert registered.take() == []
    assert registered.link.stale_frames == 3


def test_nothing_is_taken_before_the_welcome(host: Host) -> None:
    host.run(0)
    host.hear(m.REQUEST, epoch=0, client=1, rid=1)
    assert host.events == []
    assert host.link.stale_frames == 1


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xc1",
        b"\x91" * 100_000,
        m.encode((m.REQUEST,)),
        m.encode((m.REQUEST, 7, -1)),
        m.encode((250, 7)),
        m.encode((m.WELCOME, 9)),
        m.encode((m.REQUEST, 7, 1, 0)),
    ],
)
def test_garbage_is_counted_and_harms_nothing(registered: Host, head: bytes) -> None:
    registered.link.received(registered.now, head, b"\xc1")
    assert registered.events == []
    assert registered.link.bad_frames == 1
    assert (registered.link.state, registered.link.epoch) == ("registered", 7)


def test_a_new_welcome_aborts_what_ran_under_the_old_epoch(registered: Host) -> None:
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.welcome(epoch=8)
    assert "abort" in registered.events
    registered.link.post(7, m.more_head(7, 1), b"b")
    registered.link.post(8, m.more_head(8, 1), b"c")
    assert registered.payloads == [b"a", b"c"]


def test_what_is_announced_is_taken_in_place_and_aborts_nothing(registered: Host) -> None:
    registered.link.announce()
    registered.link.announce()
    assert registered.take() == [m.READY, m.READY]
    registered.welcome(epoch=7)
    known = [registered.link.known]
    registered.welcome(epoch=7)
    known.append(registered.link.known)
    assert known == [False, True], "after the first the second is still on its way"
    assert registered.events == ["registered", "registered"]
    assert (registered.link.state, registered.link.epoch) == ("registered", 7)


def test_of_many_changes_that_the_pipe_does_not_take_only_the_last_is_told(registered: Host) -> None:
    registered.connected = False
    for _ in range(50):
        registered.link.announce()
    assert registered.link.outbox_bytes == 0
    registered.connected = True
    registered.link.writable(registered.now)
    assert registered.take() == [m.READY]


def test_a_change_waits_until_a_silent_controller_is_heard_again(registered: Host) -> None:
    registered.run(3.5)
    registered.take()
    registered.link.announce()
    assert registered.take() == []
    registered.hear(m.BEAT)
    assert registered.take() == [m.READY]


def test_reregister_aborts_and_is_answered_with_its_own_number(registered: Host) -> None:
    registered.hear(m.REREGISTER, epoch=55)
    assert registered.events == ["abort", "registering"]
    assert registered.sent == [m.WorkerHead(m.READY, 55)]
    registered.welcome(epoch=8)
    assert registered.link.epoch == 8


def test_refused_for_now_tries_again_when_told(host: Host) -> None:
    host.run(0)
    host.take()
    host.hear(m.REFUSED, epoch=0, payload=m.encode(m.Refused(40000, "name taken", 500)))
    assert host.events[-1] == "registering"
    host.run(0.4)
    assert host.take() == []
    host.run(0.2)
    assert host.take() == [m.READY]
    host.hear(m.WELCOME, epoch=7, payload=m.encode(m.WorkerWelcome(m.PROTOCOL, "c", 3000)))
    assert m.READY not in host.take()  # each of the two was answered


def test_a_controller_that_refused_for_now_is_not_silent_meanwhile(host: Host) -> None:
    host.run(0)
    host.hear(m.REFUSED, epoch=0, payload=m.encode(m.Refused(40000, "two paths", 10_000)))
    host.take()
    host.run(9.9)
    assert host.events == []
    assert host.take() == []
    host.run(0.2)
    assert host.take() == [m.READY]
    host.run(3.0)
    assert "registering silent" in host.events


def test_refused_for_good_says_nothing_more(host: Host) -> None:
    host.run(0)
    host.take()
    host.hear(m.REFUSED, epoch=0, payload=m.encode(m.Refused(40103, "no")))
    assert host.events[-1] == "refused"
    assert host.link.refusal == m.Refused(40103, "no")
    host.run(100)
    host.welcome()
    assert host.take() == []
    assert host.link.state == "refused"


def test_after_a_refusal_for_good_it_registers_on_a_fresh_connection_when_it_is_told_to(registered: Host) -> None:
    registered.hear(m.REFUSED, epoch=0, payload=m.encode(m.Refused(40103, "no")))
    registered.link.disconnected(registered.now)
    registered.run(100)
    registered.take()
    registered.link.ask_again(registered.now)
    registered.run(FRESH_SOCKET_S[0] - 0.1)
    assert (registered.take(), registered.link.state) == ([], "registering")
    registered.run(FRESH_SOCKET_S[1] - FRESH_SOCKET_S[0] + 0.1)
    assert "fresh socket" in registered.events
    assert not any("silent" in str(event) for event in registered.events)
    assert registered.sent[0] == m.WorkerHead(m.READY, 0)
    registered.welcome(epoch=9)
    assert (registered.link.state, registered.link.refusal) == ("registered", None)


def test_a_link_that_was_not_refused_asks_nothing_again(registered: Host) -> None:
    registered.link.ask_again(registered.now)
    registered.run(5, beats=True)
    assert (registered.link.state, registered.link.epoch) == ("registered", 7)
    assert "fresh socket" not in registered.events


def test_a_controller_of_another_protocol_is_refused_by_the_worker(host: Host) -> None:
    host.run(0)
    host.hear(m.WELCOME, 7, m.encode(m.WorkerWelcome(2, "c", 3000)))
    assert host.link.state == "refused"
    assert host.link.refusal is not None
    assert "protocol 2" in host.link.refusal.why


def test_silence_holds_frames_back_and_a_word_lets_them_go_in_order(registered: Host) -> None:
    registered.run(3.5)
    assert registered.events == ["registered silent"]
    registered.take()
    for payload in (b"a", b"b"):
        registered.link.post(7, m.more_head(7, 1), payload)
    assert registered.link.outbox_bytes
    assert registered.take() == []
    registered.hear(m.BEAT)
    assert registered.payloads == [b"a", b"b"]
    assert registered.events == ["registered"]
    assert registered.link.outbox_bytes == 0


def test_silence_for_two_ttls_asks_for_fresh_sockets_at_least_every_4_s(registered: Host) -> None:
    start_s = registered.now
    asked: list[float] = []
    registered.fresh_socket = lambda link: asked.append(registered.now)  # type: ignore[method-assign]
    registered.run(120)
    assert asked[0] == pytest.approx(start_s + 6.0)
    gaps = [after - before for before, after in pairwise(asked)]
    assert len(gaps) >= 28
    assert all(FRESH_SOCKET_S[0] <= gap <= FRESH_SOCKET_S[1] for gap in gaps)
    assert len(set(gaps)) > 20
    registered.welcome(epoch=9)
    assert registered.link.state == "registered"


def test_a_silent_controller_is_kept_while_there_is_no_fresh_socket_and_may_come_back_on_the_old_one(registered: Host) -> None:
    registered.exhausted = True
    registered.run(30)
    assert 6 <= registered.events.count("no socket") <= 13
    assert registered.link.epoch == 7
    assert "abort" not in registered.events
    registered.hear(m.BEAT)
    assert (registered.link.state, registered.link.silent) == ("registered", False)
    registered.run(8)
    registered.exhausted = False
    registered.run(FRESH_SOCKET_S[1])
    fresh = registered.events.index("fresh socket")
    assert registered.events[fresh:][:3] == ["fresh socket", "abort", "registering silent"]


def test_a_controller_that_takes_too_little_is_given_up_at_once_and_its_connection_in_the_next_tick(registered: Host) -> None:
    registered.link.give_up(registered.now)
    assert registered.events == ["abort", "registering"], "whoever reads the connection now may go on with it"
    registered.hear(m.REQUEST, client=1, rid=1)
    assert registered.events == ["abort", "registering"]
    registered.run(0)
    assert registered.events == ["abort", "registering", "fresh socket", "abort"]
    assert registered.sent == [m.WorkerHead(m.READY, 0)]
    registered.run(0.5)
    assert registered.events.count("fresh socket") == 1


def test_a_controller_that_is_given_up_gets_no_word_on_its_old_connection(registered: Host) -> None:
    registered.link.give_up(registered.now)
    registered.link.writable(registered.now)
    registered.run(0)
    assert registered.sent == [m.WorkerHead(m.READY, 0)]


def test_a_connection_that_was_given_up_is_used_on_where_there_is_no_other(registered: Host) -> None:
    registered.exhausted = True
    registered.link.give_up(registered.now)
    registered.run(2 * SETTLE_S)
    assert registered.events == ["abort", "registering", "no socket"]
    assert registered.sent == [m.WorkerHead(m.READY, 0)]
    registered.welcome(epoch=8)
    registered.run(5, beats=True)
    assert registered.link.state == "registered"


def test_a_link_that_drains_lets_go_of_a_controller_that_takes_too_little(registered: Host) -> None:
    registered.link.drain()
    registered.take()
    registered.link.give_up(registered.now)
    registered.run(100)
    assert registered.events.count("fresh socket") == 1
    assert registered.take() == []


def test_an_absent_controller_needs_no_fresh_socket_and_is_greeted_when_it_is_back(registered: Host) -> None:
    registered.connected = False
    registered.run(60)
    assert registered.link.blocked
    assert "fresh socket" not in registered.events
    registered.connected = True
    registered.take()
    registered.link.writable(registered.now)
    registered.link.tick(registered.now)
    assert registered.take() == [m.LOAD]
    registered.hear(m.REREGISTER, epoch=0)
    assert registered.take() == [m.READY]


def test_a_broken_connection_ends_what_ran_for_it_and_is_registered_again_when_it_is_back(registered: Host) -> None:
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.take()
    registered.link.disconnected(registered.now)
    assert registered.events == ["abort", "registering"]
    registered.link.post(7, m.more_head(7, 1), b"late")
    registered.connected = False
    registered.run(30)
    assert registered.link.blocked
    assert "fresh socket" not in registered.events
    registered.connected = True
    registered.link.writable(registered.now)
    registered.link.tick(registered.now)
    assert registered.sent == [m.WorkerHead(m.READY, 0)], "nothing of the former registration"
    registered.welcome(epoch=8)
    assert registered.link.state == "registered"


def test_a_pipe_that_is_about_to_go_is_given_no_registration(registered: Host) -> None:
    """Just after the break it still takes messages, and full it is no more."""
    registered.connected = False
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.connected = True
    registered.link.disconnected(registered.now)
    assert not registered.link.blocked
    registered.run(0.9 * SETTLE_S)
    assert registered.take() == []
    registered.run(0.2 * SETTLE_S)
    assert registered.take() == [m.READY]


def test_a_registration_that_broke_off_is_made_again_at_once(host: Host) -> None:
    host.run(0)
    host.take()
    host.link.disconnected(host.now)
    host.run(2 * SETTLE_S)
    assert host.take() == [m.READY]


def test_a_link_that_drains_or_is_closed_lets_the_connection_break(registered: Host) -> None:
    registered.link.drain()
    registered.take()
    registered.link.disconnected(registered.now)
    registered.run(10)
    assert registered.take() == []
    registered.link.close()
    registered.link.disconnected(registered.now)
    assert registered.link.state == "closed"
    assert registered.take() == []


def test_an_inproc_pipe_that_broke_is_replaced_after_two_missed_beats_and_then_left_alone() -> None:
    host = Host("inproc://c")
    host.run(0)
    host.welcome()
    host.run(5, beats=True)
    host.connected = False
    host.run(1.9)
    assert "fresh socket" not in host.events, "it may be a full pipe"
    host.take()
    host.connects = True
    host.run(0.2)
    assert host.events == ["fresh socket", "abort", "registering"]
    assert host.take() == [m.READY]
    host.run(60)
    assert "fresh socket" not in host.events, "it is connected when somebody binds"
    host.welcome(epoch=9)
    assert host.link.state == "registered"


def test_a_full_inproc_pipe_of_a_controller_that_beats_is_kept() -> None:
    host = Host("inproc://c")
    host.run(0)
    host.welcome()
    host.connected = False
    host.run(20, beats=True)
    assert "fresh socket" not in host.events


def test_what_the_controller_takes_as_one_message_comes_with_its_welcome(host: Host) -> None:
    host.run(0)
    assert host.link.message_bytes == 0
    host.hear(m.WELCOME, 7, m.encode(m.WorkerWelcome(m.PROTOCOL, "c", 3000, message_bytes=4096)))
    assert host.link.message_bytes == 4096
    host.welcome(epoch=8)
    assert host.link.message_bytes == 0


def test_a_full_pipe_keeps_the_order(registered: Host) -> None:
    registered.connected = False
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.connected = True
    registered.link.post(7, m.more_head(7, 1), b"b")
    assert registered.take() == []
    registered.link.writable(registered.now)
    assert registered.payloads == [b"a", b"b"]
    assert not registered.link.blocked


def test_a_heartbeat_that_finds_room_lets_what_waits_follow(registered: Host) -> None:
    registered.connected = False
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.connected = True
    registered.run(1.0, beats=True)
    assert registered.take() == [m.LOAD, m.MORE]
    assert registered.link.outbox_bytes == 0


def test_what_waited_for_a_lost_registration_is_dropped(registered: Host) -> None:
    registered.connected = False
    registered.link.post(7, m.more_head(7, 1), b"a")
    registered.connected = True
    registered.welcome(epoch=8)
    registered.link.writable(registered.now)
    assert registered.take() == []


def test_a_process_that_was_stopped_does_not_take_its_controller_for_dead(registered: Host) -> None:
    registered.run(0)
    registered.now += 60
    registered.link.tick(registered.now)
    assert registered.events == []
    assert registered.take() == [m.LOAD]


def test_silence_is_noticed_by_a_worker_that_beats_less_often_than_its_controller(host: Host) -> None:
    host.run(0)
    host.welcome(ttl_ms=300)
    host.run(2)
    assert host.link.silent


def test_announce_waits_for_the_welcome(host: Host) -> None:
    host.run(0)
    assert host.take() == [m.READY]
    host.link.announce()
    assert host.take() == []
    host.welcome()
    assert host.sent == [m.WorkerHead(m.READY, 7)]
    host.take()
    host.welcome(epoch=7)
    assert host.link.known


def test_a_draining_link_says_so_once_and_does_not_register_again(registered: Host) -> None:
    registered.link.drain()
    registered.link.drain()
    assert registered.take() == [m.DRAINING]
    registered.hear(m.REREGISTER, epoch=0)
    registered.run(10)
    assert registered.take() == []


def test_draining_that_the_pipe_does_not_take_is_no_answer_to_wait_for_and_is_said_later(registered: Host) -> None:
    registered.connected = False
    registered.link.drain()
    assert registered.link.outbox_bytes == 0
    registered.connected = True
    registered.link.writable(registered.now)
    assert registered.take() == [m.DRAINING]


def test_an_announcement_that_was_lost_with_its_registration_is_not_waited_for(registered: Host) -> None:
    registered.link.announce()
    registered.hear(m.REREGISTER, epoch=55)
    registered.welcome(epoch=8)
    assert registered.link.known, "the READY that this one answers said it"


def test_a_draining_link_announces_nothing(registered: Host) -> None:
    registered.link.drain()
    registered.link.announce()
    assert registered.take() == [m.DRAINING]


def test_draining_waits_until_a_silent_controller_is_heard_again(registered: Host) -> None:
    registered.run(3.5)
    registered.take()
    registered.link.drain()
    assert registered.take() == []
    registered.hear(m.BEAT)
    assert registered.take() == [m.DRAINING]


def test_a_welcome_that_comes_during_the_drain_is_answered_with_draining(host: Host) -> None:
    host.run(0)
    host.take()
    host.link.drain()
    host.welcome()
    assert host.take() == [m.DRAINING]


def test_close_says_bye_and_then_nothing(registered: Host) -> None:
    registered.link.close()
    assert registered.take() == [m.BYE]
    registered.hear(m.REQUEST, client=1, rid=1)
    registered.run(10)
    assert registered.take() == []
    assert "closed" in repr(registered.link)
