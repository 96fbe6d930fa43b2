"""Write docs/api.md: every public name of zmqserve with its signature and docstring, read from the source by griffe.

python scripts/api_page.py          write it
python scripts/api_page.py --check  exit 1 if it is not what the source says
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
HEAD = """# The Python API

Made from the docstrings by `scripts/api_page.py`; a test keeps it true. Names here are importable from `zmqserve`, those under "Options"
from `zmqserve.asking` and `zmqserve.requests`, too. Durations end in `_s` (seconds) or `_ms` (milliseconds), sizes in `_bytes`.
"""
SECTIONS: dict[str, tuple[str, ...]] = {
    "Clients": ("Client", "AsyncClient", "PolledClient"),
    "Answers": (
        "Stream",
        "AsyncStream",
        "PolledStream",
        "Pending",
        "StreamChunk",
        "Completion",
        "CompletionChoice",
        "MapResult",
        "ServedModel",
    ),
    "Parameters": ("SamplingParams", "Guided", "EmbedParams", "ChatMessage"),
    "Options": ("asking.ClientOptions", "asking.RequestOptions", "asking.GenerateOptions", "asking.EmbedOptions"),
    "The controller": ("Controller", "ControllerConfig"),
    "Workers": ("BaseModelWorker", "WorkerConfig", "GenerateJob", "Delta", "Vectors", "ModelCard"),
}

_NAMES = re.compile(r"((?:[a-z_]+)(?:, [a-z_]+)*): ")
"""What begins a line on parameters."""


def main() -> int:
    """Write the page, or check it."""
    page = _page(griffe.load("zmqserve", search_paths=[str(ROOT)], allow_inspection=False))
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
        return 0
    if PAGE.read_text() == page:
        return 0
    sys.stderr.write("docs/api.md is not what the source says; run: python scripts/api_page.py\n")
    return 1


def _page(package: Any) -> str:
    """All of it, as Markdown."""
    public = [name for name in (package.exports or []) if name != "errors"]
    sections = SECTIONS | {"Into other programs": tuple(name for name in ("Bridge", "BridgeConfig") if name in public)}
    listed = {name for names in sections.values() for name in names}
    left = [name for name in map(str, public) if name not in listed]
    errors = [name for name in left if _is_error(_resolved(package, name))]
    strays = sorted(set(left) - set(errors))
    if strays:
        raise SystemExit(f"scripts/api_page.py: say in SECTIONS where {', '.join(strays)} belong")
    lines = [HEAD]
    for title, names in (sections | {"Errors": tuple(errors)}).items():
        if names:
            lines.append(f"## {title}\n")
        if title == "Errors":
            lines += ["```text", package["errors"].docstring.value.strip(), "```\n"]
        for name in names:
            lines += _class(name, _resolved(package, name))
    return "\n".join(lines).rstrip() + "\n"


def _resolved(package: Any, name: str) -> Any:
    found = package[name]
    return found.final_target if found.is_alias else found


def _is_error(found: Any) -> bool:
    return found.module.path.endswith(".errors")


def _class(name: str, found: Any) -> Iterator[str]:
    """A class: what it is, how it is made, what it has."""
    yield f"### {name.rpartition('.')[2]}\n"
    constructor = found.members.get("__init__")
    fields = [each for each in _members(found) if each.is_attribute and each.annotation is not None and "property" not in each.labels]
    if constructor is not None and not _is_error(found):
        yield _code(f"{found.name}{_parameters(constructor)}")
    elif fields and not _is_error(found):
        yield _code("\n".join(f"{member.name}: {member.annotation}{_default(member)}" for member in fields))
    yield _text(found)
    for member in _members(found):
        if member.is_function:
            kind = "async " if "async" in member.labels else ""
            shown = [f"{kind}{each.name}{_parameters(each)} -> {each.returns}" for each in member.overloads or [member]]
            yield f"**{name.rpartition('.')[2]}.{member.name}**\n"
            yield _code("\n".join(shown))
            yield _text(member)
        elif "property" in member.labels and member.docstring:
            yield f"**{name.rpartition('.')[2]}.{member.name}** (`{member.annotation}`)\n"
            yield _text(member)


def _members(found: Any) -> Iterator[Any]:
    """Public ones, inherited ones of this package too, in the order of the source."""
    members = dict(found.inherited_members)
    members.update(found.members)
    for name, member in members.items():
        if not name.startswith("_") and (member.docstring or not member.is_function):
            yield member.final_target if member.is_alias else member


def _parameters(function: Any) -> str:
    shown: list[str] = []
    starred = False
    for parameter in function.parameters:
        if parameter.name in {"self", "cls"}:
            continue
        kind = parameter.kind.value
        if kind == "keyword-only" and not starred:
            starred = True
            shown.append("*")
        star = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        starred = starred or star == "*"
        annotation = f": {parameter.annotation}" if parameter.annotation is not None else ""
        default = f" = {parameter.default}" if parameter.default is not None and not star else ""
        shown.append(f"{star}{parameter.name}{annotation}{default}")
    one = f"({', '.join(shown)})"
    return one if len(one) < 100 else "(\n    " + ",\n    ".join(shown) + ",\n)"


def _default(member: Any) -> str:
    return f" = {member.value}" if member.value is not None else ""


def _code(text: str) -> str:
    return f"```python\n{text}\n```\n"


def _text(found: Any) -> str:
    """A docstring; lines that begin with names and a colon become a list."""
    if not found.docstring:
        return ""
    lines: list[str] = []
    listing = False
    for line in found.docstring.value.strip().splitlines():
        names = _NAMES.match(line)
        if names is not None:
            if not listing and lines and lines[-1]:
                lines.append("")
            listing = True
            lines.append(f"- {', '.join(f'`{name}`' for name in names[1].split(', '))}: {line[names.end() :]}")
        else:
            listing = listing and bool(line)
            lines.append(f"  {line}" if listing else line)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
