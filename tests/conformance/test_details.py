"""What a model says of itself, and how it counts."""

from __future__ import annotations

from .cases import case
from .network import Network
from .test_prompts import TURNS


@case("`count_tokens` of a text and of a conversation", needs=["count_tokens"])
def test_count_tokens(network: Network) -> None:
    subject = network.subject
    tokenizer = subject.tokenizer()
    for text in ("1 2 3", "11 12 13 14 15 16 17"):
        assert network.client.count_tokens(subject.model, text) == len(tokenizer.encode(text))
    assert network.client.count_tokens(subject.model, TURNS) == len(tokenizer.encode_chat(TURNS))


@case("`model_details`: context length, verbs and features")
def test_model_details(network: Network) -> None:
    subject = network.subject
    card = network.client.model_details(subject.model)
    assert card.name == subject.model
    assert card.context_length == subject.context_length
    absent = {name for name in ("count_tokens", "prompt") if name in {*subject.lacks, *subject.refuses}}
    expected = {"generate", "chat", "count_tokens", "model_details"} - {"generate" if name == "prompt" else name for name in absent}
    assert expected <= set(card.verbs)
    assert ("resume" in card.features) == ("resume" not in subject.lacks)
    assert bool(card.fingerprint) or "resume" in subject.lacks
    (listed,) = network.client.models()
    assert (listed.card, listed.state) == (card, "ready")
