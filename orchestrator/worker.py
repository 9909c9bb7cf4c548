"""A worker: one accelerator, or a share of the cores, with the model and the text loaded once; it measures trials.

Workers know nothing of Optuna, MLflow or Ray; `pool` makes actors of them. The driver imports this module too, without
a use for torch: what is heavy is imported inside.
"""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np

from .lease import computing_lease, timing_lease
from .store import Measurement, MeasurementStore, code_digest
from .trial import TrialMeasurement, TrialSpec, WorkerSetup


class Worker:
    def __init__(self, setup: WorkerSetup, cores: list[int]) -> None:
        """Pins itself to `cores` (all it may use if empty)."""
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        self.setup = setup
        self.cores = cores
        self.store = MeasurementStore(setup.store)

    def load(self) -> dict[str, Any]:
        """Loads model and text; says what this worker is and sees. Raises UsageError for input it cannot use."""
        from streamllm.models import load_model, load_tokenizer
        from streamllm.text import load_tokens
        from streamllm.timing import device_name, limit_threads

        setup = self.setup
        limit_threads(len(self.cores) or None)
        self.loaded = load_model(setup.model, setup.dtype)
        tokenizer = None if setup.source.token_ids is not None else load_tokenizer(setup.model)
        self.stream = load_tokens(setup.source, tokenizer, self.loaded.model.config.vocab_size)

        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": device_name(self.loaded.device),
            "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
            "cores": self.cores,
            "model_digest": self.loaded.digest,
            "text_digest": self.stream.digest,
            "n_tokens": len(self.stream.tokens),
        }

    def measure(self, spec: TrialSpec) -> TrialMeasurement:
        """Measures what the store does not have. Raises NonFiniteLossError, and whatever torch raises."""
        from streamllm.evaluation import identity

        record = identity(self.loaded, self.stream, spec.method, spec.policy, "fast")
        quality, measured_quality = self._quality(spec, record)
        speed, measured_speed = self._speed(spec, record)
        assert quality.losses is not None
        return TrialMeasurement(
            record | quality.record | speed.record, quality.losses, measured_quality, measured_speed
        )

    def _quality(self, spec: TrialSpec, identity: dict[str, Any]) -> tuple[Measurement, bool]:
        from streamllm.evaluation import measure_quality
        from streamllm.methods import sampled_losses

        # A policy's perplexity depends neither on the cache implementation nor on the hardware.
        kind = "streaming" if sampled_losses(spec.method) is None else spec.method
        names = ("model_digest", "text_digest", "protocol", "dtype", *asdict(spec.policy))
        key = {"kind": f"quality of {kind}", "code": code_digest()} | {name: identity[name] for name in names}
        found = self.store.get(key)
        if found is not None:
            return found, False
        on_cpu = self.loaded.device.type == "cpu"
        with computing_lease() if on_cpu else nullcontext():
            quality = measure_quality(self.loaded, self.stream, spec.method, spec.policy)
        measured = Measurement(quality.summary(), np.column_stack((quality.positions, quality.losses)))
        self.store.put(key, measured)
        return measured, True

    def _speed(self, spec: TrialSpec, identity: dict[str, Any]) -> tuple[Measurement, bool]:
        from streamllm.attention import resolve_backend
        from streamllm.evaluation import speed_summary
        from streamllm.timing import measure_speed

        names = ("model_digest", "protocol", "dtype", "method", "device", "threads", *asdict(spec.policy))
        key = {"kind": "speed", "code": code_digest(), "attn_backend": spec.attn_backend}
        key |= {name: identity[name] for name in names}
        found = self.store.get(key)
        if found is not None:
            return found, False
        loaded = self.loaded
        backend = resolve_backend(spec.attn_backend, loaded.device, loaded.dtype, loaded.head_size)
        with timing_lease():
            speed = measure_speed(loaded, spec.method, spec.policy, backend, self.stream.tokens)
        measured = Measurement(speed_summary(speed, spec.attn_backend))
        self.store.put(key, measured)
        return measured, True
