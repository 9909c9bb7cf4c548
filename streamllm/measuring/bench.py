"""A model in memory on its bench: ready to be measured on a text, beside a reference that is kept warm."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from ..configuration import Configuration
from ..engine.decoding import Progress
from ..engine.device import foreign_processes
from ..engine.energy import energy_counter
from ..engine.model import LoadedModel
from ..engine.probing import runnable
from ..errors import UsageError
from ..options import PROTOCOLS, TASK
from .conditions import Conditions
from .divergence import Comparing, Distributions, Keeping, comparing, fixed_positions
from .energy import measure_energy
from .evaluation import Evaluator, measure_quality, speed_summary, times_summary
from .first_token import measure_first_token
from .hits import losses_and_hits
from .jobs import Job
from .keys import Keys
from .sample import sample_batches
from .store import Arrays, Measurement
from .text import TokenStream
from .timing import Reference, compile_step, measure_speed, measure_times

Lease = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Leases:
    """The leases held while something is timed, and while something is computed that is not timed."""

    timing: Lease = nullcontext
    computing: Lease = nullcontext


NO_LEASES = Leases()


@dataclass(frozen=True)
class Bench:
    """One model on one text, beside strict StreamingLLM at a total KV of `total`."""

    loaded: LoadedModel
    stream: TokenStream
    total: int
    leases: Leases = NO_LEASES
    beside: Bench | None = None
    """Whose reference everything is timed beside: of another model in this process; None: one by this model."""
    neighbours: Callable[[], float] = lambda: 0.0
    """MiB of other models' weights in this process, which do not count as memory of what is measured."""
    warm: list[Reference] = field(default_factory=list, repr=False)
    """The reference, once it was asked for; it does not depend on the text, and benches may share it."""

    @property
    def reference(self) -> Reference:
        """The reference that everything is timed beside."""
        if self.beside is not None:
            return self.beside.reference
        if not self.warm:
            self.warm.append(Reference.start(self.loaded, self.total, self.stream.tokens))
        return self.warm[0]

    @property
    def keys(self) -> Keys:
        of_another = None if self.beside is None else self.beside.loaded.digest
        return Keys(Conditions.of(self.loaded), self.stream, self.total, of_another)

    def measure(
        self, job: Job, strict: bool = False, progress: Progress | None = None, against: Sequence[Arrays] = ()
    ) -> Measurement:
        """strict: an attention backend that does not run is an error. against: the arrays of the entries that the job
        names. Raises NonFiniteLossError, UnsupportedModelError; UnavailableError for energy where there is no counter;
        UsageError for a text that is not the model's, and where that cannot be measured here."""
        if (most := int(self.stream.tokens.max())) >= self.loaded.vocabulary:
            raise UsageError(f"text {self.stream.label!r}: token {most} is not one of the {self.loaded.vocabulary}")
        if job.kind == "quality":
            return self._quality(job, progress, against)
        if job.kind == "hits":
            return self._hits(job, progress)
        if job.task is not None:
            with self.leases.computing():
                return Measurement(TASK.get()(self.loaded, job.what, job.task))
        if job.kind == "speed":
            return self._speed(job, strict)
        if job.kind == "first_token":
            return self._first_token(job, strict)
        if job.kind == "energy":
            return self._energy(job, strict)
        return self._times(job) if job.kind == "times" else self._whole(job, strict, progress)

    def _quality(self, job: Job, progress: Progress | None, against: Sequence[Arrays]) -> Measurement:
        tokens, window = self.stream.tokens, job.what.policy.kept
        positions = None
        if job.batch is not None:
            positions = next(islice(sample_batches(len(tokens), window), job.batch, None))
        watch: Sequence[Keeping | Comparing] = comparing(against) if job.against else ()
        if job.keeps:
            places = fixed_positions(len(tokens), window, self.loaded.vocabulary)
            places = places if positions is None else np.intersect1d(places, positions)
            watch = [Keeping(places)] if len(places) else ()
        with self.leases.computing():
            quality = measure_quality(self.loaded, job.what, self.stream, progress, positions, watch)
        record = quality.summary()
        for one in quality.beside:
            if isinstance(one, Distributions) and positions is None:
                record |= one.from_itself()
        arrays = {name: array for one in quality.beside for name, array in one.arrays.items()}
        return Measurement(record, quality.table, arrays or None)

    def _hits(self, job: Job, progress: Progress | None) -> Measurement:
        policy, started = job.what.effective, time.perf_counter()
        with self.leases.computing():
            table = losses_and_hits(self.loaded, self.stream.tokens, policy, progress, job.what.keys)
        return Measurement({"quality_sec": time.perf_counter() - started}, table)

    def _speed(self, job: Job, strict: bool) -> Measurement:
        """The record says if the accelerator had `foreign_processes` just after the timing."""
        prepared = self._prepared(job.what, strict)
        with self.leases.timing():
            speed = measure_speed(self.loaded, prepared, self.stream.tokens, self.reference)
        record = speed_summary(speed, job.what.backend)
        record["peak_memory_mb"] -= self.neighbours()
        if foreign := foreign_processes(self.loaded.device):
            record["foreign_processes"] = "; ".join(foreign)
        return Measurement(record)

    def _first_token(self, job: Job, strict: bool) -> Measurement:
        prepared, beside = self._prepared(job.what, strict), self.beside or self
        with self.leases.timing():
            found = measure_first_token(self.loaded, prepared, self.stream.tokens, beside.loaded, self.total)
        return Measurement(found.summary())

    def _energy(self, job: Job, strict: bool) -> Measurement:
        counter = energy_counter(self.loaded.device)
        prepared = self._prepared(job.what, strict)
        with self.leases.timing():
            found = measure_energy(self.loaded, prepared, self.stream.tokens, self.reference, counter)
        return Measurement(found.summary())

    def _times(self, job: Job) -> Measurement:
        prepared = self._prepared(job.what)
        with self.leases.timing():
            times = measure_times(self.loaded, prepared, self.stream.tokens, self.reference)
        return Measurement(times_summary(times) | {"ratios": times.ratios.tolist()})

    def _whole(self, job: Job, strict: bool, progress: Progress | None) -> Measurement:
        what = job.what
        ahead = what.execution if job.protocol == "decode-loop" else "eager"  # chunks have one that does not count
        prepared = replace(self._prepared(replace(what, execution=ahead), strict), execution=what.execution)
        with self.leases.timing():
            evaluate: Evaluator = PROTOCOLS[job.protocol].get()
            quality, record = evaluate(self.loaded, prepared, self.stream, self.reference, progress)
        record["peak_memory_mb"] -= self.neighbours()
        return Measurement(record | {"backend_requested": what.backend}, quality.table)

    def _prepared(self, what: Configuration, strict: bool = False) -> Configuration:
        """With the kernel that runs, and its step compiled beforehand: others may time meanwhile."""
        with self.leases.computing():
            what = runnable(what, self.loaded, strict)
            compile_step(self.loaded, what, self.stream.tokens)
        return what
