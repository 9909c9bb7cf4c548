"""The messages between driver and workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np

from streamllm.configuration import Configuration
from streamllm.measuring.text import TextSource
from streamllm.results.schema import Row


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything that every worker of a sweep is started with."""

    model: str
    source: TextSource
    dtype: str
    quantization: str
    store: Path
    total: int
    """Total KV of the reference that everything is timed beside."""
    directory: Path | None = None
    """Where the driver runs: what paths, in the environment too, are relative to."""
    model_digest: str | None = None
    """The digest by which the driver knows the weights; None: not to be checked."""
    text_file_digest: str | None = None
    """The same for the file of the text."""


class WorkerPlace(TypedDict):
    """Where a worker's process is."""

    host: str
    pid: int


class WorkerDescription(WorkerPlace):
    """What a worker that is ready says of itself."""

    device: str
    threads: int | None
    """Of a CPU."""
    software: str
    """Versions that its times depend on."""
    visible_devices: str
    """Its accelerator, as Ray has it; empty if it has none."""
    cores: list[int]
    """Those it is pinned to; empty if it is not."""
    model_digest: str
    text_digest: str
    n_tokens: int
    """Of the text."""
    warnings: list[str]


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """The specification of what one trial measures."""

    configuration: Configuration
    round: int = 0
    """0: of the search. A round of confirming, from 1 on, takes the times alone, anew."""
    sampled_tokens: int = 64
    """At least as many losses of a method whose quality is sampled."""


@dataclass(frozen=True, slots=True)
class TrialMeasurement:
    """A worker's answer to a `TrialSpec`."""

    record: Row
    """Identity, quality and speed, flat; of a round of confirming, the times."""
    losses: np.ndarray | None
    """(n, 2): position, nats; None of a round of confirming."""
    measured_quality: bool
    """False where the store had it; likewise for the speed."""
    measured_speed: bool
    ratios: Sequence[float] = ()
    """In a round of confirming: segment by segment, time over the reference's."""


class WorkerUnusableError(RuntimeError):
    """The worker's process can measure nothing any more, as after an error that spoils a CUDA context."""


class SweepError(RuntimeError):
    """The sweep cannot go on; what is finished is kept."""


class UnwritableError(SweepError):
    """The study's folder takes nothing more."""
