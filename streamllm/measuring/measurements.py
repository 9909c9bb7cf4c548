"""Measuring once: what the store has is not measured again, be it for a sweep or for one evaluation's baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from typing import Any, cast

import numpy as np

from ..configuration import Configuration
from ..engine.decoding import Progress
from ..engine.device import foreign_processes
from ..engine.methods import sampled_losses
from ..engine.model import LoadedModel
from ..engine.probing import runnable
from ..options import PROTOCOLS
from ..policy import strict_policy
from .conditions import of_quality, of_speed
from .evaluation import Quality, fast_record, identity, measure_quality, speed_summary
from .pairing import PairedTimes
from .sample import FixedSize, SampleSize, sample_batches
from .store import Measurement, MeasurementStore, entry_name
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
class Measurements:
    """The measurements of one model on one text, beside strict StreamingLLM at a total KV of `total`. Methods return
    the measurement, and whether it was taken just now."""

    store: MeasurementStore
    loaded: LoadedModel
    stream: TokenStream
    total: int
    _reference: list[Reference] = field(default_factory=list, repr=False)
    beside: Measurements | None = None
    """Whose reference everything is timed beside: of another model in this process; None: one by this model."""
    neighbours: Callable[[], float] = lambda: 0.0
    """MiB of other models' weights in this process, which do not count as memory of what is measured."""

    @property
    def reference(self) -> Reference:
        """The reference that everything is timed beside; kept warm once it was asked for."""
        if self.beside is not None:
            return self.beside.reference
        if not self._reference:
            self._reference.append(Reference.start(self.loaded, self.total, self.stream.tokens))
        return self._reference[0]

    def strict(self, lease: Lease = nullcontext, progress: Progress | None = None) -> tuple[Measurement, bool]:
        """Quality of the reference: its losses at every token are what all others are compared with."""
        return self.quality(Configuration("ring", strict_policy(self.total)), lease, progress)

    def quality(
        self,
        what: Configuration,
        lease: Lease = nullcontext,
        progress: Progress | None = None,
        size: SampleSize | None = None,
    ) -> tuple[Measurement, bool]:
        """Protocol `fast`. It depends neither on the cache implementation nor on the hardware: once per policy.

        Of a method that is sampled, what is stored counts whole, and grows to `size` (`LEAST_TOKENS`)."""
        if sampled_losses(what.method) is not None:
            return self._sample(what, lease, progress, size or FixedSize())

        key = self._quality_key(what)

        def measure() -> Measurement:
            return _as_measurement(measure_quality(self.loaded, what, self.stream, progress), key)

        return self._once(key, measure, lease)

    def _sample(
        self, what: Configuration, lease: Lease, progress: Progress | None, size: SampleSize
    ) -> tuple[Measurement, bool]:
        """Batch by batch, each kept as soon as it is there."""
        parts: list[Measurement] = []
        fresh = False
        for key, positions in self._batches(what):
            part = self.store.get(key)
            if part is None:
                table = _table(parts)
                if len(table) and size.reached(table):
                    break
                if progress is not None:
                    progress(len(table), max(size.expected(table), len(table) + 1))
                with lease():
                    quality = measure_quality(self.loaded, what, self.stream, positions=positions)
                part, fresh = _as_measurement(quality, key), True
                self.store.put(key, part)
            parts.append(part)
        joined = self._joined(what, parts)
        if progress is not None:
            progress(len(_table(parts)), len(_table(parts)))
        return joined, fresh

    def _batches(self, what: Configuration) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """The parts of a sample: keys in the store, positions in the text."""
        key = self._quality_key(what)
        for number, positions in enumerate(sample_batches(len(self.stream.tokens), what.policy.kept)):
            yield key | {"batch": number}, positions

    def _joined(self, what: Configuration, parts: Sequence[Measurement]) -> Measurement:
        """The parts of a sample as one measurement, with a file of its losses."""
        table, first = _table(parts), parts[0].record
        seconds = sum(part.record["quality_sec"] for part in parts)
        quality = Quality(table[:, 1], table[:, 0], first["peak_kv"], seconds, first.get("warning"))
        key = self._quality_key(what) | {"tokens": len(table)}
        return self._once(key, lambda: _as_measurement(quality, key))[0]

    def speed(
        self,
        what: Configuration,
        leases: Leases = NO_LEASES,
        strict: bool = False,
        run: int = 0,
    ) -> tuple[Measurement, bool]:
        """Protocol `fast`. It does not depend on the text. Measured once per run. The record says if the accelerator
        had `foreign_processes` just after the timing."""
        key = _of_run(self._speed_key(what), run)

        def measure() -> Measurement:
            prepared = self._prepared(what, leases, strict)
            with leases.timing():
                speed = measure_speed(self.loaded, prepared, self.stream.tokens, self.reference)
            record = speed_summary(speed, what.backend) | {"speed_entry": entry_name(key)}
            record["peak_memory_mb"] -= self.neighbours()
            if foreign := foreign_processes(self.loaded.device):
                record["foreign_processes"] = "; ".join(foreign)
            return Measurement(record)

        return self._once(key, measure)

    def times(self, what: Configuration, leases: Leases = NO_LEASES) -> PairedTimes:
        """The times alone, taken now and not kept: a round of confirming is kept whole, or not at all."""
        prepared = self._prepared(what, leases)
        with leases.timing():
            return measure_times(self.loaded, prepared, self.stream.tokens, self.reference)

    def _prepared(self, what: Configuration, leases: Leases, strict: bool = False) -> Configuration:
        """With the kernel that runs, and its step compiled beforehand: others may time meanwhile."""
        with leases.computing():
            what = runnable(what, self.loaded, strict)
            compile_step(self.loaded, what, self.stream.tokens)
        return what

    def whole(
        self,
        protocol: str,
        what: Configuration,
        strict: bool = False,
        progress: Progress | None = None,
        run: int = 0,
        leases: Leases = NO_LEASES,
        size: SampleSize | None = None,
    ) -> tuple[Measurement, bool]:
        """Quality and speed by any protocol; they come from the same run in all but `fast`. Measured once per run."""
        if protocol == "fast":
            quality, fresh = self.quality(what, leases.computing, progress, size)
            speed, fresh_too = self.speed(what, leases, strict, run)
            return _joined(quality, speed), fresh or fresh_too

        key = _of_run(self._whole_key(protocol, what), run)
        entry = entry_name(key)

        def measure() -> Measurement:
            ahead = what.execution if protocol == "decode-loop" else "eager"  # chunks have one that does not count
            prepared = replace(self._prepared(replace(what, execution=ahead), leases, strict), execution=what.execution)
            with leases.timing():
                evaluate = PROTOCOLS[protocol].get()
                quality, record = evaluate(self.loaded, prepared, self.stream, self.reference, progress)
            named = {"backend_requested": what.backend, "quality_entry": entry, "speed_entry": entry}
            return Measurement(record | named, quality.table)

        return self._once(key, measure)

    def find(self, protocol: str, what: Configuration, run: int = 0) -> Measurement | None:
        """The measurement that `whole` would return, if it is stored."""
        if protocol != "fast":
            key = self._whole_key(protocol, what)
            return self.store.get(_of_run(key, run))
        quality = self._stored_quality(what)
        speed = self.store.get(_of_run(self._speed_key(what), run))
        return _joined(quality, speed) if quality is not None and speed is not None else None

    def _stored_quality(self, what: Configuration) -> Measurement | None:
        if sampled_losses(what.method) is None:
            return self.store.get(self._quality_key(what))
        stored = (self.store.get(key) for key, _ in self._batches(what))
        parts = list(takewhile(lambda part: part is not None, stored))
        return self._joined(what, cast("list[Measurement]", parts)) if parts else None

    def _quality_key(self, what: Configuration) -> dict[str, Any]:
        kind = "streaming" if sampled_losses(what.method) is None else what.method
        names: tuple[str, ...] = ("model_digest", "text_digest", "protocol", "dtype")
        if " " in self.loaded.digest:  # quantized: its kernels round as the machine has them
            names += ("device", "cpu_capability")
        conditions = of_quality(self.loaded, None if kind == "streaming" else what.method)
        return {"kind": f"quality of {kind}"} | conditions | self._identity(what, "fast", names)

    def _speed_key(self, what: Configuration) -> dict[str, Any]:
        names = ("model_digest", "protocol", "dtype", "method", "device", "threads", "cpu_capability")
        how = {"attn_backend": what.backend, "execution": what.execution}
        key = {"kind": "speed", **how, "reference_total": self.total}
        if self.beside is not None:
            key["reference_digest"] = self.beside.loaded.digest
        conditions = of_speed(self.loaded, what.method, what.backend)
        return key | conditions | self._identity(what, "fast", names)

    def _whole_key(self, protocol: str, what: Configuration) -> dict[str, Any]:
        names = ("model_digest", "text_digest", "protocol", "dtype", "method", "device", "threads", "cpu_capability")
        how = {"attn_backend": what.backend, "execution": what.execution}
        key: dict[str, Any] = {"kind": "evaluation", **how, "reference_total": self.total}
        key["compress_every"] = what.policy.compress_every  # of `recompute` by chunks, the prefill
        conditions = of_speed(self.loaded, what.method, what.backend)
        return conditions | self._identity(what, protocol, names) | key

    def _identity(self, what: Configuration, protocol: str, names: tuple[str, ...]) -> dict[str, Any]:
        values = identity(self.loaded, what, self.stream, protocol)
        return {name: values[name] for name in (*names, *asdict(what.policy))}

    def _once(
        self, key: dict[str, Any], measure: Callable[[], Measurement], lease: Lease = nullcontext
    ) -> tuple[Measurement, bool]:
        found = self.store.get(key)
        if found is not None:
            return found, False
        with lease():
            measured = measure()
        self.store.put(key, measured)
        return measured, True


def _as_measurement(quality: Quality, key: dict[str, Any]) -> Measurement:
    """With `quality_entry`: the name of the store's entry with the per-token losses."""
    return Measurement(quality.summary() | {"quality_entry": entry_name(key)}, quality.table)


def _table(parts: Sequence[Measurement]) -> np.ndarray:
    """(n, 2): position, nats, of all of them, ascending."""
    table = np.concatenate([np.empty((0, 2)), *(part.losses for part in parts if part.losses is not None)])
    return table[np.argsort(table[:, 0])]


def _of_run(key: dict[str, Any], run: int) -> dict[str, Any]:
    return key | ({"run": run} if run else {})


def _joined(quality: Measurement, speed: Measurement) -> Measurement:
    return Measurement(fast_record(quality.record, speed.record), quality.losses)
