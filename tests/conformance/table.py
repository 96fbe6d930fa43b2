"""The table of backends and cases in docs/backends.md: ``python -m tests.conformance.table`` writes it, from what the tests declare."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from .cases import LACKING, YES, all_cases
from .subjects import SUBJECTS

PAGE = Path(__file__).parents[2] / "docs" / "backends.md"
BEGIN = "<!-- conformance: written by `python -m tests.conformance.table` -->"
END = "<!-- end of conformance -->"


def rows() -> Iterator[str]:
    """The table's lines, and the reasons that it refers to by number."""
    reasons: dict[str, int] = {}
    yield "| | " + " | ".join(subject.name for subject in SUBJECTS) + " |"
    yield "|---" * (len(SUBJECTS) + 1) + "|"
    for group, cases in groupby(all_cases(), key=lambda case: case.group):
        yield f"| **{group}** |" + " |" * len(SUBJECTS)
        for case in cases:
            cells = []
            for verdict, why in (case.verdict(subject) for subject in SUBJECTS):
                said = "-" if verdict == LACKING else verdict
                cells.append(said if verdict == YES else f"{said} ({reasons.setdefault(why, len(reasons) + 1)})")
            yield f"| {case.title} | {' | '.join(cells)} |"
    yield ""
    yield from (f"{number}. {why}" for why, number in reasons.items())


def written(page: str) -> str:
    """The page with the present table between its two markers."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page lacks the line {END if begin else BEGIN}")
    return "\n".join([before + begin, "", *rows(), "", end + after])


def main() -> None:
    """Write it."""
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
