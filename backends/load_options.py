"""How a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadOptions:
    """The same for models that generate and for those that embed.

    device: ``auto`` is CUDA if there is any, else the CPU. dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: who loads says
    what that is. attention: transformers' name of an implementation; None: as the model and the library choose. revision: of a model
    on the Hugging Face Hub. trust_remote_code: run code that comes with the model.
    """

    device: str = "auto"
    dtype: str = "auto"
    attention: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def of_weights(self) -> dict[str, Any]:
        """What the libraries' loaders of weights take beside the dtype."""
        return {} if self.attention is None else {"attn_implementation": self.attention}

    @property
    def of_files(self) -> dict[str, Any]:
        """What all of their loaders take."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
