"""Garbage collection in a process that serves."""

from __future__ import annotations

import gc


def freeze_heap() -> None:
    """Leave what the process holds now out of garbage collection. Call it before serving, with all that stays loaded.

    A full collection looks at every object while no other Python runs: 0.3 s with vLLM loaded, 0.15 s with transformers, 10 ms in a
    controller. It comes in the middle of an answer, and every stream of the process stops for so long. Afterwards it looks only at what
    came since. Only for a process of our own: garbage in cycles that exist already is freed here, and what turns into it later is kept.
    """
    gc.collect()
    gc.freeze()
