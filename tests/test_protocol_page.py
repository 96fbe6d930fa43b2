"""PROTOCOL.md says what the code does: every message with its fields in order, every code, and a worked example that is right."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import NODEFAULT, Struct

from tests.vectors.generate import FILE
from zmqserve import messages as m
from zmqserve import params
from zmqserve.config import ControllerConfig
from zmqserve.deadlines import LATE_S
from zmqserve.errors import BY_CODE, BindFailed, ConnectionFailed, InvalidEndpoint, MemoryExceeded, ProtocolMismatch, Unauthenticated
from zmqserve.link import FRESH_SOCKET_S, LOAD_GAP_S, REGISTER_RETRY_S, SILENT_TTLS
from zmqserve.liveness import BEATS_PER_TTL
from zmqserve.relay import MAX_ENVELOPE
from zmqserve.session import Session
from zmqserve.worker import WorkerConfig

PAGE = (Path(__file__).parents[1] / "PROTOCOL.md").read_text()
GOLDEN = {entry["name"]: entry["hex"] for entry in json.loads(FILE.read_text())["messages"]}
SECTIONS = {match[1]: (match[2], match[3]) for match in re.finditer(r"^### (\w+) \((.+?)\)\n(.*?)(?=^##)", PAGE, re.MULTILINE | re.DOTALL)}
VIEWS = {m.Peek, m.RequestHeader}


def structs() -> list[type[Struct]]:
    found = [value for module in (m, params) for value in vars(module).values() if isinstance(value, type) and issubclass(value, Struct)]
    return [kind for kind in dict.fromkeys(found) if not kind.__name__.startswith("_") and kind not in VIEWS | {Struct}]


def rows(text: str) -> list[list[str]]:
    """Cells of a table's lines, without its heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def written(default: Any) -> str:
    """A default as the page writes it."""
    if default is NODEFAULT:
        return "required"
    value = default.factory() if hasattr(default, "factory") else default
    if isinstance(value, Struct):
        return "{}"
    if value is None or isinstance(value, bool):
        return {None: "nil", True: "true", False: "false"}[value]
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_every_type_has_a_section_and_every_section_a_type() -> None:
    assert set(SECTIONS) == {kind.__name__ for kind in structs()}


@pytest.mark.parametrize("kind", structs(), ids=lambda kind: kind.__name__)
def test_a_section_names_tag_fields_order_and_defaults(kind: type[Struct]) -> None:
    title, text = SECTIONS[kind.__name__]
    config = kind.__struct_config__
    if config.tag is not None:
        assert title == f"tag {config.tag}"
    else:
        assert (title == "map") is not config.array_like
    defaults = (NODEFAULT,) * (len(kind.__struct_fields__) - len(kind.__struct_defaults__)) + kind.__struct_defaults__
    expected = [(f"`{name}`", written(default)) for name, default in zip(kind.__struct_fields__, defaults, strict=True)]
    table = rows(text)
    if config.array_like:
        first = 0 if config.tag is None else 1
        assert [row[0] for row in table] == [str(number) for number in range(first, first + len(expected))]
        table = [row[1:] for row in table]
    assert [(row[0], row[2]) for row in table] == expected
    assert all(row[3] for row in table)


@pytest.mark.parametrize("kind", [params.SamplingParams, params.EmbedParams], ids=lambda kind: kind.__name__)
def test_the_range_of_each_number_is_told(kind: type[Struct]) -> None:
    told = {row[0].strip("`"): row[3] for row in rows(SECTIONS[kind.__name__][1])}
    for name in ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n"):
        if name in told:
            assert params._RANGES[name].text in told[name]


def test_kinds_are_listed_with_their_numbers() -> None:
    listed = {name: int(number) for number, name in re.findall(r"^\| (\d+) \| ([A-Z]+) \|", PAGE, re.MULTILINE)}
    kinds = ["READY", "LOAD", "BUSY", "DRAINING", "BYE", "FIRST", "MORE", "DONE", "FAILED"]
    kinds += ["WELCOME", "REFUSED", "REQUEST", "CANCEL", "BEAT", "REREGISTER", "DRAIN"]
    assert listed == {name: getattr(m, name) for name in kinds}


