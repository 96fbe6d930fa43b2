"""The wire: golden bytes that never change, old and new peers that understand each other, hostile bytes that are a typed error."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct

from tests.vectors.generate import EXAMPLES, FILE, MORE_HEADS, Example, same, short, vector
from zmqserve import messages as m
from zmqserve import params
from zmqserve.errors import InvalidParameter, MalformedMessage, RequestError

GOLDEN = {entry["name"]: entry for entry in json.loads(FILE.read_text())["messages"]}
BY_NAME = {example.name: example.value for example in EXAMPLES}
VIEWS = {m.Peek, m.RequestHeader}
HEADS = {m.WorkerHead, m.ControllerHead}
FROM_CLIENT, TO_CLIENT = m.decoder(m.FromClient), m.decoder(m.ToClient)
PAYLOADS = [m.Ready, m.Load, m.WorkerWelcome, m.Refused]
DECODERS = [FROM_CLIENT, TO_CLIENT, m.decoder(m.Request), *(m.decoder(kind) for kind in [*PAYLOADS, *HEADS, *VIEWS, m.ModelCard])]

each_example = pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
each_array = pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if example.value.__struct_config__.array_like], ids=lambda example: example.name
)
each_map = pytest.mark.parametrize(
    "example", [example for example in EXAMPLES if not example.value.__struct_config__.array_like], ids=lambda example: example.name
)


def structs() -> set[type[Struct]]:
    """All types that travel."""
    found = [value for module in (m, params) for value in vars(module).values() if isinstance(value, type) and issubclass(value, Struct)]
    return {kind for kind in found if not kind.__name__.startswith("_") and kind is not Struct} - VIEWS


def inside(value: object) -> set[type[Struct]]:
    """The types that a message is made of, its own included."""
    if isinstance(value, Struct):
        parts = (getattr(value, name) for name in value.__struct_fields__)
        return {type(value)}.union(*(inside(part) for part in parts))
    return set().union(*(inside(item) for item in value)) if isinstance(value, list | tuple) else set()


def readers(value: Struct) -> list[msgspec.msgpack.Decoder[Any]]:
    """The decoders that meet this message in a network: the union of its socket, and its own type."""
    unions = [using for using, union in ((FROM_CLIENT, m.FromClient), (TO_CLIENT, m.ToClient)) if type(value) in _members(union)]
    return [*unions, m.decoder(type(value))]


def _members(union: Any) -> set[type[Struct]]:
    return set(get_args(union))


def raw_array(value: Struct) -> list[Any]:
    array: list[Any] = msgspec.msgpack.decode(m.encode(value))
    return array


# --- golden bytes ------------------------------------------------------------------------------


def test_every_type_has_a_golden_message() -> None:
    covered = set().union(*(inside(example.value) for example in EXAMPLES))
    assert covered == structs()
    alone = {type(example.value) for example in EXAMPLES}
    assert _members(m.FromClient) | _members(m.ToClient) | HEADS | set(PAYLOADS) <= alone


def test_examples_and_vectors_are_the_same_set() -> None:
    assert list(GOLDEN) == [example.name for example in EXAMPLES], "run python -m tests.vectors.generate, once, for a new message"


@each_example
def test_a_message_encodes_to_its_golden_bytes_and_back(example: Example) -> None:
    golden = GOLDEN[example.name]
    data = bytes.fromhex(golden["hex"])
    assert same(golden, vector(example))
    assert type(example.value).__name__ == golden["type"]
    for using in readers(example.value):
        assert m.read(using, data) == example.value


@each_example
def test_the_shortest_form_means_the_same(example: Example) -> None:
    golden = GOLDEN[example.name]
    shortest = short(example.value)
    assert golden.get("short") == (shortest.hex() if shortest else None)
    for using in readers(example.value) if shortest else []:
        assert m.read(using, shortest or b"") == example.value


def test_more_heads_are_canonical() -> None:
    golden = json.loads(FILE.read_text())["more_heads"]
    assert [(entry["epoch"], entry["client"]) for entry in golden] == MORE_HEADS
    head = m.decoder(m.WorkerHead)
    for entry in golden:
        data = bytes.fromhex(entry["hex"])
        assert m.more_head(entry["epoch"], entry["client"]) == data
        assert m.read(head, data) == m.WorkerHead(m.MORE, entry["epoch"], entry["client"])
        assert m.read(head, m.encode(m.WorkerHead(m.MORE, entry["epoch"], entry["client"]))) == m.read(head, data)


def test_tags_and_kinds_are_distinct_and_say_who_sends() -> None:
    """One number, one meaning: a payload taken for a head, or a message on the wrong socket, is told apart by its tag."""
    tags = {kind: kind.__struct_config__.tag for kind in _members(m.FromClient) | _members(m.ToClient)}
    assert len(set(tags.values())) == len(tags)
    assert all(tags[kind] in range(1, 32) for kind in _members(m.FromClient))
    assert all(tags[kind] in range(33, 64) for kind in _members(m.ToClient))
    kinds = [m.READY, m.LOAD, m.BUSY, m.DRAINING, m.BYE, m.FIRST, m.MORE, m.DONE, m.FAILED]
    kinds += [m.WELCOME, m.REFUSED, m.REQUEST, m.CANCEL, m.BEAT, m.REREGISTER, m.DRAIN]
    assert kinds == [*range(65, 74), *range(97, 104)]


# --- old reads new, new reads old --------------------------------------------------------------


@each_array
@pytest.mark.parametrize("extra", [None, 7, "x", [1, {"a": b"b"}], {"k": [[]]}])
def test_an_old_reader_ignores_fields_that_it_does_not_know(example: Example, extra: object) -> None:
    data = m.encode([*raw_array(example.value), extra, extra])
    for using in readers(example.value):
        assert m.read(using, data) == example.value


@each_map
def test_an_old_reader_ignores_keys_that_it_does_not_know_except_in_parameters(example: Example) -> None:
    wire = {**msgspec.msgpack.decode(m.encode(example.value)), "from_the_future": [1]}
    using = m.decoder(type(example.value))
    if example.value.__struct_config__.forbid_unknown_fields:
        with pytest.raises(RequestError, match="from_the_future"):
            m.read(using, m.encode(wire))
    else:
        assert m.read(using, m.encode(wire)) == example.value


@each_array
def test_a_new_reader_takes_defaults_for_fields_that_an_old_peer_leaves_out(example: Example) -> None:
    value, array = example.value, raw_array(example.value)
    defaults = value.__struct_defaults__
    required = len(array) - len(defaults)
    for length in range(required, len(array)):
        expected = [getattr(value, name) for name in value.__struct_fields__]
        cut = len(array) - length
        expected[len(expected) - cut :] = [_default(default) for default in defaults[len(defaults) - cut :]]
        for using in readers(value):
            assert m.read(using, m.encode(array[:length])) == type(value)(*expected)
    if required > 1:
        with pytest.raises(MalformedMessage, match=type(value).__name__):
            m.read(readers(value)[0], m.encode(array[: required - 1]))


def _default(default: Any) -> Any:
    return default.factory() if hasattr(default, "factory") else default


# --- views -------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [e for e in EXAMPLES if type(e.value) in _members(m.Request)], ids=lambda e: e.name)
def test_the_header_view_reads_every_request(example: Example) -> None:
    for data in filter(None, (m.encode(example.value), short(example.value))):
        header = m.read(m.decoder(m.RequestHeader), data)
        leading = m.RequestHeader.__struct_fields__[1:]
        assert {name: getattr(header, name) for name in leading} == {name: getattr(example.value, name) for name in leading}
        assert header.tag == type(example.value).__struct_config__.tag
        assert header.tag in m.VERBS


def test_requests_begin_with_the_header_and_verbs_are_the_requests() -> None:
    leading = m.RequestHeader.__struct_fields__[1:]
    for kind in _members(m.Request):
        assert kind.__struct_fields__[: len(leading)] == leading
    assert set(m.VERBS) == {kind.__struct_config__.tag for kind in _members(m.Request)}


@pytest.mark.parametrize("example", [e for e in EXAMPLES if "rid" in e.value.__struct_fields__[:1]], ids=lambda e: e.name)
def test_peek_tells_the_rid_of_whatever_has_one(example: Example) -> None:
    peek = m.read(m.decoder(m.Peek), m.encode(example.value))
    assert peek == m.Peek(example.value.__struct_config__.tag, example.value.rid)  # type: ignore[arg-type, attr-defined]


def test_a_view_does_not_look_at_what_comes_after() -> None:
    """A controller forwards what it does not understand: only the worker judges the rest of a request."""
    data = m.encode([2, 9, "m", 0, None, None, 0, None, None, "not a bool", 5, {"no": "list"}])
    assert m.read(m.decoder(m.RequestHeader), data).rid == 9
    with pytest.raises(MalformedMessage):
        m.read(FROM_CLIENT, data)


# --- what is wrong is named --------------------------------------------------------------------


WRONG = [
    ([99, 1], "unknown message tag 99"),
    (["hello"], "Expected `int`"),
    ({"tag": 2}, "Expected `array`"),
    (None, "Expected `array`"),
    ([1, "one"], r"^Hello\.protocol: Expected `int`, got `str`"),
    ([2, 0, "m"], r"^Generate\.rid: Expected `int` >= 1"),
    ([2, 2**63, "m"], r"^Generate\.rid: Expected `int` <= 9223372036854775807"),
    ([2, -1, "m"], r"^Generate\.rid: "),
    ([2, 1, ""], r"^Generate\.model: Expected `str` of length >= 1"),
    ([2, 1, "m" * 257], r"^Generate\.model: Expected `str` of length <= 256"),
    ([2, 1, "m", 101], r"^Generate\.priority: Expected `int` <= 100"),
    ([2, 1, "m", -101], r"^Generate\.priority: Expected `int` >= -100"),
    ([2, 1, "m", 0, 0], r"^Generate\.deadline_ms: Expected `int` >= 1"),
    ([2, 1, "m", 0, 2**53 + 1], r"^Generate\.deadline_ms: "),
    ([2, 1, "m", 0, None, "a" * 257], r"^Generate\.affinity: "),
    ([2, 1, "m", 0, None, None, -1], r"^Generate\.attempts: "),
    ([2, 1, "m", 0, None, None, 0, None, None, True, b"prompt"], r"^Generate\.prompt: Expected `str \| null`, got `bytes`"),
    ([2, 1, "m", 0, None, None, 0, None, None, True, None, [["", "x"]]], r"^Generate\.messages\[0\]\[0\]: "),
    ([3, 1, "m", 0, None, None, 0, None, None, ["ok", 5]], r"^Embed\.texts\[1\]: Expected `str`, got `int`"),
    ([8, 1, "w", 0], r"^Drain\.grace_ms: "),
    ([9], r"^Cancel: "),
    ([10, 0], r"^Ping\.ttl_ms: "),
    ([10, 3000, [1, 0]], r"^Ping\.rids\[1\]: "),
]


@pytest.mark.parametrize(("wire", "message"), WRONG)
def test_a_wrong_field_is_named_with_its_message(wire: object, message: str) -> None:
    with pytest.raises(MalformedMessage, match=message):
        m.read(FROM_CLIENT, m.encode(wire))


def test_parameters_in_a_message_are_named_like_those_of_the_sdk() -> None:
    leading = [1, "m", 0, None, None, 0, None, None]
    for wire, parameter in [
        ([2, *leading, True, "x", None, None, {"top_p": 2}], "top_p"),
        ([2, *leading, True, "x", None, None, {"top_p": "high"}], "top_p"),
        ([2, *leading, True, "x", None, None, {"stop": ["a", 5]}], "stop"),
        ([2, *leading, True, "x", None, None, {5: 5}], "params"),
        ([2, *leading, True, "x", None, None, []], "params"),
        ([3, *leading, ["x"], {"dimensions": 0}], "dimensions"),
    ]:
        with pytest.raises(InvalidParameter, match=rf"^{parameter}\b") as caught:
            m.read(FROM_CLIENT, m.encode(wire))
        assert caught.value.parameter == parameter


@pytest.mark.parametrize("kind", [33, 65, 71, 97, 0, -1, 2**40])
def test_a_tag_of_another_socket_is_unknown(kind: int) -> None:
    with pytest.raises(MalformedMessage, match=f"unknown message tag {kind}"):
        m.read(FROM_CLIENT, m.encode([kind, 1, 2]))


def test_unknown_kinds_of_a_head_are_read_and_left_to_the_state_machine() -> None:
    assert m.read(m.decoder(m.WorkerHead), m.encode([250, 1])).kind == 250
    assert m.read(m.decoder(m.ControllerHead), m.encode([250, 1])).kind == 250


# --- hostile bytes -----------------------------------------------------------------------------


def only_a_typed_error(data: bytes) -> None:
    for using in DECODERS:
        try:
            m.read(using, data)
        except RequestError as error:
            assert 0 < len(str(error)) < 2000  # noqa: PT017 - most bytes are an error, some are a message, and both are right


@each_example
def test_a_message_cut_at_any_byte_is_a_typed_error(example: Example) -> None:
    data = m.encode(example.value)
    for length in range(len(data)):
        for using in readers(example.value):
            with pytest.raises(RequestError):
                m.read(using, data[:length])
        only_a_typed_error(data[:length])


@each_example
def test_bytes_after_a_message_are_a_typed_error(example: Example) -> None:
    with pytest.raises(MalformedMessage):
        m.read(readers(example.value)[0], m.encode(example.value) + b"\xc0")


@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1a", b"\x92\x01", b"\xdc\x00\x01", b"\x92\x0a\x01\x91"])
@pytest.mark.parametrize(
    "prefix", [b"", b"\x93\x02\x01", b"\xdc\x00\x10\x02\x01\xa1m\x00\xc0\xc0\x00\xc0\xc0\xc3\xc0\xc0\xc0\x80\xc0\x81\xa1x"]
)
def test_deep_nesting_is_a_typed_error(opening: bytes, prefix: bytes) -> None:
    only_a_typed_error(prefix + opening * 100_000)
    with pytest.raises(MalformedMessage):
        m.read(FROM_CLIENT, prefix + opening * 100_000)


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\xff" * 64, b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x92\x01\xd9\x02\xff\xfe"]
)
def test_garbage_is_a_typed_error(data: bytes) -> None:
    """Among them: a byte that msgpack never uses, lengths far over the message's own, and text that is not UTF-8."""
    with pytest.raises(MalformedMessage):
        m.read(FROM_CLIENT, data)
    only_a_typed_error(data)


