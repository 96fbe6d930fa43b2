"""What `bench serve` has to know of the network before it begins, and what it tells of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from zmqserve import Client
from zmqserve.errors import InvalidParameter, RetryLater, UnknownModel, Unsupported, ZmqserveError
from zmqserve.messages import ControllerStatus, ModelCard

from .serve_client import CONNECT_TIMEOUT_S, Ask
from .serve_samples import Kind, Sample

LOOK_S = 0.2
PROBE_S = 600.0
"""What the first request may take: the first one of an engine often compiles."""
CHARACTERS_PER_TOKEN = 4
"""Of English text, about, where a model does not count tokens itself."""


class Network:
    """A running network, as one client sees it."""

    def __init__(self, endpoints: Sequence[str] | None) -> None:
        self._client = Client(endpoints, name="bench serve", connect_timeout_s=CONNECT_TIMEOUT_S)
        self._counted: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Network({', '.join(self.endpoints)})"

    def close(self) -> None:
        """Let go of it."""
        self._client.close()

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where its controllers are."""
        return self._client.endpoints

    def model(self, name: str | None, patience_s: float) -> ModelCard:
        """The card of the model of this name, or of the first there is, when it is ready. UnknownModel, RetryLater after `patience_s`."""
        until_s = time.monotonic() + patience_s
        while True:
            models = self._client.models()
            fit = [model for model in models if name is None or name == model.name or name in model.aliases]
            ready = [model for model in fit if model.state == "ready"]
            if ready:
                return ready[0].card
            if time.monotonic() >= until_s:
                if fit:
                    raise RetryLater(f"model {fit[0].name!r} is {fit[0].state}: try again, or give --ready-check-timeout-sec")
                known = sorted(model.name for model in models)
                wanted = "no model is served" if name is None else f"no model {name!r} is served"
                raise UnknownModel(f"{wanted}; there is: {', '.join(known) or 'none'}", data={"known_models": known})
            time.sleep(LOOK_S)

    def settled(self, ask: Ask, sample: Sample, optional: Collection[str]) -> tuple[Ask, list[str]]:
        """`ask` without what the model's backend refuses, and the names of that, as far as they are `optional`.

        One request of one token is sent to learn it. Without ``token_ids`` prompts are texts, and ``ignore_eos`` is left out. Other
        errors are raised: all requests would end with them.
        """
        left_out: list[str] = []
        while True:
            text = Sample(" ".join(["river"] * sample.input_tokens), sample.input_tokens, 1)
            prompt = (sample if ask.kind == "ids" else text).as_prompt(ask.kind)
            try:
                self._client.generate(ask.model, prompt, stream=False, max_tokens=1, timeout_s=PROBE_S, **ask.sampling)
            except Unsupported as error:
                name = str(error.data.get("parameter", ""))
                if name == "ignore_eos" and name in ask.sampling and name in optional:
                    ask = replace(ask, sampling={key: value for key, value in ask.sampling.items() if key != name})
                elif name == "token_ids" and ask.kind == "ids" and name in optional:
                    ask = replace(ask, kind="text")
                else:
                    raise
                left_out.append(name)
            except InvalidParameter as error:
                if error.parameter == "token_ids":
                    raise InvalidParameter(f"{error}; say which ones to draw with --random-ids LOW HIGH", data=error.data) from None
                raise
            else:
                return ask, left_out

    def count_tokens(self, card: ModelCard, texts: Sequence[str]) -> list[int]:
        """As the model's own tokenizer counts them, special tokens included; by their characters, where it does not."""
        if "count_tokens" not in card.verbs:
            return [max(1, round(len(text) / CHARACTERS_PER_TOKEN)) for text in texts]
        for text in texts:
            if text not in self._counted:
                self._counted[text] = self._client.count_tokens(card.name, text) if text.strip() else 0
        return [self._counted[text] for text in texts]

    def status(self) -> ControllerStatus | None:
        """The controller's state; None where it does not say."""
        try:
            return self._client.status()
        except ZmqserveError:
            return None


def first_kind(card: ModelCard) -> Kind:
    """How prompts are sent to a model, if it takes token ids."""
    return "ids" if "generate" in card.verbs else "chat"


@dataclass(frozen=True)
class NetworkFacts:
    """What a result tells of the network it was measured with."""

    before: ControllerStatus | None
    after: ControllerStatus | None
    card: ModelCard

    def plain(self) -> dict[str, Any]:
        """For JSON. `counters`: what the controller counted meanwhile, of all its clients."""
        if self.before is None:
            return {"model": self._model()}
        after = self.after.counters if self.after is not None else {}
        risen = {name: count - self.before.counters.get(name, 0) for name, count in after.items()}
        workers = [
            {
                "name": worker.name,
                "backend": worker.backend,
                "models": worker.models,
                "slots": worker.slots,
                "speed": worker.speed,
                "version": worker.version,
            }
            for worker in self.before.workers
        ]
        return {
            "controller": {"version": self.before.version, "protocol": self.before.protocol, "dispatch": self.before.dispatch},
            "workers": workers,
            "slots": sum(status.slots for status in self.before.models if status.card.name == self.card.name),
            "model": self._model(),
            "clients_before": self.before.clients,
            "counters": {name: count for name, count in risen.items() if count},
        }

    def _model(self) -> dict[str, Any]:
        card = self.card
        return {
            "name": card.name,
            "source": card.source,
            "fingerprint": card.fingerprint,
            "context_length": card.context_length,
            "verbs": card.verbs,
        }
