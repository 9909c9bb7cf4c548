"""Measuring once: what the store has is not measured again, be it for a sweep or for one evaluation's baseline."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

from .decoding import Progress
from .device import foreign_processes
from .evaluation import EVALUATORS, fast_record, identity, measure_quality, speed_summary
from .loaded import LoadedModel
from .methods import sampled_losses
from .pairing import PairedTimes
from .policy import EvictionPolicy, strict_policy
from .probing import resolve_backend
from .store import Measurement, MeasurementStore, code_digest, entry_name
from .text import TokenStream
from .timing import Reference, measure_speed, measure_times


@dataclass(frozen=True)
class Leases:
    """What is held while something is timed, and while something is computed that is not."""

    timing: Callable[[], AbstractContextManager[Any]] = nullcontext
    computing: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Measurements:
    """The measurements of one model on one text, beside strict StreamingLLM at a total KV of `total`. Methods return
    the measurement, and whether it was taken just now."""

    store: MeasurementStore
    loaded: LoadedModel
    stream: TokenStream
    total: int
    _reference: list[Reference] = field(default_factory=list, repr=False)

    @property
    def reference(self) -> Reference:
        """What everything is timed beside; kept warm once it was asked for."""
        if not self._reference:
            self._reference.append(Reference.start(self.loaded, self.total, self.stream.tokens))
        return self._reference[0]

    def strict(
        self, lease: AbstractContextManager[Any] | None = None, progress: Progress | None = None
    ) -> tuple[Measurement, bool]:
        """Quality of the reference: its losses at every token are what all others are compared with."""
        return self.quality("ring", strict_policy(self.total), lease, progress)

    def quality(
        self,
        method: str,
        policy: EvictionPolicy,
        lease: AbstractContextManager[Any] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Measurement, bool]:
        """Protocol `fast`. It depends neither on the cache implementation nor on the hardware: once per policy."""

        def measure() -> Measurement:
            quality = measure_quality(self.loaded, self.stream, method, policy, progress)
            return Measurement(quality.summary(), quality.table)

        return self._once(self._quality_key(method, policy), measure, lease)

    def speed(
        self,
        method: str,
        policy: EvictionPolicy,
        attn_backend: str,
        execution: str = "eager",
        lease: AbstractContextManager[Any] | None = None,
        strict: bool = False,
        run: int = 0,
    ) -> tuple[Measurement, bool]:
        """Protocol `fast`. It does not depend on the text. Measured once per run. The record says if the accelerator
        had `foreign_processes` just after the timing."""

        def measure() -> Measurement:
            backend = resolve_backend(attn_backend, self.loaded, strict)
            speed = measure_speed(self.loaded, method, policy, backend, self.stream.tokens, self.reference, execution)
            foreign = foreign_processes(self.loaded.device)
            return Measurement(
                speed_summary(speed, attn_backend) | ({"foreign_processes": "; ".join(foreign)} if foreign else {})
            )

        return self._once(_of_run(self._speed_key(method, policy, attn_backend, execution), run), measure, lease)

    def times(self, method: str, policy: EvictionPolicy, attn_backend: str, execution: str = "eager") -> PairedTimes:
        """The times alone, taken now and not kept: a round of confirming is kept whole, or not at all."""
        backend = resolve_backend(attn_backend, self.loaded)
        return measure_times(self.loaded, method, policy, backend, self.stream.tokens, self.reference, execution)

    def quality_entry(self, method: str, policy: EvictionPolicy) -> str:
        """The name of the store's entry with the per-token losses."""
        return entry_name(self._quality_key(method, policy))

    def whole(
        self,
        protocol: str,
        method: str,
        policy: EvictionPolicy,
        attn_backend: str,
        execution: str = "eager",
        strict: bool = False,
        progress: Progress | None = None,
        run: int = 0,
        leases: Leases | None = None,
    ) -> tuple[Measurement, bool]:
        """Quality and speed by any protocol; they come from the same run in all but `fast`. Measured once per run."""
        leases = leases or Leases()
        if protocol == "fast":
            quality, fresh = self.quality(method, policy, leases.computing(), progress)
            speed, fresh_too = self.speed(method, policy, attn_backend, execution, leases.timing(), strict, run)
            return _joined(quality, speed), fresh or fresh_too

        def measure() -> Measurement:
            backend = resolve_backend(attn_backend, self.loaded, strict)
            quality, record = EVALUATORS[protocol](
                self.loaded, self.stream, method, policy, backend, self.reference, execution, progress
            )
            return Measurement(record | {"backend_requested": attn_backend}, quality.table)

        key = self._whole_key(protocol, method, policy, attn_backend, execution)
        return self._once(_of_run(key, run), measure, leases.timing())

    def find(
        self,
        protocol: str,
        method: str,
        policy: EvictionPolicy,
        attn_backend: str,
        execution: str = "eager",
        run: int = 0,
    ) -> Measurement | None:
        """What `whole` would return, if it is stored."""
        if protocol != "fast":
            key = self._whole_key(protocol, method, policy, attn_backend, execution)
            return self.store.get(_of_run(key, run))
        quality = self.store.get(self._quality_key(method, policy))
        speed = self.store.get(_of_run(self._speed_key(method, policy, attn_backend, execution), run))
        return _joined(quality, speed) if quality is not None and speed is not None else None

    def _quality_key(self, method: str, policy: EvictionPolicy) -> dict[str, Any]:
        kind = "streaming" if sampled_losses(method) is None else method
        names: tuple[str, ...] = ("model_digest", "text_digest", "protocol", "dtype")
        if " " in self.loaded.digest:  # quantized: its kernels round as the machine has them
            names += ("device", "cpu_capability")
        return {"kind": f"quality of {kind}"} | self._identity(method, policy, "fast", names)

    def _speed_key(self, method: str, policy: EvictionPolicy, attn_backend: str, execution: str) -> dict[str, Any]:
        names = ("model_digest", "protocol", "dtype", "method", "device", "threads", "cpu_capability")
        key = {"kind": "speed", "attn_backend": attn_backend, "execution": execution, "reference_total": self.total}
        return key | self._identity(method, policy, "fast", names)

    def _whole_key(
        self, protocol: str, method: str, policy: EvictionPolicy, attn_backend: str, execution: str
    ) -> dict[str, Any]:
        names = ("model_digest", "text_digest", "protocol", "dtype", "method", "device", "threads", "cpu_capability")
        key: dict[str, Any] = {"kind": "evaluation", "attn_backend": attn_backend, "execution": execution}
        key["reference_total"] = self.total
        key["compress_every"] = policy.compress_every  # of `recompute` by chunks, the prefill
        return self._identity(method, policy, protocol, names) | key

    def _identity(self, method: str, policy: EvictionPolicy, protocol: str, names: tuple[str, ...]) -> dict[str, Any]:
        values = identity(self.loaded, self.stream, method, policy, protocol)
        return {"code": code_digest()} | {name: values[name] for name in (*names, *asdict(policy))}

    def _once(
        self, key: dict[str, Any], measure: Callable[[], Measurement], lease: AbstractContextManager[Any] | None
    ) -> tuple[Measurement, bool]:
        found = self.store.get(key)
        if found is not None:
            return found, False
        with lease or nullcontext():
            measured = measure()
        self.store.put(key, measured)
        return measured, True


def _of_run(key: dict[str, Any], run: int) -> dict[str, Any]:
    return key | ({"run": run} if run else {})


def _joined(quality: Measurement, speed: Measurement) -> Measurement:
    return Measurement(fast_record(quality.record, speed.record), quality.losses)
