"""VLLMWorker with vLLM's real engine on the CPU, as a process of its own: asked through a controller, and over its wire."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psutil
import pytest

from zmqserve import Client, InvalidParameter, WorkerLost
from zmqserve import messages as m
from zmqserve.backends import smollm2
from zmqserve.params import Guided
from zmqserve.results import Completion
from zmqserve.stream import Stream

from .fakes.controller import FakeController, Received
from .fakes.joins import Answer, Asker, asked
from .fakes.lora_adapter import make_adapter, merge
from .processes import CAME, Served, ServedController, eventually

pytestmark = [pytest.mark.vllm, pytest.mark.heavy, pytest.mark.timeout(600)]

LOAD_S = 400.0
TTL_MS = 600_000
"""The fake controller of the whole file says nothing between tests."""
CONTEXT = 1024
SEQUENCES = 4
"""How many the engine runs at a time; the worker takes more."""
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINE = {"dtype": "float32", "enforce_eager": "true", "max_model_len": str(CONTEXT), "max_num_seqs": str(SEQUENCES)}
MODEL, ADAPTED = "smollm2-135m", "adapted"
PROMPTS = (
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "In the beginning",
    "My favourite food is",
    "1, 2, 3, 4,",
    "The sea is",
    "She opened the door and",
    "A prime number is",
    "Dear Sir or Madam,",
    "The history of Rome",
    "SELECT name FROM",
    "Yesterday I went to",
    "The cat sat on",
    "Photosynthesis is",
    "To be or not to be",
    "日本の首都は",
    "Hello! How are you",
)
TIE = 1e-3
"""Nats between the two likeliest tokens, below which the last bits of a kernel may decide in float32."""


def worker(*arguments: str, name: str = "v") -> Served:
    options = [each for pair in ENGINE.items() for each in ("--engine-arg", "=".join(pair))]
    return Served("worker", "vllm", "--model", MODEL, "--worker-name", name, *options, *arguments, env=ENVIRONMENT)


class Network(NamedTuple):
    """One worker of two controllers: a real one with a client, and a scripted one, to which `asker` speaks."""

    client: Client
    asker: Asker
    adapter: Path


# --- when processes die (first of all: three engines at a time are many) -----------------------


def test_streams_survive_a_killed_worker_and_a_killed_engine_ends_its_worker() -> None:
    """Two workers. The one that streams is killed: the other goes on, and nothing of the dead one stays. Then that one's engine is."""
    tokens = 200
    with ExitStack() as stack:
        controller = stack.enter_context(ServedController())
        workers = {name: stack.enter_context(worker("--controller", controller.workers, name=name)) for name in ("a", "b")}
        for _ in workers:
            controller.wait_for(CAME, LOAD_S, state="ready")
        client = stack.enter_context(Client(controller.clients))
        whole = client.generate(MODEL, PROMPTS[1], max_tokens=tokens, temperature=0, ignore_eos=True, stream=False)
        times_s = []
        with client.generate(MODEL, PROMPTS[1], max_tokens=tokens, temperature=0, ignore_eos=True) as stream:
            for chunk in stream:
                times_s.append(time.monotonic())
                if chunk.seq == 10:
                    (busy,) = [each.name for each in client.status().workers if each.running]
                    family = psutil.Process(workers[busy].process.pid).children(recursive=True)
                    assert any("EngineCore" in child.name() for child in family)
                    workers[busy].send(signal.SIGKILL)
        assert (stream.completion.text, stream.completion.token_ids) == (whole.text, whole.token_ids)
        assert stream.resumed == 1
        gap_s = max(after - before for before, after in pairwise(times_s))
        _, left = psutil.wait_procs(family, timeout=20)
        assert not left, "the engine outlives its worker"
        (survivor,) = set(workers) - {busy}
        died_s = kill_engine(client, workers[survivor])
        assert workers[survivor].process.wait(60) == 1
        assert any(line.startswith("zmqserve: vLLM's engine died") for line in workers[survivor].output)
    sys.stdout.write(f"\nSIGKILL of a worker: gap {1000 * gap_s:.0f} ms; of an engine: its worker gone after {1000 * died_s:.0f} ms\n")


def kill_engine(client: Client, served: Served) -> float:
    """While it streams. Returns the seconds until the controller has no worker."""
    family = psutil.Process(served.process.pid).children(recursive=True)
    (engine,) = [child for child in family if "EngineCore" in child.name()]
    with client.generate(MODEL, PROMPTS[1], max_tokens=500, ignore_eos=True, resume=False) as stream:
        next(stream)
        engine.kill()
        gone_s = eventually(lambda: not client.status().workers, 10.0, "a dead engine's worker has left")
        with pytest.raises(WorkerLost):
            read(stream)
    _, left = psutil.wait_procs(family, timeout=30)
    assert not left
    return gone_s


