"""A short run of `python -m bench fuzz`, and proof that it finds what it looks for."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.fuzz import TARGETS
from bench.fuzzing.broker import BrokerTarget
from bench.fuzzing.decoders import DECODERS
from bench.fuzzing.mutator import Mutator
from bench.fuzzing.run import MOST_CRASHES, fuzz
from bench.fuzzing.target import golden
from bench.simulate import quiet
from zmqserve import messages as m
from zmqserve.delivery import Delivery

INPUTS = 1000
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=16) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=30,
)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_breaks_a_target(name: str) -> None:
    with quiet():
        result = fuzz(name, TARGETS[name], inputs=INPUTS, seed=2)
    assert result.crashes == []
    assert result.inputs == INPUTS


@pytest.mark.parametrize("name", DECODERS)
@given(data=st.binary(max_size=300) | VALUES.map(m.encode))
@settings(max_examples=100)
def test_a_decoder_takes_whatever_hypothesis_makes(name: str, data: bytes) -> None:
    DECODERS[name](Random(0)).feed((data,))


def test_a_round_is_decided_by_its_seed() -> None:
    def drawn(seed: str) -> list[bytes]:
        mutator = Mutator(golden(), Random(seed))
        return [mutator.draw() for _ in range(200)]

    assert drawn("1/a/0") == drawn("1/a/0") != drawn("1/a/1")


def test_a_broker_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any, **__: Any) -> None:
        raise KeyError("planted")

    monkeypatch.setattr("zmqserve.membership.Membership.violation", raises)
    result = fuzz("broker", BrokerTarget, inputs=3000 * MOST_CRASHES, seed=1)
    assert "planted" in result.crashes[0].error
    assert result.crashes[0].given.startswith("'worker'")


def test_a_broker_that_lets_a_worker_reach_others_clients_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The honest client is told what it did not ask for."""
    first = Delivery.first

    def misdirected(self: Delivery, flight: Any, payload: bytes, now: float) -> None:
        first(self, flight, payload, now)
        self._send_client((b"\0honest",), payload)

    monkeypatch.setattr(Delivery, "first", misdirected)
    result = fuzz("broker", BrokerTarget, inputs=3000, seed=1)
    assert "the honest client got" in result.crashes[0].error
