"""Waiting requests: by priority, fair among connections and clients, bounded."""

from __future__ import annotations

from itertools import count
from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings

from zmqserve.config import ControllerConfig
from zmqserve.dispatch import ShortestQueue
from zmqserve.errors import Overloaded
from zmqserve.flight import Client, Flight
from zmqserve.messages import RequestHeader
from zmqserve.need import Need
from zmqserve.pool import Pool
from zmqserve.rate import ServiceRate
from zmqserve.waiting import FairQueue, WaitingRoom

GENERATE = Need("generate")
RESUME = Need("generate", "f1")
EMBED = Need("embed")


def room_of(**bounds: Any) -> WaitingRoom:
    return WaitingRoom(ControllerConfig(**bounds), count(1))


def pool() -> Pool:
    return Pool("m", ShortestQueue, room_of())


class Flights:
    """Makes flights; their names are connection, client and serial number."""

    def __init__(self) -> None:
        self.pool = pool()
        self.clients: dict[tuple[bytes, ...], Client] = {}
        self.rid = 0

    def new(self, *envelope: bytes, priority: int = 0, need: Need = GENERATE, payload: bytes = b"x", now: float = 0.0) -> Flight:
        client = self.clients.setdefault(envelope, Client(envelope, len(self.clients)))
        self.rid += 1
        return Flight(client, RequestHeader(2, self.rid, "m", priority), need, self.pool, payload, now)


def drain(queue: FairQueue) -> list[int]:
    rids = []
    while (flight := queue.head()) is not None:
        queue.take(flight)
        rids.append(flight.rid)
    return rids


def test_one_client_is_served_in_order() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    for _ in range(4):
        queue.push(flights.new(b"a"))
    assert drain(queue) == [1, 2, 3, 4]
    assert queue.head() is None


def test_lower_priority_numbers_come_first() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    for priority in (5, -5, 0, -5):
        queue.push(flights.new(b"a", priority=priority))
    assert drain(queue) == [2, 4, 3, 1]


def test_connections_take_turns_however_much_one_asks() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    for connection in (b"a", b"a", b"a", b"a", b"b", b"b", b"c"):
        queue.push(flights.new(connection))
    assert drain(queue) == [1, 5, 7, 2, 6, 3, 4]


def test_a_thousand_clients_behind_one_proxy_get_one_connections_share() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    for number in range(1000):
        queue.push(flights.new(b"proxy", b"%d" % number))
    for _ in range(3):
        queue.push(flights.new(b"direct"))
    assert drain(queue)[:6] == [1, 1001, 2, 1002, 3, 1003]


def test_clients_behind_one_connection_take_turns() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    for client in (b"1", b"1", b"1", b"2", b"2"):
        queue.push(flights.new(b"proxy", client))
    assert drain(queue) == [1, 4, 2, 5, 3]


def test_front_is_next_of_its_priority_only() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    queue.push(flights.new(b"a", priority=1))
    queue.push(flights.new(b"b"))
    queue.push(flights.new(b"c"), front=True)
    queue.push(flights.new(b"d", priority=1), front=True)
    assert drain(queue) == [3, 2, 4, 1]


def test_a_request_leaves_from_anywhere() -> None:
    flights, queue = Flights(), FairQueue(count(1))
    all_flights = [flights.new(connection) for connection in (b"a", b"a", b"a", b"b")]
    for flight in all_flights:
        queue.push(flight)
    queue.remove(all_flights[1])
    queue.remove(all_flights[3])
    assert drain(queue) == [1, 3]
    assert queue._levels == {}
    with pytest.raises(KeyError):
        queue.remove(all_flights[1])


@pytest.mark.parametrize(
    ("bounds", "bound"),
    [
        ({"queue_requests": 3}, "queue_requests"),
        ({"queue_bytes": 70}, "queue_bytes"),
        ({"client_requests": 3}, "client_requests"),
        ({"client_bytes": 67}, "client_bytes"),
    ],
)
def test_a_room_is_bounded_by_requests_and_bytes_of_all_needs_and_of_one_client(bounds: dict[str, int], bound: str) -> None:
    flights, room = Flights(), room_of(**bounds)
    mine = flights.new(b"a", payload=b"x" * 60)
    room.push(mine)
    room.push(flights.new(b"a", need=RESUME, payload=b"xx"))
    room.check(mine.client, 1, "m", 1)
    room.push(flights.new(b"a" if "client" in bound else b"b", payload=b"x" * 4))
    with pytest.raises(Overloaded, match=bound) as caught:
        room.check(mine.client, 5, "m", 1)
    assert caught.value.data["bound"] == bound
    assert caught.value.data["limit"] == bounds[bound]
    assert repr(room) == "WaitingRoom(3 waiting, 66 bytes)"
    room.take(mine)
    room.check(mine.client, 5, "m", 1)
    assert (len(room), room.bytes) == (2, 6)


def test_one_client_at_its_bound_leaves_room_for_others() -> None:
    flights, room = Flights(), room_of(client_requests=2)
    first = flights.new(b"a")
    other = flights.new(b"b")
    for flight in (first, flights.new(b"a")):
        room.push(flight)
    with pytest.raises(Overloaded):
        room.check(first.client, 1, "m", 1)
    room.check(other.client, 1, "m", 1)


