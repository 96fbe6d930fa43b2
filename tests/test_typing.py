"""A user's program passes mypy and pyright, both strict; wrong uses are flagged by both. basedpyright is pyright in a wheel of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = ("right_uses.py", "wrong_uses.py")

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package as it lies when it is installed, and the programs beside it."""
    folder = tmp_path_factory.mktemp("user")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "zmqserve", folder / "lib" / "zmqserve", ignore=ignored)
    shutil.copytree(ROOT / "backends", folder / "lib" / "zmqserve" / "backends", ignore=ignored)
    for program in PROGRAMS:
        shutil.copy(ROOT / "tests" / "typing" / program, folder)
    return folder


def test_mypy_strict(installed: Path) -> None:
    options = ("--strict", "--follow-imports=silent", "--no-incremental", "--no-error-summary", "--config-file=")
    command = [sys.executable, "-m", "mypy", *options, *PROGRAMS]
    env = os.environ | {"MYPYPATH": str(installed / "lib")}
    checked = subprocess.run(command, check=False, cwd=installed, env=env, capture_output=True, text=True, timeout=300)
    assert (checked.stdout, checked.stderr, checked.returncode) == ("", "", 0)


def test_pyright_strict(installed: Path) -> None:
    settings = {
        "include": list(PROGRAMS),
        "extraPaths": ["lib"],
        "typeCheckingMode": "strict",
        "enableTypeIgnoreComments": False,
        "reportUnnecessaryTypeIgnoreComment": "error",
    }
    (installed / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    checked = subprocess.run(command, check=False, cwd=installed, capture_output=True, text=True, timeout=300)
    found = json.loads(checked.stdout)["generalDiagnostics"]
    told = [f"{Path(each['file']).name}:{each['range']['start']['line'] + 1}: {each['message']} ({each.get('rule')})" for each in found]
    assert told == []
