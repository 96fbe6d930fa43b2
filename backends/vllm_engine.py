"""vLLM's AsyncLLM: its arguments, its start, and a watch over its engine process. Imports vLLM where it is used."""

from __future__ import annotations

import atexit
import contextlib
import difflib
import multiprocessing
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from multiprocessing.connection import wait
from typing import Any

from zmqserve.errors import BackendError, InvalidParameter

from .model_errors import missing_libraries, unavailable
from .vllm_child import watched

LOOK_S = 0.25
"""How often a live engine is asked whether it is well; a dead process is noticed at once."""
SHUTDOWN_S = 1.0
"""What an engine process gets to end by itself, when nobody waits for its answers any more."""
_NOT_TAKEN = {
    "model": "--model says it",
    "served_model_name": "--name says it",
    "disable_log_stats": "heartbeats tell what vLLM's statistics say",
    "max_num_queued_reqs": "controllers bound the queue",
    "max_num_queued_tokens": "controllers bound the queue",
}


class EngineFigures:
    """What vLLM tells of each engine step. Stands where AsyncLLM has its loggers, and costs less than those.

    `waiting`: sequences in the scheduler's queue. `stepped_s`: when the last step came, monotonic.
    """

    def __init__(self) -> None:
        self.stepped_s = time.monotonic()
        self._waiting: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"EngineFigures(waiting={self.waiting})"

    @property
    def waiting(self) -> int:
        return sum(self._waiting.values())

    def age_s(self) -> float:
        """Seconds since the last step."""
        return max(0.0, time.monotonic() - self.stepped_s)

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:  # noqa: ARG002 - vLLM calls it so
        """A step was made. Called on the event loop."""
        self.stepped_s = time.monotonic()
        if scheduler_stats is not None:
            self._waiting[engine_idx] = scheduler_stats.num_waiting_reqs + getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)

    def log(self) -> None:
        """Nothing: heartbeats tell it."""


def library() -> str:
    """vLLM's version. Imports it for the whole process; ModelUnavailable, which says what to install, if there is none."""
    # A process with threads cannot be forked safely. vLLM's own log goes where ours goes; standard output is for answers.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    try:
        import vllm
        import vllm.v1.engine.async_llm
    except ImportError as error:
        raise missing_libraries(error, "vllm") from error
    atexit.register(_leave)
    return str(vllm.__version__)


def start(source: str, given: Mapping[str, str], defaults: Mapping[str, Any], figures: EngineFigures) -> Any:
    """An AsyncLLM that serves `source`, with `given` engine arguments (see `parsed`) over `defaults`. After `library`.

    Raises InvalidParameter for arguments that are none, and ModelUnavailable with vLLM's reason for all else.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = parsed(AsyncEngineArgs, source, given, defaults)
    try:
        with watched():
            # As a server: vLLM's defaults for an engine inside a program let fewer sequences and tokens into a step.
            config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
            engine = AsyncLLM.from_vllm_config(config, disable_log_stats=arguments.disable_log_stats)
    except Exception as error:
        raise unavailable(source, f"cannot be served by vLLM: {_reason(error)}") from error
    if engine.logger_manager is not None:
        engine.logger_manager = figures
        _count_no_tokens(engine)
    return engine


def on_cpu() -> bool:
    """Whether it is vLLM for CPUs."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


async def warm_up(engine: Any, loras: Mapping[str, Any]) -> None:
    """Load the adapters, and make the first request as quick as the next.

    Raises ModelUnavailable for an adapter that vLLM cannot use, which would end the engine if a request found it out, and for a model
    that does neither generate nor embed.
    """
    from vllm import PoolingParams, SamplingParams

    for name, lora in loras.items():
        try:
            await engine.add_lora(lora)
        except Exception as error:
            raise unavailable(f"lora {name!r}: {lora.lora_path}", f"cannot be served by vLLM: {_reason(error)}") from error
    pools = engine.model_config.runner_type == "pooling"
    params = PoolingParams(task="embed") if pools else SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    try:
        collector = await engine.add_request("warm-up", {"type": "token", "prompt_token_ids": [0]}, params)
        while not (await collector.get()).finished:
            pass
    except Exception as error:
        raise unavailable(engine.model_config.model, f"cannot be served by vLLM: {_reason(error)}") from error