def test_those_who_had_a_worker_are_let_in_beyond_the_bounds() -> None:
    flights, room = Flights(), room_of(queue_requests=1, client_requests=1)
    room.push(flights.new(b"a"))
    room.push(flights.new(b"a"), front=True)
    assert [len(queue) for queue in room.queues.values()] == [2]


def test_a_worker_is_offered_only_what_it_can_do() -> None:
    flights, room = Flights(), room_of()
    room.push(flights.new(b"a", need=RESUME))
    room.push(flights.new(b"b"))
    first = room.head()
    assert first is not None
    assert first.need == RESUME
    second = room.head(frozenset({GENERATE}))
    assert second is not None
    assert second.rid == 2
    assert room.head(frozenset()) is None


def test_needs_take_turns_so_that_one_clients_flood_delays_no_other_need() -> None:
    """All requests go to the same workers, whatever they ask."""
    flights, room = Flights(), room_of()
    for _ in range(10):
        room.push(flights.new(b"greedy"))
    room.push(flights.new(b"modest", need=EMBED))
    served = []
    while (head := room.head()) is not None:
        room.take(head)
        served.append(head.rid)
    assert served == [1, 11, *range(2, 11)]


def test_a_flight_knows_whether_it_waits() -> None:
    flights, room = Flights(), room_of()
    flight = flights.new(b"a")
    states = [flight.waiting]
    room.push(flight)
    states.append(flight.waiting)
    room.take(flight)
    states.append(flight.waiting)
    assert states == [False, True, False]
    assert (len(room), room.bytes, room.needs()) == (0, 0, [])


def test_before_anything_was_served_retry_after_is_a_second() -> None:
    flights, room = Flights(), room_of()
    room.push(flights.new(b"a"))
    assert room.retry_after_ms(4) == 1000
    room.rate.served(0.1)
    assert room.retry_after_ms(0) == 1000


def test_retry_after_is_when_half_of_the_line_will_have_been_served() -> None:
    flights, room = Flights(), room_of()
    for number in range(1000):
        room.push(flights.new(b"a" if number % 5 else b"b"))
    for _ in range(10):
        room.rate.served(0.2)
    assert room.retry_after_ms(running=20) == 5000  # 100 in a second
    assert room.retry_after_ms(running=20, client=flights.clients[(b"b",)]) == 2000  # 200 of its own, every other turn
    assert room.retry_after_ms(running=20, client=flights.clients[(b"a",)]) == 5000  # never later than the whole line's
    assert room.retry_after_ms(running=1) == 30_000
    room.rate = ServiceRate()
    room.rate.served(1e-9)
    assert room.retry_after_ms(running=20) == 50


def test_the_rate_follows_a_change_of_the_load() -> None:
    rate = ServiceRate()
    assert rate.per_second(4) is None
    for _ in range(100):
        rate.served(1.0)
    assert rate.per_second(4) == pytest.approx(4)
    for _ in range(250):
        rate.served(0.1)
    assert rate.per_second(4) == pytest.approx(40, rel=0.1)
    assert repr(rate).startswith("ServiceRate(mean_s=0.1")


STEPS = st.tuples(
    st.sampled_from(["push", "push", "push", "front", "take", "remove"]),
    st.sampled_from([b"a", b"b", b"c"]),
    st.sampled_from([b"1", b"2"]),
    st.integers(-1, 1),
    st.sampled_from([GENERATE, RESUME]),
    st.integers(0, 5),
)


@hypothesis_settings(max_examples=300)
@given(st.lists(STEPS, max_size=60))
def test_a_room_holds_what_a_plain_list_would(steps: list[tuple[str, bytes, bytes, int, Need, int]]) -> None:
    flights, room, model = Flights(), room_of(), list[Flight]()
    random = Random(1)
    for now, (step, connection, client, priority, need, size) in enumerate(steps):
        if step in ("push", "front"):
            flight = flights.new(connection, client, priority=priority, need=need, payload=b"x" * size, now=float(now))
            room.push(flight, front=step == "front")
            model.append(flight)
            if step == "front" and all(other.priority > priority for other in model[:-1]):
                assert room.head() is flight
        elif model:
            head = room.head()
            assert head in model
            assert head.priority == min(flight.priority for flight in model)
            if step == "remove":
                head = random.choice(model)
                room.remove(head)
            else:
                room.take(head)
            model.remove(head)
        assert len(room) == len(model)
        assert room.bytes == sum(len(flight.payload) for flight in model)
        assert set(room.needs()) == {flight.need for flight in model}
    while (head := room.head()) is not None:
        room.take(head)
        model.remove(head)
    assert model == []


@hypothesis_settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=40))
def test_no_connection_is_served_twice_while_another_waits_its_turn(arrivals: list[tuple[int, int]]) -> None:
    flights, queue = Flights(), FairQueue(count(1))
    left: dict[bytes, int] = {}
    for connection, client in arrivals:
        queue.push(flights.new(b"%d" % connection, b"%d" % client))
        left[b"%d" % connection] = left.get(b"%d" % connection, 0) + 1
    served_since: set[bytes] = set()
    while (flight := queue.head()) is not None:
        queue.take(flight)
        name = flight.client.envelope[0]
        if name in served_since:  # a new round: everybody else who still waits has had a turn in the last one
            assert served_since >= {other for other, count in left.items() if count}
            served_since = set()
        served_since.add(name)
        left[name] -= 1
