"""vLLM's engine process: it dies with the worker that started it, however that one dies, and Ctrl-C is not for it.

vLLM itself has no such watch: the engine of a killed worker would keep its GPU. The process is spawned, and imports this module by name.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Engine processes that vLLM starts within the block run `run_engine_core` of this module instead of its own."""
    from vllm.v1.engine.core import EngineCoreProc

    # Static: what is read from the class is the plain function.
    own = EngineCoreProc.run_engine_core
    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    try:
        yield
    finally:
        EngineCoreProc.run_engine_core = staticmethod(own)


def run_engine_core(*args: Any, **kwargs: Any) -> None:
    """The main function of the process."""
    # A group of its own, with the workers that the engine starts for more GPUs: a terminal's Ctrl-C drains the worker, and the engine
    # must answer until that is done.
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="worker watch", daemon=True).start()
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core(*args, **kwargs)


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os.killpg(0, signal.SIGKILL)
