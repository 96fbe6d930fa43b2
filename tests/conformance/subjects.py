"""The backends that the suite asks: how each is started, what it is asked, what it lacks and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple, TypeAlias

from zmqserve.requests import Prompt

from .openai_server import openai_server
from .tokenizers import ModelTokenizer, Tokenizer, Words

Role: TypeAlias = Literal["generate", "embed"]
"""What a worker is started for; a model that embeds is not one that generates."""


@dataclass(frozen=True)
class Prompts:
    """What a subject is asked. `story` goes on with words that could be many; `ends`: its likeliest answer ends soon by itself;
    `loop`: its likeliest answer repeats itself; `tongues`: its likeliest answer has characters of several tokens each."""

    story: Prompt
    ends: Prompt
    loop: Prompt
    tongues: Prompt


class Launch(NamedTuple):
    """What `zmqserve worker BACKEND` gets: its arguments and, beside the tests' own, its environment."""

    arguments: Sequence[str]
    environment: Mapping[str, str] = {}


@dataclass(frozen=True, eq=False)
class Subject:
    """One backend with one model.

    launch: how its worker is started for a role, with what has to run meanwhile. embeds_apart: another worker embeds than the one that
    generates. context_length: of the model that generates. directory: where that one lies, for backends that run it on this machine.
    failing: prompts that fail in the engine. lacks: capabilities (see the cases' `needs`) that are not there, and why; a case that
    needs one is left out. refuses: parameters and forms of a prompt that end in Unsupported, and why; that they do is tested for
    each. marks: of its tests. patience_s: what its start and any one test may take.
    """

    name: str
    backend: str
    model: str
    launch: Callable[[Role], AbstractContextManager[Launch]]
    prompts: Prompts
    tokenizer: Callable[[], Tokenizer]
    embed_tokenizer: Callable[[], Tokenizer]
    context_length: int
    embeds_apart: bool = True
    directory: Callable[[], str] = str
    failing: Sequence[Prompt] = ()
    lacks: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    patience_s: float = 60.0

    def __repr__(self) -> str:
        return f"Subject({self.name})"

    def longer(self, tokens: int) -> Prompt:
        """A prompt of a few more than so many tokens."""
        text = " ".join(["a"] * tokens)
        return text if isinstance(self.prompts.story, str) else user(text)


def smollm2_directory() -> str:
    """Where SmolLM2 lies; fetched the first time."""
    from zmqserve.backends import smollm2

    return str(smollm2.MODEL.fetch())


@cache
def smollm2_tokenizer() -> Tokenizer:
    return ModelTokenizer(smollm2_directory())


def minilm_directory() -> str:
    """Where all-MiniLM-L6-v2 lies; fetched the first time."""
    from zmqserve.backends import minilm

    return str(minilm.MODEL.fetch())


@cache
def minilm_tokenizer() -> Tokenizer:
    return ModelTokenizer(minilm_directory())


def user(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


@contextmanager
def echo_launch(role: Role) -> Iterator[Launch]:
    """Slow enough that a cancel comes before the end."""
    yield Launch(("--model", "echo", "--context-length", "4096", "--delay-per-token", "0.005", "--slots", "4", "--faults"))


@contextmanager
def transformers_launch(role: Role) -> Iterator[Launch]:
    """In float32, where equal questions have equal answers."""
    model = ("--model", "smollm2-135m", "--slots", "4") if role == "generate" else ("--model", "all-minilm-l6-v2")
    yield Launch((*model, "--device", "cpu", "--dtype", "float32", "--threads", "1"))


@contextmanager
def vllm_launch(role: Role) -> Iterator[Launch]:
    """On a CPU, without what takes long to start."""
    engine = {"dtype": "float32", "enforce_eager": "true", **({"max_model_len": "2048"} if role == "generate" else {})}
    directory = smollm2_directory() if role == "generate" else minilm_directory()
    arguments = [each for name, value in engine.items() for each in ("--engine-arg", f"{name}={value}")]
    yield Launch(("--model", directory, "--slots", "4", *arguments), VLLM_ENVIRONMENT)


@contextmanager
def hf_launch(role: Role) -> Iterator[Launch]:
    """Before vLLM's own server, as one of several OpenAI-compatible ones."""
    options = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "2048")
    with openai_server(smollm2_directory(), "smollm2", *options, environment=VLLM_ENVIRONMENT) as url:
        yield Launch(("--model", "smollm2", "--endpoint", url, "--server", "vllm", "--context-length", "2048", "--slots", "4"))


VLLM_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

ECHO = Subject(
    name="echo",
    backend="echo",
    model="echo-words",
    launch=echo_launch,
    embeds_apart=False,
    prompts=Prompts(
        story="11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26",
        ends="31 32 33 34 35 36",
        loop="1 2 1 2 1 2",
        tongues="naïve 日本 😀 👩\u200d👧 ü end",
    ),
    tokenizer=Words,
    embed_tokenizer=Words,
    context_length=4096,
    failing=["1 2 !raise"],
    lacks={
        "choice": "echo has one word to choose from, so what steers the choice changes nothing",
        "reference": "echo has no model to compare with",
        "vocabulary": "echo's tokens are words: none is special, and none is a part of a character",
    },
    refuses=dict.fromkeys(
        ("presence_penalty", "frequency_penalty", "repetition_penalty", "logprobs", "ignore_eos", "guided"),
        "echo has no probabilities, and no token of its own that ends an answer",
    ),
)

TRANSFORMERS = Subject(
    name="transformers",
    backend="transformers",
    model="smollm2",
    launch=transformers_launch,
    prompts=Prompts(
        story="Once upon a time, in a",
        ends=user("What is the capital of France?"),
        loop="a b c a b c a b c a b c",
        tongues="日本語 🎉 日本語 🎉 日本語 🎉 日本語",
    ),
    tokenizer=smollm2_tokenizer,
    embed_tokenizer=minilm_tokenizer,
    context_length=8192,
    directory=smollm2_directory,
    marks=("heavy",),
    patience_s=120.0,
)

VLLM = replace(TRANSFORMERS, name="vllm", backend="vllm", launch=vllm_launch, context_length=2048, marks=("vllm",), patience_s=300.0)

HF = replace(
    VLLM,
    name="hf",
    backend="hf",
    launch=hf_launch,
    prompts=Prompts(
        story=user("Tell me a story about a cat."),
        ends=user("What is the capital of France?"),
        loop=user("Sing: la la la la la la la la"),
        tongues=user("🎉 日本語 🎉 日本語 🎉 日本語"),
    ),
    lacks={
        "ids": "OpenAI's chat API tells no token ids",
        "resume": "without token ids an answer cannot go on elsewhere",
        "count_tokens": "OpenAI's API has no verb for it",
        "embed": "feature extraction is an API of its own, which the server of these tests does not have",
        "reference": "the model runs elsewhere",
    },
    refuses={
        "prompt": "a chat API takes conversations only",
        "token_ids": "a chat API takes conversations only",
        "echo": "a chat API cannot begin with the prompt",
    },
)

SUBJECTS: tuple[Subject, ...] = (ECHO, TRANSFORMERS, VLLM, HF)
"""In the table's order."""
