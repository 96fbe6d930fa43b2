"""The cases notice a backend that ignores a parameter: each is run with a worker that never gets it, and must fail."""

from __future__ import annotations

import pytest

from zmqserve.errors import ZmqserveError

from .cases import Check, all_cases, place
from .network import Network

LOSSES = [
    pytest.param(*spot.values, case.check, name, marks=spot.marks, id=f"{spot.id}-{name}-{case.check.__name__.removeprefix('test_')}")
    for case in all_cases()
    for name in sorted(case.shows)
    for spot in (place(subject, case.role) for subject in case.runs())
]


@pytest.mark.parametrize(("network", "check", "name"), LOSSES, indirect=["network"], scope="package")
def test_a_lost_parameter_is_noticed(network: Network, check: Check, name: str) -> None:
    with pytest.raises((AssertionError, ZmqserveError, pytest.fail.Exception)):
        check(network.forgetting(name))
