"""HuggingfaceApiWorker in front of a server that others wrote: vLLM's own, with SmolLM2 on this machine's CPU."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from zmqserve import Client
from zmqserve.errors import ContextOverflow, InvalidParameter, UpstreamError
from zmqserve.params import Guided

from .conformance.openai_server import openai_server
from .conformance.subjects import VLLM_ENVIRONMENT, smollm2_directory
from .fakes.hosted import hosted, serving
from .processes import eventually

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

CONTEXT = 512
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story about a cat."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT))
    with openai_server(smollm2_directory(), "smollm2", *options, environment=VLLM_ENVIRONMENT) as served:
        yield served


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with serving(hosted(url, model="smollm2", server="vllm", context_length=CONTEXT, slots=4)) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(smollm2_directory())


def ask(client: Client, messages: Any = STORY, **asked: Any) -> Any:
    return client.chat("m", messages, stream=False, timeout_s=120, **{"temperature": 0, "max_tokens": 12, **asked})


def post(url: str, **body: Any) -> Any:
    """The server's own answer, not streamed, by nobody's client."""
    data = json.dumps({"model": "smollm2", "top_p": 1.0, "top_k": 0, "temperature": 0, **body}).encode()
    request = urllib.request.Request(f"{url}/chat/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def test_a_greedy_answer_is_the_servers_own_and_repeats(client: Client, url: str, tokenizer: Any) -> None:
    own = post(url, messages=CAPITAL, max_tokens=40)
    with client.chat("m", CAPITAL, temperature=0, max_tokens=40) as stream:
        pieces = [chunk.text for chunk in stream]
    answer = stream.completion
    assert answer.text == own["choices"][0]["message"]["content"]
    assert "Paris" in answer.text
    assert (answer.finish_reason, len([piece for piece in pieces if piece]) > 3) == ("stop", True)
    assert ask(client, CAPITAL, max_tokens=40).text == answer.text
    prompt = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, tokenize=False)
    # The token that ends the answer counts, and has no text.
    counted = (len(tokenizer.encode(prompt)), len(tokenizer.encode(answer.text)) + 1)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == counted


def test_max_tokens_min_tokens_and_ignore_eos(client: Client) -> None:
    five = ask(client, max_tokens=5)
    assert (five.finish_reason, five.usage.completion_tokens) == ("length", 5)
    assert ask(client, CAPITAL, max_tokens=30, min_tokens=30).usage.completion_tokens == 30
    assert ask(client, CAPITAL, max_tokens=30, ignore_eos=True).finish_reason == "length"


def test_stop_strings_and_stop_ids(client: Client, tokenizer: Any) -> None:
    whole = ask(client, max_tokens=20).text
    stop = whole[20:29]
    stopped = ask(client, max_tokens=20, stop=[stop])
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(stop)], "stop")
    ids = tokenizer.encode(whole)
    at_id = ask(client, max_tokens=20, stop_token_ids=[ids[6]])
    assert (at_id.text, at_id.finish_reason) == (tokenizer.decode(ids[: ids.index(ids[6])]), "stop")


def test_seeds_repeat_and_others_differ(client: Client) -> None:
    first, second, other = (ask(client, temperature=2.0, seed=seed).text for seed in (1, 1, 2))
    assert first == second != other


@pytest.mark.parametrize("asked", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_what_leaves_only_the_likeliest_token_is_greedy(client: Client, asked: dict[str, Any]) -> None:
    # 2 is the most that this server takes.
    assert ask(client, temperature=2.0, seed=3, **asked).text == ask(client).text
    assert ask(client, temperature=2.0, seed=3).text != ask(client).text


@pytest.mark.parametrize("asked", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 3.0}])
def test_penalties_change_what_is_said_again(client: Client, asked: dict[str, Any]) -> None:
    plain, penalised = ask(client, max_tokens=30).text, ask(client, max_tokens=30, **asked).text
    assert penalised != plain
    words = [[word for word in text.lower().split() if word.isalpha()] for text in (plain, penalised)]
    repeated = [len(said) - len(set(said)) for said in words]
    assert repeated[1] < repeated[0]


def test_log_probabilities(client: Client) -> None:
    answer = ask(client, max_tokens=6, logprobs=3)
    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.usage.completion_tokens == 6
    assert "".join(entry.text for entry in answer.logprobs) == answer.text
    for entry in answer.logprobs:
        chances = [top.logprob for top in entry.top]
        assert len(chances) == 3
        assert chances == sorted(chances, reverse=True)
        assert entry.logprob == chances[0] <= 0
    assert all(entry.top == [] for entry in ask(client, max_tokens=2, logprobs=0).logprobs)


def test_several_answers(client: Client) -> None:
    answer = ask(client, n=3, temperature=2.0, seed=5, max_tokens=8)
    assert len({choice.text for choice in answer.choices}) == 3
    assert [choice.finish_reason for choice in answer.choices] == ["length"] * 3
    assert answer.usage.completion_tokens == 24


def test_guided_answers(client: Client) -> None:
    assert ask(client, CAPITAL, guided=Guided(choice=["Rome", "Oslo"])).text in ("Rome", "Oslo")
    assert ask(client, CAPITAL, guided=Guided(regex="[0-9]{3}")).text.isdecimal()
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    assert list(json.loads(ask(client, CAPITAL, guided=Guided(json=json.dumps(schema)), max_tokens=40).text)) == ["a"]


def test_characters_of_several_tokens_come_whole(client: Client) -> None:
    tongues = [{"role": "user", "content": "Repeat: 🎉 日本語 🎉 日本語 🎉"}]
    with client.chat("m", tongues, temperature=0, max_tokens=40) as stream:
        pieces = [chunk.text for chunk in stream]
    assert not any("\ufffd" in piece for piece in pieces)
    assert any(ord(sign) > 0x2000 for sign in stream.completion.text)


@pytest.mark.parametrize(("words", "max_tokens"), [(800, 5), (1, 3000), (470, 60)])
def test_what_does_not_fit_is_an_overflow_with_both_numbers(client: Client, words: int, max_tokens: int) -> None:
    messages = [{"role": "user", "content": " ".join(["a"] * words)}]
    with pytest.raises(ContextOverflow) as caught:
        ask(client, messages, max_tokens=max_tokens, ignore_eos=True)
    assert caught.value.context_length == CONTEXT
    assert caught.value.tokens > CONTEXT


def test_the_servers_refusals_are_typed(client: Client, url: str) -> None:
    with pytest.raises(InvalidParameter, match="logprobs"):
        ask(client, logprobs=100)
    with serving(hosted(url, model="nobody")) as other, pytest.raises(UpstreamError, match="no model 'nobody'"):
        ask(other)


def test_cancel_ends_the_work_on_the_server(client: Client, url: str) -> None:
    def running() -> float:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))

    with client.chat("m", STORY, max_tokens=400, ignore_eos=True) as stream:
        next(iter(stream))
        eventually(lambda: running() == 1, 10, "the server says that it runs the request")
    assert eventually(lambda: running() == 0, 10, "the server runs nothing any more") < 2
