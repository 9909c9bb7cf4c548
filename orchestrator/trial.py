"""What driver and workers tell one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamllm.policy import EvictionPolicy
from streamllm.text import TextSource


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What every worker of a sweep is started with."""

    model: str
    source: TextSource
    dtype: str
    quantization: str
    store: Path


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """What one trial measures."""

    method: str
    attn_backend: str
    policy: EvictionPolicy
    execution: str = "eager"
    round: int = 0
    """Of the search; confirmations count from 1, and each is a measurement of its own."""


@dataclass(frozen=True, slots=True)
class TrialMeasurement:
    record: dict[str, Any]
    """Identity, quality and speed, flat."""
    losses: np.ndarray
    """(n, 2): position, nats."""
    measured_quality: bool
    """False where the store had it; likewise for the speed."""
    measured_speed: bool
    segment_tpot_ms: Sequence[float] = ()
    """The timing's single segments."""


class WorkerUnusableError(RuntimeError):
    """The worker's process can measure nothing any more, as after an error that spoils a CUDA context."""