def parsed(kind: Any, source: str, given: Mapping[str, str], defaults: Mapping[str, Any]) -> Any:
    """vLLM's engine arguments, of class `kind`, each read as vLLM reads it on its own command line.

    Raises InvalidParameter for a name that vLLM does not know, with near ones, and for a value that it does not take.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise InvalidParameter(f"--engine-arg: {message}", data={"parameter": "engine_arg"})

    parser = kind.add_cli_args(Parser(add_help=False, allow_abbrev=False))
    known = {field.name for field in fields(kind)}
    argv: list[str] = []
    for name, value in given.items():
        argument, _, inner = name.replace("-", "_").partition(".")
        if argument in _NOT_TAKEN:
            raise _refused(name, f"is not taken: {_NOT_TAKEN[argument]}")
        option = "--" + argument.replace("_", "-")
        action = parser._option_string_actions.get(option)
        if argument not in known or action is None:
            near = difflib.get_close_matches(argument, sorted(known), n=3)
            raise _refused(name, "is none of vLLM's" + (f"; near it: {', '.join(near)}" if near else ""))
        if action.nargs == 0:
            argv.append(option if _truth(name, value) else "--no-" + option[2:])
        elif inner:
            argv.append(f"{option}.{inner}={value}")
        elif action.nargs in ("*", "+"):
            argv += [option, *shlex.split(value)]
        else:
            argv.append(f"{option}={value}")
    read = parser.parse_args(argv)
    read.model = source
    said = {name.replace("-", "_") for name in given}
    for name, value in defaults.items():
        if name not in said:
            setattr(read, name, value)
    return kind.from_cli_args(read)


def split_arguments(texts: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` texts by name; one without value is ``true``. InvalidParameter for one without a name, or given twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not name:
            raise InvalidParameter(f"--engine-arg must be NAME=VALUE, got {text!r}", data={"parameter": "engine_arg"})
        if name in found:
            raise InvalidParameter(f"--engine-arg {name} is given twice", data={"parameter": "engine_arg"})
        found[name] = value if equals else "true"
    return found


class EngineWatch:
    """Tells `on_death`, once and from a thread, that an engine can serve no more: within moments if its process dies."""

    def __init__(self, engine: Any, on_death: Callable[[BackendError], None], name: str) -> None:
        self._engine = engine
        self._on_death = on_death
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"{name} engine watch", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"EngineWatch({processes(self._engine)!r})"

    def close(self) -> None:
        """The engine may end now."""
        self._ending.set()
        self._thread.join()

    def _watch(self) -> None:
        ours = processes(self._engine)
        while not self._ending.is_set():
            wait([process.sentinel for process in ours], timeout=LOOK_S) if ours else self._ending.wait(LOOK_S)
            dead = [process for process in ours if not process.is_alive()]
            if self._ending.is_set():
                return
            if dead:
                self._on_death(died(f"its process {dead[0].pid} ended with code {dead[0].exitcode}"))
                for process in ours:
                    _kill(process)
                return
            if self._engine.errored:
                self._on_death(died("what it says of that is in the log"))
                return


def died(how: str) -> BackendError:
    """The error that ends a worker whose engine is gone."""
    return BackendError(f"vLLM's engine died ({how}): the worker ends, and its requests go on elsewhere")


def processes(engine: Any) -> list[Any]:
    """The engine's processes on this machine."""
    return list(getattr(engine.engine_core.resources.engine_manager, "processes", ()))


def shut_down(engine: Any) -> None:
    """End it and its processes."""
    ended = processes(engine)
    with contextlib.suppress(Exception):  # of an engine that is dead already
        engine.shutdown(timeout=SHUTDOWN_S)
    for process in ended:
        _kill(process)


def _count_no_tokens(engine: Any) -> None:
    """What its front end counts for each token is a quarter of the token's way through it, and nobody reads it: `EngineFigures` has what
    the engine's process counts. Traces are made of it; a version that has it elsewhere goes on counting."""
    counting = (engine, engine.output_processor)
    if not engine.output_processor.tracing_enabled and all(hasattr(each, "log_stats") for each in counting):
        for each in counting:
            each.log_stats = False


def _leave() -> None:
    """At the interpreter's end: Python waits for child processes, and an engine that is still starting waits for this one."""
    for child in multiprocessing.active_children():
        if child.name.startswith("EngineCore"):
            _kill(child)


def _kill(process: Any) -> None:
    """End an engine's process, and those that it started for the model: they are its group, once it has made one."""
    process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _refused(name: str, why: str) -> InvalidParameter:
    return InvalidParameter(f"--engine-arg {name} {why}", data={"parameter": name})


def _truth(name: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise _refused(name, f"must be true or false, got {value!r}")
    return value.lower() == "true"


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines or ['no reason given'])[:500]}"
