"""A worker: one accelerator, or a share of the cores, with the model and the text loaded once; it measures trials.

Workers know nothing of Optuna, MLflow or Ray; `pool` makes actors of them. The driver imports this module too, without
a use for torch: what is heavy is imported inside.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from streamllm.store import MeasurementStore

from .lease import computing_lease, timing_lease
from .trial import TrialMeasurement, TrialSpec, WorkerSetup


class Worker:
    def __init__(self, setup: WorkerSetup, cores: list[int]) -> None:
        """Pins itself to `cores` (all it may use if empty)."""
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        self.setup = setup
        self.cores = cores

    def load(self) -> dict[str, Any]:
        """Loads model and text; says what this worker is and sees. Raises UsageError for input it cannot use."""
        from streamllm.device import device_name, limit_threads
        from streamllm.measurements import Measurements
        from streamllm.models import load_model, load_tokenizer
        from streamllm.text import load_tokens

        setup = self.setup
        limit_threads(len(self.cores) or None)
        self.loaded = load_model(setup.model, setup.dtype, quantization=setup.quantization)
        tokenizer = None if setup.source.token_ids is not None else load_tokenizer(setup.model)
        self.stream = load_tokens(setup.source, tokenizer, self.loaded.model.config.vocab_size)
        self.measurements = Measurements(MeasurementStore(setup.store), self.loaded, self.stream)
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
        from streamllm.evaluation import fast_record, identity

        on_cpu = self.loaded.device.type == "cpu"
        quality, fresh_quality = self.measurements.quality(
            spec.method, spec.policy, computing_lease() if on_cpu else None
        )
        speed, fresh_speed = self.measurements.speed(
            spec.method, spec.policy, spec.attn_backend, spec.execution, timing_lease(), round_number=spec.round
        )
        assert quality.losses is not None
        record = identity(self.loaded, self.stream, spec.method, spec.policy, "fast", spec.execution)
        record["quality_entry"] = self.measurements.quality_entry(spec.method, spec.policy)
        return TrialMeasurement(
            record | fast_record(quality.record, speed.record), quality.losses, fresh_quality, fresh_speed
        )
