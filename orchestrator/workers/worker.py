"""A worker: one accelerator, or a share of the cores, with the model and the text loaded once; it measures trials.

Workers know nothing of Optuna, MLflow or Ray; `pool` makes actors of them. The driver imports this module too, without
a use for torch: what is heavy is imported inside.
"""

from __future__ import annotations

import gc
import os
import socket
from collections import OrderedDict
from collections.abc import Collection
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from streamllm.errors import UsageError
from streamllm.measuring.store import MeasurementStore
from streamllm.results.schema import Row

from .accelerators import own_accelerator
from .lease import claim, leases_on
from .messages import TrialMeasurement, TrialSpec, WorkerDescription, WorkerPlace, WorkerSetup, WorkerUnusableError

if TYPE_CHECKING:
    from streamllm.measuring.measurements import Measurements


class Worker:
    def __init__(self, setup: WorkerSetup, cores: int, owner: str, on_accelerator: bool = False) -> None:
        """One of the workers of `owner`; it will own `cores` cores of its node, and the accelerator that it was given
        if it was `on_accelerator`."""
        self.setup = setup
        self._on_accelerator = on_accelerator
        self._models: OrderedDict[str, Measurements] = OrderedDict()
        """One for each quantization, the one used last at the end."""
        self._count = cores
        self._owner = owner

    def place(self) -> WorkerPlace:
        """Answers as soon as the process is there."""
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def load(self) -> WorkerDescription:
        """Pins itself, loads model and text; says what this worker is, sees, and finds wrong (`warnings`).

        Raises UsageError for input it cannot use, or that is not what the driver has under that name."""
        accelerator = own_accelerator(self._on_accelerator)
        warnings = self._claim(accelerator.name, accelerator.near) if accelerator else self._claim()

        from streamllm.engine.device import limit_threads, unverified
        from streamllm.engine.loading import load_model, load_tokenizer
        from streamllm.measuring.conditions import kind_of_worker
        from streamllm.measuring.measurements import Measurements
        from streamllm.measuring.text import load_tokens

        setup = self.setup
        if setup.directory is not None:
            with suppress(OSError):  # where it is missing, so is what would be looked for in it
                os.chdir(setup.directory)  # a process on a cluster starts where Ray did
        limit_threads(len(self.cores) or None)
        self.loaded = load_model(setup.model, setup.dtype, quantization=setup.quantization)
        self._check_same()
        tokenizer = None if setup.source.token_ids is not None else load_tokenizer(setup.model)
        self.stream = load_tokens(setup.source, tokenizer, self.loaded.vocabulary)
        neighbours = partial(self._megabytes_beside, setup.quantization)
        self.measurements = Measurements(
            MeasurementStore(setup.store), self.loaded, self.stream, setup.total, neighbours=neighbours
        )
        self._models[setup.quantization] = self.measurements
        kind = kind_of_worker(self.loaded.device)
        return {
            **self.place(),
            "device": kind["device"],
            "threads": kind["threads"],
            "software": kind["software"],
            "visible_devices": accelerator.visible if accelerator else "",
            "cores": self.cores,
            "model_digest": self.loaded.digest,
            "text_digest": self.stream.digest,
            "n_tokens": len(self.stream.tokens),
            "warnings": [*warnings, *_mismatches(self.cores), *filter(None, [unverified(self.loaded.device)])],
        }

    def measure(self, spec: TrialSpec) -> TrialMeasurement:
        """Measures what the store does not have; where memory is short, once more without the models it can spare.

        Raises MemoryError, NonFiniteLossError, WorkerUnusableError if nothing can be measured here any more, UsageError
        for a quantization that is not to be had here, and whatever torch raises."""
        import torch

        from streamllm.engine.device import empty_cache

        while True:
            try:
                return self._confirm(spec) if spec.round else self._measure(spec)
            except torch.OutOfMemoryError as error:
                reason = f"out of accelerator memory: {error}"
            except torch.AcceleratorError as error:
                raise WorkerUnusableError(f"AcceleratorError: {error}") from None
            spared = self._spare_model(spec)
            gc.collect()  # only here are the frames gone that held the memory
            empty_cache()
            if not spared:
                raise MemoryError(reason)

    def _measure(self, spec: TrialSpec) -> TrialMeasurement:
        from streamllm.measuring.evaluation import fast_record, identity
        from streamllm.measuring.sample import FixedSize

        what = spec.configuration
        measurements, leases = self._measurements_of(spec), leases_on(self.loaded.device.type)
        quality, fresh_quality = measurements.quality(what, leases.computing, size=FixedSize(spec.sampled_tokens))
        speed, fresh_speed = measurements.speed(what, leases)
        assert quality.losses is not None
        record = identity(measurements.loaded, what, self.stream, "fast")
        record["reference_total"] = self.setup.total
        if what.quantization is not None:
            record |= {"quantization": what.quantization, "reference_digest": self.loaded.digest}
        return TrialMeasurement(
            Row.of(record | fast_record(quality.record, speed.record)), quality.losses, fresh_quality, fresh_speed
        )

    def _confirm(self, spec: TrialSpec) -> TrialMeasurement:
        from streamllm.measuring.conditions import kind_of_worker
        from streamllm.measuring.evaluation import times_summary

        measurements, leases = self._measurements_of(spec), leases_on(self.loaded.device.type)
        times = measurements.times(spec.configuration, leases)
        record = Row.of(times_summary(times) | kind_of_worker(self.loaded.device))
        return TrialMeasurement(record, None, False, True, times.ratios.tolist())

    def _measurements_of(self, spec: TrialSpec) -> Measurements:
        """Measurements with the model quantized as the trial wants it, which is loaded the first time and then kept.
        All are timed beside one reference, by the model as the sweep has it: that one always stays."""
        from streamllm.engine.loading import load_model
        from streamllm.measuring.measurements import Measurements

        name = spec.configuration.quantization or self.setup.quantization
        if name not in self._models:
            with leases_on(self.loaded.device.type).computing():
                loaded = load_model(self.setup.model, self.setup.dtype, quantization=name)
            base = self.measurements
            neighbours = partial(self._megabytes_beside, name)
            self._models[name] = Measurements(
                base.store, loaded, self.stream, base.total, beside=base, neighbours=neighbours
            )
        self._models.move_to_end(name)
        return self._models[name]

    def _spare_model(self, spec: TrialSpec) -> bool:
        """Lets go of the model that was not used for longest, but for the trial's and the reference's. Returns whether
        there was one."""
        needed = {self.setup.quantization, spec.configuration.quantization}
        name = next((name for name in self._models if name not in needed), None)
        if name is not None:
            del self._models[name]
        return name is not None

    def _megabytes_beside(self, name: str) -> float:
        """MiB of the weights of all models but that one."""
        others = [of.loaded.model for other, of in self._models.items() if other != name]
        return sum(p.nbytes for model in others for p in (*model.parameters(), *model.buffers())) / 2**20

    def _check_same(self) -> None:
        """Checks that weights and text are those that the driver has under the same names. Raises UsageError."""
        from streamllm.measuring.text import file_digest

        setup, text = self.setup, file_digest(self.setup.source)
        for what, found, expected in (
            (f"model {setup.model!r}", self.loaded.digest.partition(" ")[0], setup.model_digest),
            (f"text {setup.source.label!r}", text, setup.text_file_digest),
        ):
            if expected is not None and found != expected:
                raise UsageError(
                    f"{what} on {socket.gethostname()} differs from the one where the sweep was started "
                    f"({found!s:.12}..., not {expected:.12}...); give a path that all nodes share"
                )

    def _claim(self, accelerator: str = "", near: Collection[int] = ()) -> list[str]:
        """Makes the accelerator of that name and cores its own, those `near` it first, and says with whom it has to
        share them."""
        self._claims = []
        self.cores: list[int] = []
        if hasattr(os, "sched_setaffinity"):
            allowed = sorted(os.sched_getaffinity(0), key=lambda core: (core not in near, core))
            cores = claim([f"core-{core}" for core in allowed], self._count, self._owner)
            self._claims.append(cores)
            self.cores = sorted(int(name.removeprefix("core-")) for name in cores.names)
            _pin(self.cores)
        if accelerator:
            self._claims.append(claim([f"accelerator-{accelerator}"], 1, self._owner))
        return [f"{' '.join(c.names)}: also used by {c.shared_with}" for c in self._claims if c.shared_with]


def _pin(cores: list[int]) -> None:
    """Every thread of this process: an affinity is a thread's own, and Ray's have been started."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), cores)


def _mismatches(cores: list[int]) -> list[str]:
    """Everything in which the system and torch give this process something other than what was asked for."""
    import torch

    found = []
    if cores and os.sched_getaffinity(0) != set(cores):
        found.append(f"asked for cores {cores}, runs on {sorted(os.sched_getaffinity(0))}")
    if cores and torch.get_num_threads() != len(cores):
        found.append(f"{len(cores)} cores, but torch runs {torch.get_num_threads()} threads")
    return found
