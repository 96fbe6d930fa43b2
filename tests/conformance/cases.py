"""How a case of the suite is declared: what it needs of a backend, and which parameters it shows to be honoured.

Declarations decide which backends run a case, what `test_ignored.py` takes away from it, and what the table in docs/backends.md says.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
from _pytest.mark import ParameterSet

from .network import Network
from .subjects import SUBJECTS, Role, Subject

Check = Callable[[Network], None]

YES, REFUSED, LACKING = "yes", "refused", "no"


class Case(NamedTuple):
    """One behaviour. `needs` names parameters, forms of a prompt and capabilities; `shows` those parameters whose loss it notices."""

    group: str
    title: str
    needs: frozenset[str]
    shows: frozenset[str]
    role: Role
    check: Check

    def verdict(self, subject: Subject) -> tuple[str, str]:
        """Whether the subject runs it (``yes``), refuses it by a typed error (``refused``) or lacks something it needs (``no``); why."""
        for name in sorted(self.needs):
            if name in subject.lacks:
                return LACKING, subject.lacks[name]
        for name in sorted(self.needs):
            if name in subject.refuses:
                return REFUSED, subject.refuses[name]
        return YES, ""

    def runs(self) -> list[Subject]:
        """Who runs it."""
        return [subject for subject in SUBJECTS if self.verdict(subject)[0] == YES]


GROUPS = (
    "streaming",
    "finishing",
    "sampling",
    "choices",
    "logprobs",
    "prompts",
    "text",
    "guided",
    "errors",
    "cancel",
    "resume",
    "details",
    "embeddings",
)
"""In the table's order; each is a module ``test_GROUP.py``."""
_declared: list[Case] = []


def all_cases() -> list[Case]:
    """Every case of the suite, in the table's order."""
    for group in GROUPS:
        importlib.import_module(f"{__package__}.test_{group}")
    return sorted(_declared, key=lambda declared: GROUPS.index(declared.group))


def case(title: str, *, shows: Iterable[str] = (), needs: Iterable[str] = (), role: Role = "generate") -> Callable[[Check], Check]:
    """Declare a test that takes `network` and nothing else, for every backend that can run it."""

    def declare(check: Check) -> Check:
        group = check.__module__.rpartition(".test_")[2]
        declared = Case(group, title, frozenset(needs) | frozenset(shows), frozenset(shows), role, check)
        _declared.append(declared)
        return pytest.mark.parametrize("network", [place(subject, role) for subject in declared.runs()], indirect=True)(check)

    return declare


def place(subject: Subject, role: Role) -> ParameterSet:
    """The subject's worker for this role, as a parameter of the fixture `network`."""
    role = role if subject.embeds_apart else "generate"
    marks = [getattr(pytest.mark, name) for name in subject.marks]
    return pytest.param((subject, role), id=subject.name, marks=[*marks, pytest.mark.timeout(subject.patience_s)])
