"""What can go wrong before a model is loaded."""

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
