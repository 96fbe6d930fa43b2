"""The golden messages as a stranger reads them: with another msgpack library and their README alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgpack
import pytest

FOLDER = Path(__file__).parent / "vectors"
PAGE = (FOLDER.parents[1] / "PROTOCOL.md").read_text()
FILES = {name: json.loads((FOLDER / name).read_text()) for name in ("v1.json", "first.json")}
ENTRIES = [pytest.param(entry, id=f"{name}-{entry['name']}") for name, file in FILES.items() for entry in file["messages"]]


def unpacked(data: str) -> Any:
    return msgpack.unpackb(bytes.fromhex(data), strict_map_key=True)


def says(wire: Any, fields: Any, *, raw: bool = False) -> bool:
    """Whether a decoded message has this content."""
    if raw:
        return bool(msgpack.packb(wire).hex() == fields)
    if isinstance(fields, dict) and isinstance(wire, list):
        tags = len(wire) - len(fields)
        values = zip(wire[tags:], fields.items(), strict=True)
        return 0 <= tags <= 1 and all(says_field(value, name, field) for value, (name, field) in values)
    if isinstance(fields, dict) and isinstance(wire, dict):
        return wire.keys() <= fields.keys() and all(says_field(value, name, fields[name]) for name, value in wire.items())
    if isinstance(fields, list):
        return len(wire) == len(fields) and all(map(says, wire, fields))
    if isinstance(wire, bytes):
        return bool(wire.hex() == fields)
    return type(wire) is type(fields) and bool(wire == fields)


def says_field(wire: Any, name: str, field: Any) -> bool:
    if name == "extra" and field is not None:
        return wire.keys() == field.keys() and all(says(value, field[key], raw=True) for key, value in wire.items())
    return says(wire, field)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_message_holds_what_its_fields_say(entry: dict[str, Any]) -> None:
    assert says(unpacked(entry["hex"]), entry["fields"])
    assert re.search(rf"^### {entry['type']} \(", PAGE, re.MULTILINE)


@pytest.mark.parametrize("entry", [param for param in ENTRIES if "short" in param.values[0]])  # type: ignore[operator]
def test_the_short_form_is_the_same_array_without_its_end(entry: dict[str, Any]) -> None:
    whole, short = unpacked(entry["hex"]), unpacked(entry["short"])
    assert len(short) < len(whole)
    assert whole[: len(short)] == short


def test_more_heads_are_an_epoch_and_a_client() -> None:
    for head in FILES["v1.json"]["more_heads"]:
        assert msgpack.packb([71, head["epoch"], head["client"]]).hex() == head["hex"]


def test_the_first_messages_are_still_among_todays() -> None:
    names = {entry["name"] for entry in FILES["v1.json"]["messages"]}
    assert {entry["name"] for entry in FILES["first.json"]["messages"]} <= names


def test_the_readme_names_every_key() -> None:
    readme = (FOLDER / "README.md").read_text()
    keys = {key for file in FILES.values() for key in file} | {key for param in ENTRIES for key in param.values[0]}  # type: ignore[union-attr]
    assert [key for key in keys if f"`{key}`" not in readme] == []
