"""Turns: whose sequence is next."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from zmqserve.backends.sampling import Sampler
from zmqserve.backends.sequences import TokenSequence
from zmqserve.backends.turns import Turns
from zmqserve.params import SamplingParams


async def sequences_of(request: object, count: int) -> list[TokenSequence]:
    sampler = Sampler(SamplingParams(), 0, (), torch.device("cpu"))
    return [TokenSequence((), (), sampler, lambda _: None, request=request) for _ in range(count)]


def drained(turns: Turns, places: dict[object, int] | None = None) -> list[object]:
    """The requests of all, as they come."""
    order = []
    while turns:
        request = turns.least(places or {})
        assert turns.pop(request).request == request
        order.append(request)
    return order


def pushed(**counts: int) -> Turns:
    turns = Turns()
    for request, count in counts.items():
        for sequence in asyncio.run(sequences_of(request, count)):
            turns.push(sequence)
    return turns


def test_requests_take_turns() -> None:
    turns = pushed(a=3, b=1, c=2)
    assert len(turns) == 6
    assert drained(turns) == ["a", "b", "c", "a", "c", "a"]
    assert not turns


def test_who_has_fewer_places_comes_first() -> None:
    assert drained(pushed(a=2, b=1, c=1), {"a": 3, "c": 1}) == ["b", "c", "a", "a"]


def test_what_was_out_before_comes_ahead_of_all_and_in_its_own_order() -> None:
    turns = pushed(a=1, b=1)
    again = [*asyncio.run(sequences_of("b", 1)), *asyncio.run(sequences_of("c", 1))]
    turns.push_back(again)
    assert turns.pop("b") is again[0]
    assert drained(turns) == ["c", "a", "b"]


def test_what_is_discarded_has_no_turn() -> None:
    turns = pushed(a=2)
    ((stays, goes), (alone,)) = asyncio.run(sequences_of("a", 2)), asyncio.run(sequences_of("b", 1))
    turns.push_back([goes, stays, alone])
    for sequence in (goes, alone, goes):
        turns.discard(sequence)
    assert turns.pop("a") is stays
    assert drained(turns) == ["a", "a"]


def test_a_sequence_of_no_request_is_one_by_itself() -> None:
    turns = Turns()
    for sequence in asyncio.run(sequences_of(None, 2)):
        turns.push(sequence)
    first, second = turns.clear()
    assert first.request is first
    assert second.request is second
    assert not turns
