"""ModelWorker with the engine of a test's choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def without_batching() -> Iterator[None]:
    """Models that are loaded meanwhile cannot be batched."""

    def refuse(*_: Any) -> None:
        raise ValueError("this model cannot be batched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zmqserve.backends.loaded_model._start_batching", refuse)
        yield