def test_text_that_is_not_utf8_is_a_typed_error_in_every_place() -> None:
    for data in (b"\x93\x02\x01\xa2\xff\xfe", b"\x92\x23\xa1\xff", b"\x99\x04\x01\xa1m\x00\xc0\xa1\xff\x00\xc0\xc0"):
        only_a_typed_error(data)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_random_bytes_are_a_typed_error(data: bytes) -> None:
    only_a_typed_error(data)


@given(st.data())
@settings(max_examples=1000)
def test_a_mutated_message_is_read_or_is_a_typed_error(data: st.DataObject) -> None:
    golden = bytearray.fromhex(data.draw(st.sampled_from(list(GOLDEN.values())))["hex"])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(golden) - 1)) if golden else 0
        match data.draw(st.sampled_from(["set", "insert", "delete"])):
            case "set" if golden:
                golden[place] = data.draw(st.integers(0, 255))
            case "delete" if golden:
                del golden[place]
            case _:
                golden[place:place] = data.draw(st.binary(min_size=1, max_size=4))
    only_a_typed_error(bytes(golden))


# --- token ids ---------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_token_ids_survive_the_wire(ids: list[int]) -> None:
    packed = m.pack_ids(ids)
    assert packed == b"".join(i.to_bytes(4, "little") for i in ids)
    assert m.unpack_ids(packed) == ids


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_token_ids_that_are_no_whole_u32_are_refused(size: int) -> None:
    with pytest.raises(MalformedMessage, match=f"4 bytes each: got {size} bytes"):
        m.unpack_ids(bytes(size))
