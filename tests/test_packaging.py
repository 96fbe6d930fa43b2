"""What gets installed: the wheel built from the sdist, in a fresh environment, away from the source tree."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "transformers", "vllm", "numpy", "rich", "huggingface_hub", "gguf"}

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; its error output is the failure's text."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel that was built from it, from a copy without what git ignores."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ["zmqserve", "backends"]:
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                target = source / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the wheel, and sees the libraries of this one behind it."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home, with_pip=False, symlinks=True)
    interpreter = home / "bin" / "python"
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=home)
    # A plain path line: the .pth files of that folder are not read, so this checkout's editable install stays out.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    where = run(interpreter, "-c", "import zmqserve; print(zmqserve.__file__)", cwd=home).strip()
    assert Path(where).is_relative_to(site)
    return interpreter


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"zmqserve-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"zmqserve", info}
    modules = {f"zmqserve/{path.name}" for path in (ROOT / "zmqserve").glob("*.py")}
    modules |= {f"zmqserve/backends/{path.name}" for path in (ROOT / "backends").glob("*.py")}
    assert {name for name in names if name.startswith("zmqserve/")} == modules | {"zmqserve/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_the_sdist_builds_and_keeps_the_layout_of_the_repository(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"zmqserve/__init__.py", "zmqserve/py.typed", "backends/echo.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not any(name.startswith("zmqserve/backends") for name in names)


def test_metadata_names_the_core_dependencies_and_the_extras(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
    lines = archive.read(name).decode().splitlines()
    required = {line.split()[1].split(">")[0] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line}
    assert required == {"msgspec", "pyzmq", "structlog"}
    extras = {line.split()[1] for line in lines if line.startswith("Provides-Extra: ")}
    assert extras == {"transformers", "hf", "vllm", "embeddings", "bench", "node", "dev"}


def test_nothing_named_backends_is_importable(python: Path, tmp_path: Path) -> None:
    run(python, "-c", "import importlib.util, sys; sys.exit(importlib.util.find_spec('backends') is not None)", cwd=tmp_path)


def test_importing_zmqserve_stays_light(python: Path, tmp_path: Path) -> None:
    """Nothing heavy beyond what its dependencies bring: structlog imports rich where that is installed."""

    def loaded(code: str) -> set[str]:
        printed = run(python, "-c", f"import sys, {code}; print(*sys.modules)", cwd=tmp_path)
        return {name.split(".")[0] for name in printed.split()}

    everything = loaded("zmqserve; [getattr(zmqserve, name) for name in zmqserve.__all__]")
    assert not (everything - loaded("zmq, msgspec, structlog")) & HEAVY


def test_importing_a_backend_module_needs_no_model_library(python: Path, tmp_path: Path) -> None:
    code = """
import sys, zmqserve.backends.echo as echo, zmqserve.backends.transformers_worker, zmqserve.backends.vllm_worker
print(echo.__file__, *sorted(sys.modules))
"""
    file, *loaded = run(python, "-c", code, cwd=tmp_path).split()
    assert Path(file).parent.name == "backends"
    assert Path(file).parent.parent.name == "zmqserve"
    assert not {name.split(".")[0] for name in loaded} & {"torch", "transformers", "vllm"}


def test_entry_points_name_workers(python: Path, tmp_path: Path) -> None:
    code = """
from importlib.metadata import entry_points
from zmqserve import BaseModelWorker
for point in sorted(entry_points(group="zmqserve.backends")):
    worker = point.load()
    assert issubclass(worker, BaseModelWorker), worker
    print(point.name, worker.__name__)
"""
    names = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert names == ["echo EchoWorker", "hf HuggingfaceApiWorker", "transformers ModelWorker", "vllm VLLMWorker"]


def test_the_command_and_the_module_are_the_same_program(python: Path, tmp_path: Path) -> None:
    code = "from importlib.metadata import entry_points as e; e(group='console_scripts', name='zmqserve')['zmqserve'].load()(['--version'])"
    told = [run(python, *command, cwd=tmp_path) for command in (["-m", "zmqserve", "--version"], ["-c", code])]
    assert all(PROJECT["version"] in line for line in told)


def test_a_type_checker_of_a_user_sees_the_types(python: Path, tmp_path: Path) -> None:
    code = "from zmqserve import Client\nfrom zmqserve.backends.echo import EchoWorker\nreveal_type(Client)\nreveal_type(EchoWorker.load)\n"
    (tmp_path / "user.py").write_text(code)
    told = run(sys.executable, "-m", "mypy", "--python-executable", python, "--cache-dir", tmp_path / "cache", "user.py", cwd=tmp_path)
    revealed = [line for line in told.splitlines() if "Revealed type" in line]
    assert len(revealed) == 2
    assert not any('"Any"' in line for line in revealed)
    assert "zmqserve.backends.echo.EchoWorker" in revealed[1]
