"""The sites of all attempts: each attempt must leave its site as it found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.soak_churn import Keys

from .site import Honest, Site, open_site


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A network without keys that lives as long as the tests."""
    with open_site(tmp_path_factory.mktemp("site") / "controller.toml") as opened:
        yield opened


@pytest.fixture(scope="session")
def guarded_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One that lets in whose keys it knows."""
    folder = tmp_path_factory.mktemp("guarded")
    with open_site(folder / "controller.toml", Keys(folder)) as opened:
        yield opened


@pytest.fixture
def honest(site: Site) -> Iterator[Honest]:
    """A stream that runs during the test, and must not be touched by it."""
    with site.honest_stream() as stream:
        yield stream


@pytest.fixture
def honest_with_key(guarded_site: Site) -> Iterator[Honest]:
    """The same beside attempts on the site with keys."""
    with guarded_site.honest_stream() as stream:
        yield stream
