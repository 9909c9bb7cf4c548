"""From measurements to the rows of a table: what a trial means beside strict StreamingLLM and beside the baseline."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from streamllm.baseline import AS_BASELINE, compared, sampled
from streamllm.policy import EvictionPolicy, strict_policy

from .configuration import commit
from .study import OpenTrial
from .trial import TrialMeasurement, TrialSpec

if TYPE_CHECKING:
    from streamllm.quality import QualityComparison

STRICT, BASELINE = "strict", "baseline"
"""What everything is compared with, in place of a trial's number."""


def fixed_spec(name: str, cap: int) -> TrialSpec:
    """Of the reference, strict StreamingLLM by the ring; of the baseline, a sliding window of the whole cap, computed
    anew for every token."""
    if name == STRICT:
        return TrialSpec("ring", "auto", strict_policy(cap))
    return TrialSpec("recompute", "auto", EvictionPolicy(n_sink=0, window_size=cap))


def fixed_row(
    name: str, measurement: TrialMeasurement, baseline: TrialMeasurement, comparison: QualityComparison
) -> dict[str, Any]:
    """The row of the reference or of the baseline, whose perplexity is stated over all tokens."""
    row = {"trial": name, "state": "complete", **measurement.record}
    losses = measurement.losses
    assert losses is not None
    if name == BASELINE:
        row |= sampled(losses, comparison, measurement.record["n_tokens"] - 1) | AS_BASELINE
    else:
        row |= _beside(measurement, baseline, comparison)
    return row | {"reused": _reused(measurement), **_stamp()}


def trial_row(
    trial: OpenTrial,
    measurement: TrialMeasurement,
    baseline: TrialMeasurement,
    comparison: QualityComparison,
    worker: int,
) -> dict[str, Any]:
    """One flat row. Times are ratios to the reference's; `ppl_vs_strict_percent` is over all tokens."""
    return {
        "trial": trial.number,
        "state": "complete",
        **measurement.record,
        **_beside(measurement, baseline, comparison),
        "feasible": True,
        "reused": _reused(measurement),
        "worker": worker,
        **_stamp(),
    }


def _beside(measurement: TrialMeasurement, baseline: TrialMeasurement, comparison: QualityComparison) -> dict[str, Any]:
    losses, baseline_losses = measurement.losses, baseline.losses
    assert losses is not None and baseline_losses is not None
    beside = compared(measurement.record, losses, (baseline.record, baseline_losses), comparison)
    n_losses = measurement.record["n_tokens"] - 1
    return beside | (sampled(losses, comparison, n_losses) if len(losses) < n_losses else {})


def _reused(measurement: TrialMeasurement) -> bool:
    return not (measurement.measured_quality or measurement.measured_speed)


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