# --- one worker, of a real controller and a scripted one ---------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    adapter = make_adapter(tmp_path_factory.mktemp("lora") / "adapter", str(smollm2.MODEL.fetch()))
    with ServedController() as controller, FakeController() as fake:
        controllers = ("--controller", controller.workers, "--controller", fake.endpoint)
        served = worker("--lora", f"{ADAPTED}={adapter}", "--slots", "8", *controllers)
        try:
            ready = fake.register(timeout_s=LOAD_S, ttl_ms=TTL_MS)
            controller.wait_ready("v")
            with Client(controller.clients) as client:
                client.generate(MODEL, "warm up", max_tokens=1, stream=False)
                yield Network(client, Asker(fake, ready), adapter)
        finally:
            served.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def reference() -> Any:
    return load_reference()


def load_reference() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    loader: Any = AutoModelForCausalLM
    return loader.from_pretrained(smollm2.MODEL.fetch(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    loader: Any = AutoTokenizer
    return loader.from_pretrained(smollm2.MODEL.fetch())


def check_greedy(reference: Any, prompt: list[int], ids: list[int]) -> float | None:
    """Each of `ids` must be what transformers' own `generate` gives; or, at the first that is not, the two must be as likely.

    Returns how far they are apart there, in nats.
    """
    import torch

    asked_ids = torch.tensor([prompt])
    options = {"max_new_tokens": len(ids), "do_sample": False, "pad_token_id": 2}
    made = reference.generate(asked_ids, attention_mask=torch.ones_like(asked_ids), **options)
    expected = made[0, len(prompt) :].tolist()
    if ids == expected:
        return None
    first = next(k for k, (one, other) in enumerate(zip(ids, expected, strict=False)) if one != other)
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + ids[:first]])).logits[0, -1].float().log_softmax(dim=-1)
    gap = float(logits[expected[first]] - logits[ids[first]])
    assert abs(gap) < TIE, f"token {first}: {ids[first]} for {expected[first]}, {gap:.4f} nats less likely"
    return gap


def test_greedy_answers_are_those_of_transformers_own_generate(network: Network, reference: Any, tokenizer: Any) -> None:
    answers = []
    for first in range(0, len(PROMPTS), SEQUENCES):
        together = PROMPTS[first : first + SEQUENCES]
        streams = [network.client.generate(MODEL, prompt, max_tokens=24, temperature=0) for prompt in together]
        answers += [read(stream) for stream in streams]
    ties = {}
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer.encode(prompt)
        assert answer.usage.prompt_tokens == len(ids)
        gap = check_greedy(reference, ids, answer.token_ids)
        if gap is not None:
            ties[prompt] = gap
        ended = answer.finish_reason == "stop"
        assert answer.text == tokenizer.decode(answer.token_ids[: -1 if ended else None]).rstrip("\ufffd")
    sys.stdout.write(f"\n{len(PROMPTS)} prompts, {len(PROMPTS) - len(ties)} equal; nats apart where not: {ties}\n")


def read(stream: Stream) -> Completion:
    for _ in stream:
        pass
    return stream.completion


def test_an_adapter_is_a_model_of_its_own_in_one_batch_with_the_base(network: Network, reference: Any, tokenizer: Any) -> None:
    adapted = load_reference()
    merge(adapted, network.adapter)
    ids = tokenizer.encode(PROMPTS[0])
    streams = [network.client.generate(name, PROMPTS[0], max_tokens=16, temperature=0) for name in (MODEL, ADAPTED, MODEL, ADAPTED)]
    answers = [read(stream).token_ids for stream in streams]
    assert answers[0] != answers[1]
    for answer, model in zip(answers, (reference, adapted) * 2, strict=True):
        check_greedy(model, ids, answer)
    cards = [network.client.model_details(name) for name in (MODEL, ADAPTED)]
    assert cards[0].fingerprint != cards[1].fingerprint
    assert cards[1].source == str(network.adapter)


# --- over its wire -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 12},
        {"max_tokens": 12, "min_tokens": 8},
        {"max_tokens": 12, "repetition_penalty": 1.3},
        {"max_tokens": 12, "echo": True},
        {"max_tokens": 12, "skip_special_tokens": False, "ignore_eos": True},
    ],
    ids=str,
)
def test_a_greedy_answer_goes_on_wherever_it_was_cut(network: Network, params: dict[str, Any]) -> None:
    """Of many tongues: its tokenizer cuts them into bytes."""
    turns = [m.ChatMessage("user", "Repeat exactly: 😀 日本 done")]
    check_joins(network.asker, asked(turns, temperature=0, **params))


def test_a_stop_string_is_matched_across_the_cut(network: Network) -> None:
    whole = network.asker.answer(asked(PROMPTS[0], temperature=0, max_tokens=12))
    stop = whole.text[6:14]
    stopped = check_joins(network.asker, asked(PROMPTS[0], temperature=0, max_tokens=12, stop=[stop, "never said"]))
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert stopped.reasons == ["stop"]


