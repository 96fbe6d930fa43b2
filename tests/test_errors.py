"""The error tree: distinct codes, the way over the wire and back, and a docstring that stays true."""

from __future__ import annotations

import errno
import re

import pytest

from zmqserve import errors
from zmqserve.errors import BY_CODE, ZmqserveError, from_wire


def classes() -> list[type[ZmqserveError]]:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, ZmqserveError)]
    assert ZmqserveError in found
    return found


def drawn() -> list[tuple[int, str, int | None]]:
    """(depth, name, code) of each line of the tree in the module's docstring; the code is the line's only 5-digit number."""
    lines = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"    ([│ ├└─]*)([A-Z]\w+)\b(.*)", line)
        if found:
            code = re.search(r"\b[45]\d{4}\b", found[3])
            lines.append((len(found[1]) // 4, found[2], int(code[0]) if code else None))
    return lines


def test_every_class_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in classes()]
    assert len(codes) == len(set(codes))
    assert set(codes) == set(BY_CODE)
    assert all(BY_CODE[cls.code] is cls for cls in classes())


def test_the_docstring_draws_exactly_the_tree_that_exists() -> None:
    parents: list[str] = []
    tree = set()
    for depth, name, _ in drawn():
        parents[depth:] = [name]
        tree.add((name, parents[depth - 1] if depth else None))
    actual = {(cls.__name__, next((base.__name__ for base in cls.__bases__ if issubclass(base, ZmqserveError)), None)) for cls in classes()}
    assert tree == actual


def test_the_docstring_gives_every_leaf_its_code() -> None:
    codes = {name: code for _, name, code in drawn()}
    for cls in classes():
        if codes[cls.__name__] is not None or not cls.__subclasses__():
            assert codes[cls.__name__] == cls.code, cls.__name__


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_an_error_crosses_the_wire_unchanged(cls: type[ZmqserveError]) -> None:
    data: errors.Data = {"known_models": ["a", "b"], "parameter": "top_p", "context_length": 8192, "tokens": 9000, "share": 0.5}
    error = from_wire(cls.code, "what went wrong", cls.retryable, 250, data)
    assert type(error) is cls
    assert (str(error), error.message, error.retry_after_ms, error.data) == ("what went wrong", "what went wrong", 250, data)
    assert error.retryable is cls.retryable
    with pytest.raises(cls, match="what went wrong"):
        raise error


def test_the_sender_says_whether_an_error_is_retryable() -> None:
    """A poison prompt ends as WorkerLost, not retryable, though worker loss usually is."""
    error = from_wire(errors.WorkerLost.code, "lost two workers", False, None, {})
    assert isinstance(error, errors.WorkerLost)
    assert not error.retryable
    assert errors.WorkerLost.retryable


def test_an_unknown_code_is_the_base_class_and_is_named() -> None:
    error = from_wire(49999, "from the future", True, 10, {"k": 1})
    assert type(error) is ZmqserveError
    assert str(error) == "from the future (error 49999)"
    assert error.retryable
    assert error.data == {"k": 1}


def test_data_is_reachable_by_name() -> None:
    unknown = from_wire(errors.UnknownModel.code, "", False, None, {"known_models": ["a"]})
    overflow = from_wire(errors.ContextOverflow.code, "", False, None, {"context_length": 8192, "tokens": 9000})
    invalid = from_wire(errors.InvalidParameter.code, "", False, None, {"parameter": "n"})
    assert isinstance(unknown, errors.UnknownModel)
    assert unknown.known_models == ["a"]
    assert isinstance(overflow, errors.ContextOverflow)
    assert (overflow.context_length, overflow.tokens) == (8192, 9000)
    assert isinstance(invalid, errors.InvalidParameter)
    assert invalid.parameter == "n"
    assert isinstance(invalid, ValueError)


@pytest.mark.parametrize("data", [{}, {"known_models": 3, "context_length": "many", "tokens": ["x"], "parameter": 7}])
def test_missing_or_wrong_data_never_raises(data: dict[str, str | int | list[str]]) -> None:
    unknown = from_wire(errors.UnknownModel.code, "", False, None, data)
    overflow = from_wire(errors.ContextOverflow.code, "", False, None, data)
    invalid = from_wire(errors.InvalidParameter.code, "", False, None, data)
    assert isinstance(unknown, errors.UnknownModel)
    assert unknown.known_models == []
    assert isinstance(overflow, errors.ContextOverflow)
    assert (overflow.context_length, overflow.tokens) == (0, 0)
    assert isinstance(invalid, errors.InvalidParameter)
    assert invalid.parameter == str(data.get("parameter", ""))


def test_errors_that_compose_their_message_name_the_value_and_the_way_out() -> None:
    endpoint = errors.InvalidEndpoint("tcp:/x", "expected tcp://HOST:PORT")
    assert str(endpoint) == "'tcp:/x' is not a usable endpoint: expected tcp://HOST:PORT"
    assert endpoint.parameter == "endpoint"
    bound = errors.BindFailed("tcp://127.0.0.1:5570", "Address already in use", 98)
    assert str(bound) == "cannot bind tcp://127.0.0.1:5570: Address already in use; stop that process or choose another endpoint"
    assert bound.data == {"endpoint": "tcp://127.0.0.1:5570", "errno": 98}
    elsewhere = errors.BindFailed("tcp://192.0.2.1:5570", "Cannot assign requested address", errno.EADDRNOTAVAIL)
    assert str(elsewhere).endswith("; give an address of this machine, or * for all that it has")
