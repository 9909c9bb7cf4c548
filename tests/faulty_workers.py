"""Workers that misbehave. A module of their own, without torch: each of their processes imports it."""

import os
import resource
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np

from orchestrator.workers.lease import timing_lease
from orchestrator.workers.messages import TrialMeasurement, WorkerUnusableError
from orchestrator.workers.worker import Worker
from streamllm.measuring.store import Measurement, MeasurementStore, entry_name
from streamllm.results.schema import Row

from .quick_sweep import Quick
from .waiting import wait_until


def first_time(store, name):
    """Over all processes."""
    try:
        (store.parent / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class WithoutModel(Worker):
    """Loads and measures nothing, quickly; all the rest is real, the store included."""

    def load(self):
        self.store = MeasurementStore(self.setup.store)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        warnings = self._claim(visible)
        return self.place() | {
            "device": "none",
            "visible_devices": visible,
            "cores": self.cores,
            "n_tokens": 0,
            "warnings": warnings,
        }

    def measure(self, spec):
        key = {"spec": str(spec)}
        found = self.store.get(key)
        measurement = found or Measurement(record(spec), LOSSES)
        if found is None:
            self.store.put(key, measurement)
        return TrialMeasurement(
            Row.of(measurement.record),
            measurement.losses,
            found is None,
            found is None,
            [1.0] * 12 if spec.round else (),
        )


class Telling(Worker):
    """Says where it is, too."""

    def load(self):
        found = super().load()
        settings = {name: os.environ.get(name) for name in ("STREAMLLM_DATA", "OTHER")}
        return found | {"directory": str(Path.cwd()), "settings": settings}


class Slow(WithoutModel):
    def measure(self, spec):
        time.sleep(0.3)
        return super().measure(spec)


def record(spec):
    backends = {"backend": spec.configuration.backend, "backend_requested": spec.configuration.backend}
    what = {
        "dataset": "none",
        "protocol": "fast",
        "method": spec.configuration.method,
        "execution": spec.configuration.execution,
    }
    times = {
        "time_ratio": 1.0,
        "measured_tpot_ms": 2.0,
        "reference_tpot_ms": 2.0,
        "pairs": 12,
        "timed_at": 0.0,
        "load": 0.5,
    }
    quality = {
        "perplexity": 2.7,
        "perplexity_low": 2.6,
        "perplexity_high": 2.8,
        "n_tokens": 51,
        "peak_kv": 49,
        "quality_entry": entry_name({"spec": str(spec)}),
    }
    return what | times | quality | backends | asdict(spec.configuration.policy)


LOSSES = np.column_stack((np.arange(50.0), np.full(50, 1.0)))
FAULTS = ("none", "raise", "kill", "kill once", "kill with lease once", "spoil once")
"""By number of sinks."""


class Faulty(WithoutModel):
    def measure(self, spec):
        fault = "none" if spec.configuration.method == "recompute" else FAULTS[spec.configuration.policy.n_sink]
        if fault.endswith(" once"):
            fault = fault if first_time(self.setup.store, fault) else "none"
        if fault == "raise":
            raise ValueError("nope")
        if fault == "spoil once":
            raise WorkerUnusableError("an illegal memory access was encountered")
        if fault.startswith("kill"):
            with timing_lease() if "lease" in fault else nullcontext():
                os.kill(os.getpid(), signal.SIGKILL)
        with timing_lease():
            return super().measure(spec)


class ShortOfMemory(Quick):
    """With a real model: one configuration wants more memory than there is, for another the weights are NaN."""

    def _measure(self, spec):
        if spec.configuration.method != "recompute" and spec.configuration.policy.n_sink == 1:
            import torch

            torch.empty(2**60)
        if spec.configuration.method == "recompute" or spec.configuration.policy.n_sink != 2:
            return super()._measure(spec)
        weight = next(self.loaded.model.parameters()).data
        kept = weight.clone()
        weight.fill_(float("nan"))
        try:
            return super()._measure(spec)
        finally:
            weight.copy_(kept)


class Hanging(WithoutModel):
    def measure(self, spec):
        (self.setup.store.parent / f"measuring {spec.configuration.policy.n_sink}").touch()
        time.sleep(600)


class FullDisk(WithoutModel):
    """The kernel lets it write a hundred bytes to a file: a full disk without one."""

    def measure(self, spec):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            return super().measure(spec)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


class NeverReady(WithoutModel):
    def load(self):
        time.sleep(600)


class Unwilling(WithoutModel):
    def load(self):
        raise RuntimeError("no such luck")


class OnNodes(WithoutModel):
    """Says which node it is on. Trials hang where that is an added one, and elsewhere wait until it has been killed."""

    def load(self):
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        return super().load() | {"node": self.node}

    def measure(self, spec):
        if spec.configuration.method not in ("recompute", "ring"):  # what trials are compared with
            added = self.node != (self.setup.store.parent / "head").read_text()
            killed = self.setup.store.parent / "killed"
            wait_until(lambda: not added and killed.exists(), what="the end of the added node")
        return super().measure(spec)
