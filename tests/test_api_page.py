"""docs/api.md is made from the docstrings, and every public name has one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import zmqserve

ROOT = Path(__file__).parents[1]


def test_the_page_is_what_the_source_says() -> None:
    made = subprocess.run(
        [sys.executable, "scripts/api_page.py", "--check"], check=False, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (made.returncode, made.stderr) == (0, "")


def test_every_public_name_says_what_it_is() -> None:
    for name in zmqserve.__all__:
        public = getattr(zmqserve, name)
        assert inspect.getdoc(public), name
        if inspect.isclass(public):
            for member, value in vars(public).items():
                callable_or_property = inspect.isfunction(value) or isinstance(value, property | classmethod)
                if not member.startswith("_") and callable_or_property:
                    assert inspect.getdoc(getattr(public, member)), f"{name}.{member}"
