"""How much of it: what one GPU does in nine minutes, a first look, or what a CPU can do of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from streamllm.engine.device import default_device
from streamllm.engine.model import LoadedModel
from tests.benchmarks.reporting import random_model

Result = dict[str, Any]
"""Of a check: `ok` (None for what is only measured), `rows`, and what else there is to say."""


@dataclass(frozen=True)
class Scale:
    name: str
    shape: str
    """Of `tests.benchmarks.reporting.SHAPES`."""
    total: int
    """Sinks and window."""
    loop_tokens: int
    """Of a decode loop at that shape: about twice the total, so that keys move through the whole window."""
    far_tokens: int
    """Of the loop that goes far into a stream."""
    rounds: int
    evaluated_tokens: int
    segment_sec: float
    """Of a decoder, where it is not timed in pairs."""

    @cached_property
    def device(self) -> torch.device:
        return default_device()

    def model(self, quantization: str = "none") -> LoadedModel:
        return random_model(self.shape, "auto", quantization)

    def tokens(self, count: int) -> np.ndarray:
        return np.random.default_rng(0).integers(1000, size=count)


SCALES = {
    scale.name: scale
    for scale in (
        Scale("full", "pythia-2.8b", 2048, 4096, 22_000, 7, 8192, 0.25),
        Scale("quick", "pythia-410m", 512, 1024, 2048, 3, 2048, 0.1),
        Scale("tiny", "tiny", 64, 160, 320, 3, 512, 0.02),
    )
}
