"""The page's table is what the tests declare."""

from __future__ import annotations

from .table import PAGE, written


def test_the_page_has_the_present_table() -> None:
    text = PAGE.read_text()
    assert text == written(text), "run: python -m tests.conformance.table"
