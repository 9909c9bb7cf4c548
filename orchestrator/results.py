"""From measurements to the rows of a table: what a trial means beside the baseline."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from streamllm.policy import EvictionPolicy
from streamllm.quality import paired_increase

from .configuration import commit
from .study import OpenTrial
from .trial import TrialMeasurement, TrialSpec

BASELINE = "baseline"


def baseline_spec(cap: int) -> TrialSpec:
    """The fixed baseline: a sliding window of the whole cap, computed anew for every token."""
    n_sink = min(4, cap - 1)
    return TrialSpec("recompute", "auto", EvictionPolicy(n_sink=n_sink, window_size=cap - n_sink))


def baseline_row(measurement: TrialMeasurement) -> dict[str, Any]:
    return {
        "trial": BASELINE,
        "state": "complete",
        **measurement.record,
        "speedup": 1.0,
        "ppl_increase_percent": 0.0,
        "reused": not (measurement.measured_quality or measurement.measured_speed),
        **_stamp(),
    }


def trial_row(
    trial: OpenTrial, measurement: TrialMeasurement, baseline: TrialMeasurement, worker: int
) -> dict[str, Any]:
    """One flat row. `ppl_increase_percent` is paired: both perplexities over the tokens the baseline was sampled at."""
    increase = paired_increase(measurement.losses, baseline.losses)
    record = measurement.record
    return {
        "trial": trial.number,
        "state": "complete",
        **record,
        "speedup": baseline.record["tpot_ms"] / record["tpot_ms"],
        "ppl_increase_percent": increase.value,
        "ppl_increase_percent_low": increase.low,
        "ppl_increase_percent_high": increase.high,
        "feasible": True,
        "reused": not (measurement.measured_quality or measurement.measured_speed),
        "worker": worker,
        **_stamp(),
    }


def failed_row(trial: OpenTrial, reason: str, worker: int) -> dict[str, Any]:
    spec = trial.spec
    return {
        "trial": trial.number,
        "state": "failed",
        "reason": reason,
        "method": spec.method,
        "backend_requested": spec.attn_backend,
        "execution": spec.execution,
        **asdict(spec.policy),
        "feasible": False,
        "worker": worker,
        **_stamp(),
    }


def _stamp() -> dict[str, Any]:
    return {"finished_at": time.time(), "commit": commit()}
