"""Measuring in this process: what the store has is not measured again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..configuration import Configuration
from ..engine.decoding import Progress
from ..engine.methods import sampled_losses
from ..engine.model import LoadedModel
from . import plans
from .bench import Bench
from .divergence import Comparing, comparing
from .done import Done
from .jobs import Job, Plan
from .keys import Keys
from .plans import Evaluated
from .sample import AsItIs, SampleSize
from .store import Measurement, MeasurementStore, entry_name
from .text import TokenStream

T = TypeVar("T")


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model on one text, beside strict StreamingLLM at a total KV."""

    store: MeasurementStore
    bench: Bench

    @classmethod
    def of(cls, store: MeasurementStore, loaded: LoadedModel, stream: TokenStream, total: int) -> Measurements:
        return cls(store, Bench(loaded, stream, total))

    @property
    def loaded(self) -> LoadedModel:
        return self.bench.loaded

    @property
    def stream(self) -> TokenStream:
        return self.bench.stream

    @property
    def total(self) -> int:
        return self.bench.total

    @property
    def keys(self) -> Keys:
        return self.bench.keys

    def run(self, plan: Plan[T], strict: bool = False, progress: Progress | None = None) -> T:
        """A plan's result. strict, and what is raised: as `Bench.measure`."""
        return _run(plan, lambda job: self._done(job, strict, progress))

    def _done(self, job: Job, strict: bool, progress: Progress | None) -> Done | None:
        keys = self.keys
        key = keys.of(job)
        found = self._found(key, job.is_of_use_with_arrays_only)
        if found is not None:
            return Done(found, keys, entry_name(key), is_fresh=False)
        if job.peek:
            return None
        against = [self.store.arrays(name) for name in job.against]
        measured = self.bench.measure(job, strict, progress if job.batch is None else None, against)
        self.store.put(key, measured)
        return Done(measured.without_arrays(), keys, entry_name(key), is_fresh=True)

    def strict(self, progress: Progress | None = None, keeps: bool = False) -> Evaluated:
        """Quality of the reference: its losses at every token are what all others are compared with. keeps: and its
        distributions, which the store then has."""
        if keeps:
            return self.run(plans.strict(self.total), progress=progress)
        return self.quality(plans.strict_configuration(self.total), progress)

    def compared_with(self, recomputed: int) -> list[Comparing]:
        """What compares with the reference's distributions, and with re-computation's at so many batches of its
        sample."""
        names = self.run(plans.references(self.total, recomputed))
        return comparing([self.store.arrays(name) for name in names])

    def quality(
        self, what: Configuration, progress: Progress | None = None, size: SampleSize | None = None
    ) -> Evaluated:
        return self._kept(self.run(plans.quality(what, self.stream, size, progress), progress=progress))

    def whole(
        self,
        protocol: str,
        what: Configuration,
        strict: bool = False,
        progress: Progress | None = None,
        run: int = 0,
        size: SampleSize | None = None,
    ) -> Evaluated:
        """Quality and speed by any protocol. Measured once per run."""
        return self._kept(self.run(plans.whole(protocol, what, self.stream, run, size, progress), strict, progress))

    def find(self, protocol: str, what: Configuration, run: int = 0) -> Evaluated | None:
        """What `whole` would return, of a sample as it is, if it is stored."""
        size = AsItIs() if protocol == "fast" and sampled_losses(what.method) is not None else None
        try:
            return self._kept(_run(plans.whole(protocol, what, self.stream, run, size), self._stored))
        except LookupError:
            return None

    def _stored(self, job: Job) -> Done | None:
        """Raises LookupError."""
        key = self.keys.of(job)
        found = self._found(key)
        if found is not None:
            return Done(found, self.keys, entry_name(key), is_fresh=False)
        if job.peek:
            return None
        raise LookupError(str(job))

    def _found(self, key: Mapping[str, object], with_arrays: bool = False) -> Measurement | None:
        """What was timed beside others is no measurement of this process."""
        found = self.store.get(key, with_arrays)
        return None if found is not None and found.record.get("timing") == "concurrent" else found

    def _kept(self, evaluated: Evaluated) -> Evaluated:
        plans.keep_sample(self.store, evaluated)
        return evaluated


def _run(plan: Plan[T], do: Callable[[Job], Done | None]) -> T:
    """A plan's result, one job after the other."""
    try:
        jobs = next(plan)
        while True:
            jobs = plan.send([do(job) for job in jobs])
    except StopIteration as end:
        result: T = end.value
        return result
