"""Answers held to a form, with a model that would say something else."""

from __future__ import annotations

import json
import re

from zmqserve.params import Guided

from .cases import case
from .network import Network

SCHEMA = {
    "type": "object",
    "properties": {"animal": {"type": "string", "enum": ["owl", "yak"]}, "legs": {"type": "integer", "minimum": 2, "maximum": 4}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}
# The schema allows white space without end: examples keep the model from making it. They are of another form than the schema.
EXAMPLES = (("Bob, 31", '{"name": "Bob", "age": 31}'), ("Ann, 25", '{"name": "Ann", "age": 25}'))
ASKING = [
    *({"role": role, "content": text} for pair in EXAMPLES for role, text in zip(("user", "assistant"), pair, strict=True)),
    {"role": "user", "content": "Tom, 40"},
]


@case("`guided` by a JSON schema", shows=["guided"])
def test_a_json_schema(network: Network) -> None:
    answer = network.greedy(ASKING, 60, guided=Guided(json=json.dumps(SCHEMA)))
    assert answer.reason == "stop", answer.text
    said = json.loads(answer.text)
    assert set(said) == {"animal", "legs"}
    assert said["animal"] in ("owl", "yak")
    assert 2 <= said["legs"] <= 4


@case("`guided` by a regular expression", shows=["guided"])
def test_a_regular_expression(network: Network) -> None:
    answer = network.greedy(network.subject.prompts.story, 30, guided=Guided(regex=r"[0-9]{3}-[a-f]{2}"))
    assert re.fullmatch(r"[0-9]{3}-[a-f]{2}", answer.text)


@case("`guided` by a choice", shows=["guided"])
def test_a_choice(network: Network) -> None:
    choice = ["blueberry", "cranberry"]
    assert network.greedy(network.subject.prompts.story, 20, guided=Guided(choice=choice)).text in choice


@case("`guided` by a grammar", shows=["guided"])
def test_a_grammar(network: Network) -> None:
    grammar = 'root ::= "x = " number\nnumber ::= [0-9] [0-9]'
    assert re.fullmatch(r"x = \d\d", network.greedy(network.subject.prompts.story, 20, guided=Guided(grammar=grammar)).text)
