"""`make demo`, less the set-up."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.heavy
@pytest.mark.timeout(300)
def test_the_demo_answers_with_a_real_model_and_leaves_nothing_running() -> None:
    command = [sys.executable, "-m", "zmqserve.demo", "What is the capital of France?"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    figures = done.stdout.strip().splitlines()[-1]
    assert re.fullmatch(r"first token [\d.]+ ms \| \d+ tokens at [\d.]+ tokens/s \| prompt \d+ tokens \| worker demo-[01]", figures)
