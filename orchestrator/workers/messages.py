"""The messages between driver and workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TypedDict

from streamllm.measuring.conditions import Conditions
from streamllm.measuring.jobs import Job


class Variant(NamedTuple):
    """How a model is loaded."""

    dtype: str
    quantization: str


@dataclass(frozen=True, slots=True)
class Subject:
    """What a job is a measurement of."""

    text: str
    """Digest of the tokens."""
    variant: Variant
    total: int
    """Total KV of the reference that everything is timed beside."""
    beside: Variant | None = None
    """The model that the reference is of, where it is another."""


class Assignment(NamedTuple):
    """What a worker is asked to measure."""

    subject: Subject
    job: Job
    side_by_side: bool = False
    """Whether others of the node may be timed meanwhile."""

    @classmethod
    def of(cls, subject: Subject, job: Job) -> Assignment:
        """A configuration with a quantization of its own is another model, beside the same reference."""
        own = job.what.quantization
        if own is None:
            return cls(subject, job)
        variant, beside = Variant(subject.variant.dtype, own), subject.beside or subject.variant
        return cls(replace(subject, variant=variant, beside=None if variant == beside else beside), job)


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """Everything that every worker is started with. Workers read and write nothing but the model's files."""

    model: str
    variant: Variant
    """That it loads first."""
    directory: Path | None = None
    """Where the driver runs: what paths, in the environment too, are relative to."""
    model_digest: str | None = None
    """The digest by which the driver knows the weights; None: not to be checked."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables of the driver's that it is to have too. They may be secrets: they travel as an argument, which Ray
    shows nowhere."""


class WorkerPlace(TypedDict):
    """Where a worker's process is."""

    host: str
    pid: int


class WorkerDescription(WorkerPlace):
    """What a worker that is ready says of itself."""

    conditions: Conditions
    """Of what it measures with the model as loaded first."""
    device_type: str
    """As torch has it: cpu, cuda, ..."""
    visible_devices: str
    """Its accelerator, as Ray has it; empty if it has none."""
    cores: list[int]
    """Those it is pinned to; empty if it is not."""
    uncounted: str | None
    """Why it cannot count energy; None where it can."""
    warnings: list[str]


class WorkerUnusableError(RuntimeError):
    """The worker's process can measure nothing any more, as after an error that spoils a CUDA context."""


class SweepError(RuntimeError):
    """The sweep cannot go on; what is finished is kept."""
