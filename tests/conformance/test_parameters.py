"""No parameter is forgotten: each is shown to be honoured, or refused by name."""

from __future__ import annotations

import pytest

from zmqserve.errors import Unsupported
from zmqserve.params import EmbedParams, SamplingParams
from zmqserve.requests import Prompt

from .cases import LACKING, Case, all_cases, place
from .network import Network
from .parameters import ASKED, ASKED_OF_EMBEDDINGS, WRONG
from .subjects import SUBJECTS, Subject

FORMS: dict[str, Prompt] = {"prompt": "a text", "token_ids": [1, 2, 3]}
"""Of a prompt. A model that only chats refuses the verb, ``generate``."""
MAY_LACK = {
    "echo": {"choice", "vocabulary", "reference"},
    "hf": {"ids", "resume", "reference", "count_tokens", "embed"},
}
"""All other backends can do everything, or refuse a parameter by name."""
PARAMETERS = [*SamplingParams.__struct_fields__, *EmbedParams.__struct_fields__]
REFUSALS = [
    pytest.param(*place(subject, "generate").values, name, marks=place(subject, "generate").marks, id=f"{subject.name}-{name}")
    for subject in SUBJECTS
    for name in subject.refuses
]


def showing(name: str) -> list[Case]:
    """The cases that fail when the parameter is ignored."""
    return [case for case in all_cases() if name in case.shows]


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_has_a_case_that_notices_its_loss(name: str) -> None:
    assert showing(name)


def test_each_parameter_has_a_value_to_ask_for_and_a_wrong_one() -> None:
    assert list(ASKED) == list(WRONG) == list(SamplingParams.__struct_fields__)
    assert list(ASKED_OF_EMBEDDINGS) == list(EmbedParams.__struct_fields__)
    assert sorted(SamplingParams(**ASKED).changed()) == sorted(ASKED)


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
def test_a_backend_lacks_only_what_it_may(subject: Subject) -> None:
    assert set(subject.lacks) <= MAY_LACK.get(subject.name, set())
    assert set(subject.refuses) <= {*PARAMETERS, *FORMS}


@pytest.mark.parametrize("subject", SUBJECTS, ids=repr)
@pytest.mark.parametrize("name", PARAMETERS)
def test_each_parameter_is_shown_or_refused(subject: Subject, name: str) -> None:
    """Or there is a reason why nothing can be seen of it."""
    verdicts = [case.verdict(subject) for case in showing(name)]
    assert all(why for verdict, why in verdicts if verdict == LACKING)
    assert name in subject.refuses or verdicts


@pytest.mark.parametrize(("network", "name"), REFUSALS, indirect=["network"], scope="package")
def test_what_is_not_honoured_is_refused_by_name(network: Network, name: str) -> None:
    with pytest.raises(Unsupported) as caught:
        network.ask(FORMS.get(name, network.subject.prompts.ends), max_tokens=3, **{name: ASKED[name]} if name in ASKED else {})
    named = str(caught.value.data["parameter"])
    assert named in ([name, "generate"] if name in FORMS else [name])
    assert named in caught.value.message
