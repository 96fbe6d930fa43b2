"""The README's table is what the tests declare."""

from __future__ import annotations

from .table import README, written


def test_the_readme_has_the_present_table() -> None:
    text = README.read_text()
    assert text == written(text), "run: python -m tests.conformance.table"
