"""One running network per backend, shared by all cases."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .network import Network, served


@pytest.fixture(scope="package")
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    """The subject and role of `cases.place`, with a real controller and worker."""
    subject, role = request.param
    with served(subject, role) as running:
        yield running


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of one network together: each starts once."""
    places = [place for place, item in enumerate(items) if network_of(item) is not None]
    of_networks = sorted((items[place] for place in places), key=lambda item: str(network_of(item)))
    for place, item in zip(places, of_networks, strict=True):
        items[place] = item


def network_of(item: pytest.Item) -> object:
    """The network that a test asks; None for one that asks none."""
    return item.callspec.params.get("network") if isinstance(item, pytest.Function) and hasattr(item, "callspec") else None