def check_joins(asker: Asker, request: m.Generate) -> Answer:
    """As Asker.check_joins, but the chunks may be cut otherwise."""
    whole = asker.answer(request)
    assert len(whole.pieces) > 2
    for cut in range(1, len(whole.pieces), 3):
        rest = asker.answer(msgspec.structs.replace(request, resume=whole.resume(cut)))
        before = whole.pieces[:cut]
        assert "".join(piece.text for piece in before) + rest.text == whole.text, f"cut after {cut} chunks"
        assert [i for piece in before for i in piece.ids] + rest.ids == whole.ids, f"cut after {cut} chunks"
        assert (rest.reasons, rest.usage) == (whole.reasons, whole.usage)
    return whole


@pytest.mark.parametrize("params", [{"presence_penalty": 1.0}, {"frequency_penalty": 1.0}, {"n": 2}, {"guided": Guided(choice=["a", "b"])}])
def test_what_vllm_cannot_count_over_a_resumed_answer_is_refused(network: Network, params: dict[str, Any]) -> None:
    error = network.asker.failure(asked("x", temperature=0, max_tokens=4, resume=m.Resume(m.pack_ids([1]), 0, 1), **params))
    assert (error.code, error.retryable, error.data["parameters"]) == (50007, False, list(params))


def test_what_a_step_makes_for_a_client_leaves_as_one_message(network: Network) -> None:
    rids = {network.asker.send(asked(prompt, temperature=0, max_tokens=20, ignore_eos=True)) for prompt in PROMPTS[:SEQUENCES]}
    together = 0
    while rids:
        got = network.asker.controller.expect(m.FIRST, m.MORE, m.DONE, timeout_s=60)
        if isinstance(got.message, m.Chunks):
            made_for = [chunk.rid for chunk in got.message.chunks]
            assert len(set(made_for)) == len(made_for), "one step makes one token for each"
            together += len(made_for) == SEQUENCES
        rids.discard(got.head.rid if got.head.kind == m.DONE else 0)
    assert together > 8


def test_heartbeats_tell_what_waits_in_the_scheduler_and_cancels_empty_it(network: Network) -> None:
    controller = network.asker.controller
    rids = [network.asker.send(asked(f"Story {k}:", max_tokens=900, ignore_eos=True)) for k in range(SEQUENCES + 2)]
    seen = (m.FIRST, m.MORE, m.DONE, m.LOAD)

    def full(got: Received) -> bool:
        return got.head.kind == m.LOAD and (got.message.running, got.message.waiting, got.message.yours) == (SEQUENCES, 2, SEQUENCES + 2)

    controller.expect(*seen, timeout_s=60, where=full)
    for rid in rids:
        controller.cancel(rid)
    ended: set[int] = set()
    while len(ended) < len(rids):
        got = controller.expect(*seen, timeout_s=60, where=lambda got: got.head.kind == m.DONE)
        assert got.message.finish_reasons == ["cancelled"]
        ended.add(got.head.rid)
    # Had the engine gone on with them, there would be no room for this one for a minute.
    began_s = time.monotonic()
    assert network.asker.answer(asked("x", temperature=0, max_tokens=2)).usage.completion_tokens == 2
    assert time.monotonic() - began_s < 20
    controller.expect(
        *seen, timeout_s=10, where=lambda got: got.head.kind == m.LOAD and (got.message.running, got.message.waiting) == (0, 0)
    )


# --- what is wrong with a request --------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "parameter"),
    [
        ({"guided": Guided(json='{"type": 3}')}, "guided.json"),
        ({"guided": Guided(regex="([")}, "guided.regex"),
        ({"guided": Guided(grammar="%%%")}, "guided.grammar"),
        ({"stop_token_ids": [2**31]}, "stop_token_ids"),
        ({"stop_token_ids": list(range(200)), "min_tokens": 1}, "stop_token_ids"),
    ],
    ids=["schema", "expression", "grammar", "unknown stop id", "too many stop ids"],
)
def test_what_vllm_refuses_names_its_parameter_and_others_go_on(network: Network, params: dict[str, Any], parameter: str) -> None:
    stream = network.client.generate(MODEL, PROMPTS[1], max_tokens=16, temperature=0, ignore_eos=True)
    next(stream)
    with pytest.raises(InvalidParameter) as caught:
        network.client.generate(MODEL, "x", stream=False, max_tokens=4, **params)
    assert caught.value.parameter == parameter
    assert parameter in caught.value.message
    assert "\n" not in caught.value.message
    assert read(stream).usage.completion_tokens == 16


def test_an_engine_argument_that_is_none_names_the_near_ones() -> None:
    with Served("worker", "vllm", "--model", MODEL, "--engine-arg", "enforce_eagr=true", env=ENVIRONMENT) as served:
        assert served.process.wait(LOAD_S) == 2
    assert any("enforce_eagr is none of vLLM's; near it: enforce_eager" in line for line in served.output)
