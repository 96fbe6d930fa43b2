"""A model that answers: its checkpoint, and the engine that makes its tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch

from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.jobs import GenerateJob
from zmqserve.logs import Logger
from zmqserve.messages import CountTokens, Generate, ModelCard
from zmqserve.params import SamplingParams

from .checkpoint import Checkpoint
from .generation import Generation
from .guided import Grammar
from .prompts import echo_of, known_ids, prompt_ids, room
from .sampling import Sampler
from .sequences import SequenceEngine, Token, TokenSequence
from .single_steps import SingleSteps
from .step_loop import StepLoop
from .text_bound import TextBound, text_bound

log = Logger("zmqserve.transformers")

_MOST_SEQUENCES = 64
"""In a batch at least: a request may ask for several answers."""
_CHECKED_IDS = 40
_CHECKED_TOKENS = 3
_CHECK_S = 120.0
_MOST_APART = {torch.float32: 0.01}
_MOST_APART_ELSE = 0.5
"""Between the log probabilities that a batch and the plain forward give: more is no rounding."""


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """`context_length` is in tokens, prompt and answer together; 0: no bound. `bound`: of texts that are made into tokens."""

    name: str
    checkpoint: Checkpoint
    engine: SequenceEngine
    context_length: int
    bound: TextBound

    def card(self, source: str) -> ModelCard:
        """As it is offered."""
        # The same ids taken in other pieces give logits with other last bits. In float32 these decide nothing but ties.
        repeats = self.checkpoint.model.dtype == torch.float32
        chat = ["chat"] if self.checkpoint.tokenizer.chat_template else []
        return ModelCard(
            self.name,
            fingerprint=self.checkpoint.fingerprint(),
            context_length=self.context_length,
            verbs=["generate", *chat, "count_tokens", "model_details"],
            source=source,
            resume={} if repeats else {"greedy": "approximate", "seed": "approximate"},
        )

    def prepare(self, job: GenerateJob, grammar: Grammar | None = None) -> Generation:
        """On the tokenizer's thread: the job's Generation. Raises InvalidParameter, Unsupported or ContextOverflow.

        `grammar` is that of the job's `guided`: see Checkpoint.grammars.
        """
        request, params, checkpoint = job.request, job.request.params, self.checkpoint
        resume = request.resume
        if resume is not None:
            known_ids(resume.token_ids, "resume.token_ids", checkpoint.embeddings)
        prompt = self.encode(request)
        job.prompt_tokens = len(prompt)
        max_tokens = room(len(prompt), params.max_tokens, self.context_length) if self.context_length else params.max_tokens
        echo = echo_of(request, prompt, checkpoint) if params.echo else ""
        return Generation(checkpoint, prompt, params, max_tokens, echo=echo, resume=resume, grammar=grammar)

    def encode(self, request: Generate | CountTokens) -> list[int]:
        """On the tokenizer's thread: see prompt_ids."""
        return prompt_ids(request, self.checkpoint.tokenizer, self.checkpoint.encode, self.checkpoint.embeddings, self.bound)


def start_model(name: str, checkpoint: Checkpoint, *, slots: int, cache_tokens: int | None = None, engines: int = 1) -> LoadedModel:
    """Start the engine of one of `engines` models: one that batches, or where the model cannot be batched, one that takes turns.

    `cache_tokens`: what the batch may hold; None: as the memory allows. Raises InvalidParameter if it cannot hold so many.
    """
    expected = _plain_logprobs(checkpoint)
    try:
        engine, held = _start_batching(name, checkpoint, slots, cache_tokens, engines)
    except InvalidParameter:
        raise
    except Exception as error:  # noqa: BLE001 - a library's reasons are many, and all mean the same
        why: str | None = f"{type(error).__name__}: {error}"
    else:
        why = _difference(engine, checkpoint, expected)
        if why is None:
            context = min(checkpoint.context_length or held, held)
            if context < checkpoint.context_length:
                log.warning("context limited by the cache", model=name, context=context, of=checkpoint.context_length)
            log.info("batching", model=name, cache_tokens=held)
            return LoadedModel(name, checkpoint, engine, context, text_bound(checkpoint.tokenizer, context))
        engine.close()
    log.warning("no batching: sequences take turns", model=name, why=why)
    turns = StepLoop(f"{name} steps", lambda sequence: SingleSteps(checkpoint, sequence), probe=checkpoint.warm_up)
    turns.start()
    return LoadedModel(name, checkpoint, turns, checkpoint.context_length, text_bound(checkpoint.tokenizer, checkpoint.context_length))


def _start_batching(name: str, checkpoint: Checkpoint, slots: int, cache_tokens: int | None, engines: int) -> tuple[SequenceEngine, int]:
    # Not in every release that the rest works with.
    from .batch_cache import cache_size
    from .batch_loop import BatchLoop

    most = max(slots, _MOST_SEQUENCES)
    size = cache_size(checkpoint, slots, most, cache_tokens, engines)
    engine = BatchLoop(f"{name} batch", checkpoint, size, most)
    engine.start()
    return engine, size.tokens


@torch.inference_mode()
def _plain_logprobs(checkpoint: Checkpoint) -> list[torch.Tensor]:
    """What the model says by itself after a few ids: log probabilities of all tokens, for each that it makes."""
    ids = _checked_ids(checkpoint)
    rows: list[torch.Tensor] = []
    cache = None
    for _ in range(_CHECKED_TOKENS):
        logits, cache = checkpoint.forward(torch.tensor([ids], device=checkpoint.device), cache)
        rows.append(logits[0].log_softmax(dim=-1))
        ids = [int(logits.argmax())]
    return rows


def _difference(engine: SequenceEngine, checkpoint: Checkpoint, expected: list[torch.Tensor]) -> str | None:
    """How the engine's answer to the same ids differs from the expected one, None if it does not.

    A model may have parts that the library's batching leaves out without a word.
    """

    async def ask() -> str | None:
        made: asyncio.Queue[Token | Exception] = asyncio.Queue()
        params = SamplingParams(temperature=0)
        sampler = Sampler(params, _CHECKED_IDS, (), checkpoint.device)
        prompt = _checked_ids(checkpoint)
        engine.open(TokenSequence(prompt, (), sampler, made.put_nowait, max_tokens=_CHECKED_TOKENS, logprobs=0))
        for row in expected:
            token = await asyncio.wait_for(made.get(), _CHECK_S)
            if isinstance(token, Exception):
                return f"{type(token).__name__}: {token}"
            found = token.likelihood.logprob if token.likelihood is not None else 0.0
            best, own = float(row.max()), float(row[token.token_id])
            if not max(abs(found - own), best - own) < _MOST_APART.get(checkpoint.model.dtype, _MOST_APART_ELSE):
                says = f"token {token.token_id} has log probability {found:.3f} in a batch"
                return f"{says} and {own:.3f} without, where the best has {best:.3f}"
            if own < best:
                return None  # a tie: from here on they answer different texts
        return None

    try:
        return asyncio.run(ask())
    except (TimeoutError, BackendError) as error:
        return f"{type(error).__name__}: {error}"


def _checked_ids(checkpoint: Checkpoint) -> list[int]:
    return [(7 * i + 5) % checkpoint.embeddings for i in range(_CHECKED_IDS)]
