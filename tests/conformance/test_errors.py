"""What cannot be answered ends with an error that says what was wrong, alone."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from zmqserve import errors
from zmqserve import messages as m

from .cases import case
from .network import Network, read
from .parameters import ASKED, WRONG
from .wire import Wire


def refusal(wire: Wire, request: Any) -> m.Error:
    """The error that ends it before anything else is said."""
    wire.send(request)
    answer = wire.next()
    assert isinstance(answer, m.Error), answer
    return answer


def with_params(request: m.Generate, params: dict[str, Any]) -> list[Any]:
    """The request as it travels, with params that no SDK would send."""
    fields: list[Any] = msgspec.msgpack.decode(m.encode(request))
    fields[1 + m.Generate.__struct_fields__.index("params")] = params
    return fields


@case("a value out of range names its parameter, for each of them")
def test_a_wrong_value_names_its_parameter(network: Network) -> None:
    with network.wire() as wire:
        for name, value in WRONG.items():
            failed = refusal(wire, with_params(wire.request(network.subject.prompts.story), {name: value}))
            assert (failed.code, failed.retryable) == (errors.InvalidParameter.code, False), failed
            assert str(failed.data["parameter"]).startswith(name)
            assert name in failed.message


@case("a parameter that nobody knows is named, and not ignored")
def test_an_unknown_parameter_is_named(network: Network) -> None:
    with network.wire() as wire:
        failed = refusal(wire, with_params(wire.request(network.subject.prompts.story), {"best_of": 2}))
    assert (failed.code, failed.data["parameter"]) == (errors.InvalidParameter.code, "best_of")


@case("ids that the model does not know are refused, with the highest", needs=["token_ids", "vocabulary"])
def test_unknown_ids_are_refused(network: Network) -> None:
    with pytest.raises(errors.InvalidParameter, match="4000000000") as caught:
        network.ask([1, 4_000_000_000], max_tokens=1)
    assert caught.value.parameter == "token_ids"


@case("an empty prompt is refused")
def test_an_empty_prompt_is_refused(network: Network) -> None:
    with network.wire() as wire:
        request = wire.request(network.subject.prompts.story)
        form: dict[str, Any] = {"prompt": ""} if request.messages is None else {"messages": []}
        failed = refusal(wire, msgspec.structs.replace(request, **form))
    assert failed.code == errors.InvalidParameter.code
    assert failed.data["parameter"] in form


@case("requests that fail, fail alone: a stream beside them stays exact")
def test_failing_requests_fail_alone(network: Network) -> None:
    subject = network.subject
    expected = network.greedy(subject.prompts.story, 12)
    stream = network.open(subject.prompts.story, temperature=0, max_tokens=12)
    first = next(stream)
    failed: list[errors.ZmqserveError] = []
    bad: list[tuple[Any, dict[str, Any]]] = [(subject.longer(subject.context_length + 1), {})]
    bad += [(prompt, {}) for prompt in subject.failing]
    bad += [(subject.prompts.story, {name: ASKED[name]}) for name in subject.refuses if name in ASKED]
    if not {"token_ids", "vocabulary"} & {*subject.refuses, *subject.lacks}:
        bad.append(([4_000_000_000], {}))
    for prompt, params in bad:
        with pytest.raises(errors.ZmqserveError) as caught:
            network.ask(prompt, **params)
        failed.append(caught.value)
    rest = read(stream)
    assert [chunk.seq for chunk in (first, *rest.chunks)] == list(range(len(rest.chunks) + 1))
    assert (rest.text, rest.ids) == (expected.text, expected.ids)
    assert all(isinstance(error, errors.RequestError | errors.BackendError) for error in failed), failed
    assert network.ask(subject.prompts.story, fresh=True, temperature=0, max_tokens=12).text == expected.text
