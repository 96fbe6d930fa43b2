"""What can go wrong with a model: before it is loaded, and so that it runs no more."""

from __future__ import annotations

from zmqserve.errors import BackendError


class ModelUnavailable(BackendError):
    """The model cannot be fetched or loaded here; the message says what to do."""


def unavailable(model: str, why: str) -> ModelUnavailable:
    """`model`, followed by what is wrong with it."""
    return ModelUnavailable(f"{model} {why}", data={"model": model})


def missing_libraries(error: ImportError, backend: str = "transformers") -> ModelUnavailable:
    """For a backend whose libraries are not installed: they come with the extra of this package that has its name."""
    what = error.name or str(error)
    wrong = "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which cannot be imported ({error})"
    message = f'the {backend} backend needs {what}, {wrong}: pip install "zmqserve[{backend}]"'
    return ModelUnavailable(message, data={"missing": what})


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that a memory is full, which passes. torch's own class is known by its name: this file does not import torch."""
    return bool({"MemoryError", "OutOfMemoryError"} & {kind.__name__ for kind in type(error).__mro__})


def runs_no_more(error: BaseException) -> BackendError:
    """For a model that fails on what no working one fails on, with `error`: its worker ends with this."""
    return BackendError(f"the model cannot run any more, the worker ends: {type(error).__name__}: {error}")
