"""Which of transformers' products computes the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .model import LoadedModel


@contextmanager
def experts_for(loaded: LoadedModel, new_tokens: int) -> Iterator[None]:
    """For one token on a device that has a host to wait for: `batched_mm`, which `generate` decodes by too. Left to
    `grouped_mm`, a step in float32 asks the device how many tokens each expert has, which no CUDA graph can."""
    config = loaded.config
    if new_tokens != 1 or loaded.device.type == "cpu" or getattr(config, _CHOSEN, None) != "grouped_mm":
        yield
        return
    setattr(config, _CHOSEN, "batched_mm")
    try:
        yield
    finally:
        setattr(config, _CHOSEN, "grouped_mm")


_CHOSEN = "_experts_implementation"
"""By this name every version of transformers that has several reads it (`set_experts_implementation` sets it, and walks
through all modules every time)."""