def test_error_codes_are_all_listed() -> None:
    listed = {
        int(code): (name, retryable)
        for code, name, retryable in re.findall(r"^\| (\d{5}) \| (\w+) \|.*\| (yes|no) \|$", PAGE, re.MULTILINE)
    }
    assert listed == {code: (cls.__name__, "yes" if cls.retryable else "no") for code, cls in BY_CODE.items()}


def test_codes_that_are_never_sent_are_those_of_what_a_program_finds_itself() -> None:
    """They are the ways to a controller, an endpoint, and why a controller ended."""
    found = re.search(r"^40000 and 40103 come in Refused only\. (.*) are not sent:", PAGE, re.MULTILINE)
    assert found is not None
    own = {code for code, cls in BY_CODE.items() if issubclass(cls, ConnectionFailed | InvalidEndpoint | BindFailed | MemoryExceeded)}
    assert {int(code) for code in re.findall(r"\d{5}", found[1])} == own - {ProtocolMismatch.code, Unauthenticated.code}


def test_times_are_the_defaults() -> None:
    text = PAGE[PAGE.index("\n## Times\n") : PAGE.index("\n## Versions\n")]
    told = {row[0]: row[1] for row in rows(text)}
    config, worker, client = ControllerConfig(), WorkerConfig(), inspect.signature(Session).parameters["ttl_s"].default
    expected = {
        "a controller's ttl": f"{config.ttl_s:g} s",
        "a worker's ttl": f"{worker.ttl_s:g} s",
        "a client's ttl": f"{client:g} s",
        "between two LOADs": f"{LOAD_GAP_S * 1000:g} ms",
        "READY again": f"{REGISTER_RETRY_S:g} s",
        "a worker's fresh socket": f"{SILENT_TTLS} ttl, then {FRESH_SOCKET_S[0]:g}-{FRESH_SOCKET_S[1]:g} s",
        "a request without a deadline": f"{config.default_deadline_s:g} s",
        "after a deadline": f"{LATE_S:g} s",
        "after a Cancel": f"{config.cancel_timeout_s:g} s",
        "an engine that does not step": f"{config.stall_s:g} s",
        "requests wait for a model": f"{config.orphan_grace_s:g} s",
        "a drained worker's grace": f"{config.drain_grace_s:g} s",
        "a ZMTP handshake": "1 s",
    }
    assert len(told) == len(expected)
    assert {key: value for key in expected for what, value in told.items() if what.startswith(key)} == expected
    assert text.count("every third of it") == BEATS_PER_TTL


def test_numbers_in_the_prose_are_the_codes() -> None:
    assert f"the same; up to {MAX_ENVELOPE} envelope frames in all" in PAGE
    assert len(m.Generate.__struct_fields__) + 1 == 16
    assert len(m.RequestHeader.__struct_fields__) - 1 == 8


def test_the_worked_example_is_made_of_golden_bytes() -> None:
    blocks = re.findall(r"^```\n(.*?)^```", PAGE[PAGE.index("## Worked example") :], re.MULTILINE | re.DOTALL)
    whole = [GOLDEN["generate-prompt"], GOLDEN["head-request-minimal"], GOLDEN["chunk-text"]]
    for block, golden in zip(blocks, whole, strict=True):
        lines = block.splitlines()
        if lines[0] == golden:
            del lines[0]
        parts = [match[1] for line in lines if (match := re.match(r" *((?:(?:[0-9a-f]{2})+ ?)+)(?: |$)", line))]
        assert "".join(parts).replace(" ", "") == golden
    short = {entry["name"]: entry.get("short") for entry in json.loads(FILE.read_text())["messages"]}["generate-prompt"]
    assert f"`{short}`" in PAGE
    assert f"`{m.more_head(0x0123456789ABCDEF, 7).hex()}`" in PAGE
    assert msgspec.msgpack.decode(bytes.fromhex("9347cf0123456789abcdef07")) == [71, 0x0123456789ABCDEF, 7]


def test_links_inside_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#(.+?)\)", PAGE)) <= anchors
