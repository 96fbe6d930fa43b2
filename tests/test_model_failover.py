"""A model's answer survives the worker that makes it: real processes, a real model, SIGKILL. The figures are printed (-s)."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack
from itertools import pairwise
from time import monotonic

import pytest

from zmqserve import Client

from .processes import CAME, Served, ServedController

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]

MODEL = "smollm2-135m"
PROMPT = "Some facts about the sea:"
TOKENS = 60
KILLED_AFTER = 10
LOAD_S = 120.0
MODERATE_GAP_S = 5.0
"""Much more than it takes; less than anybody's heartbeats and time-outs would."""


def answer(client: Client, kill: dict[str, Served] | None = None) -> tuple[str, list[int], list[float], int]:
    """Text, ids, when each chunk came, and how often it was resumed. `kill`: the one of these workers that makes it, on the way."""
    times_s: list[float] = []
    with client.generate(MODEL, PROMPT, max_tokens=TOKENS, temperature=0, ignore_eos=True) as stream:
        for chunk in stream:
            times_s.append(monotonic())
            if kill and chunk.seq == KILLED_AFTER - 1:
                (busy,) = [worker.name for worker in client.status().workers if worker.running]
                kill[busy].send(signal.SIGKILL)
    completion = stream.completion
    assert completion.usage.completion_tokens == len(completion.token_ids) == TOKENS
    assert completion.finish_reason == "length"
    return completion.text, completion.token_ids, times_s, completion.resumed


def test_a_killed_model_worker_changes_nothing_in_the_answer() -> None:
    with ExitStack() as stack:
        controller = stack.enter_context(ServedController())
        arguments = ("worker", "transformers", "--model", MODEL, "--threads", "1", "--device", "cpu", "--controller", controller.workers)
        workers = {name: stack.enter_context(Served(*arguments, "--worker-name", name)) for name in ("a", "b")}
        for _ in workers:
            controller.wait_for(CAME, LOAD_S, state="ready")
        client = stack.enter_context(Client(controller.clients))
        text, ids, times_s, resumed = answer(client)
        assert resumed == 0
        usual_s = (times_s[-1] - times_s[0]) / (TOKENS - 1)
        text_again, ids_again, times_s, resumed = answer(client, kill=workers)
        assert resumed == 1
        gap_s = max(after - before for before, after in pairwise(times_s))
    assert (text_again, ids_again) == (text, ids)
    figures = f"{TOKENS} tokens, SIGKILL after {KILLED_AFTER}: gap {1000 * gap_s:.0f} ms, otherwise {1000 * usual_s:.0f} ms a token"
    sys.stdout.write(f"\n{figures}\n")
    assert gap_s < MODERATE_GAP_S
