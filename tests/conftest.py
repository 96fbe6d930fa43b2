"""What every test gets: a check that it leaves no thread and no child process behind, and repeatable random examples."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import HealthCheck, settings

# The same examples each time: a failure is of the change that it is seen with. Machines differ in speed, so no deadline.
settings.register_profile("zmqserve", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("zmqserve")

LEAVE_S = 5.0
"""What a thread or process may take to end after its test, on a busy machine."""

BUSY = frozenset(
    {
        "conformance",
        "test_adapters.py",
        "test_batching.py",
        "test_broker_garbage.py",
        "test_broker_machine.py",
        "test_checkpoint.py",
        "test_demo.py",
        "test_dispatch.py",
        "test_embedding.py",
        "test_embedding_pipelines.py",
        "test_fuzz.py",
        "test_guided.py",
        "test_guided_answers.py",
        "test_messages.py",
        "test_packaging.py",
        "test_params.py",
        "test_protocol_page.py",
        "test_resume_joins.py",
        "test_simulation.py",
        "test_smollm2.py",
        "test_smollm2_generate.py",
        "test_transformers_worker.py",
        "test_typing.py",
    }
)
"""Files and folders that keep a core busy: their tests are marked `busy`. The others mostly wait, and some bound how long they may."""

_KEPT_THREADS = ("tqdm", "TMonitor", "asyncio_", "pytest_timeout")
_KEPT_PROCESSES = ("resource_tracker", "forkserver")
"""Parts of names: those that a library starts once for the life of the process."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Say which tests keep a core busy."""
    if item.path.relative_to(Path(__file__).parent).parts[0] in BUSY:
        item.add_marker(pytest.mark.busy)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes run the tests (-n 2), one runs all of a file or folder: they share what its fixtures load."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPlace(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "/".join(nodeid.partition("::")[0].split("/")[:2])

    config.option.loadscopereorder = False  # by the number of tests, which says nothing of their time
    return ByPlace(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs vLLM where that is not installed: it has an environment of its own, see `make test-vllm`."""
    if find_spec("vllm") is None:
        left_out = [item for item in items if item.get_closest_marker("vllm") is not None]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt: a shell starts background jobs with SIGINT ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def nothing_leaks() -> Iterator[None]:
    """Fail a test that leaves a thread or a child process. What a fixture of a wider scope started before is its own affair."""
    threads_before = set(threading.enumerate())
    children_before = _children()
    yield
    deadline_s = time.monotonic() + LEAVE_S
    threads = [thread for thread in threading.enumerate() if thread not in threads_before and not _is_kept_thread(thread)]
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    children = [child for child in _children() if child not in children_before and not _is_kept_process(child)]
    _, alive = psutil.wait_procs(children, timeout=max(0.0, deadline_s - time.monotonic()))
    left = [f"thread {thread.name!r}" for thread in threads if thread.is_alive()]
    left += [f"process {child.pid}: {_command(child)}" for child in alive]
    for child in alive:
        child.kill()
    if left:
        pytest.fail(f"left running: {'; '.join(left)}", pytrace=False)


def _children() -> set[psutil.Process]:
    """This process's own. Most tests have none, and the system says that at once, while psutil reads about every process there is."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return set()
    return set(psutil.Process().children())


def _is_kept_thread(thread: threading.Thread) -> bool:
    return any(part in thread.name or part in type(thread).__name__ for part in _KEPT_THREADS)


def _is_kept_process(child: psutil.Process) -> bool:
    return any(part in _command(child) for part in _KEPT_PROCESSES)


def _command(child: psutil.Process) -> str:
    try:
        return " ".join(child.cmdline()) or child.name()
    except psutil.Error:
        return "gone"
