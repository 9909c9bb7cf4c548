"""From measurements to the rows of a table: what a trial means beside strict StreamingLLM and beside the baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from streamllm.configuration import Configuration
from streamllm.measuring.baseline import as_baseline, compared, sampled
from streamllm.policy import EvictionPolicy, strict_policy
from streamllm.results.schema import AnyRow, Row
from streamllm.results.study import BASELINE, STRICT

from ..configuration import commit
from ..workers.messages import TrialMeasurement, TrialSpec
from .study import OpenTrial

if TYPE_CHECKING:
    import numpy as np

    from streamllm.measuring.quality import QualityComparison


def fixed_spec(name: str, cap: int, sampled_tokens: int = 0) -> TrialSpec:
    """The trial that measures the reference, strict StreamingLLM by the ring, or the baseline, a sliding window of the
    whole cap, computed anew for every token of a sample."""
    if name == STRICT:
        return TrialSpec(Configuration("ring", strict_policy(cap)))
    window = EvictionPolicy(n_sink=0, window_size=cap)
    return TrialSpec(Configuration("recompute", window), sampled_tokens=sampled_tokens)


def fixed_row(
    name: str, measurement: TrialMeasurement, baseline: TrialMeasurement | None, comparison: QualityComparison
) -> Row:
    """The row of the reference or of the baseline, whose perplexity is stated over all tokens."""
    row = measurement.record | {"trial": name, "state": "complete"}
    losses = measurement.losses
    assert losses is not None
    is_baseline = name == BASELINE
    row = as_baseline(row, losses, comparison) if is_baseline else row | _beside(measurement, baseline, comparison)
    return row | {"reused": _reused(measurement), **_stamp()}


def trial_row(
    trial: OpenTrial,
    measurement: TrialMeasurement,
    baseline: TrialMeasurement | None,
    comparison: QualityComparison,
    worker: int,
) -> Row:
    """One flat row. Times are ratios to the reference's; `ppl_vs_strict_percent` is over all tokens."""
    values = measurement.record | _beside(measurement, baseline, comparison) | _stamp()
    about = {"trial": trial.number, "state": "complete", "feasible": True, "worker": worker}
    return values | about | {"reused": _reused(measurement)}


def increases(rows: Iterable[Row], comparison: QualityComparison, losses_of: Callable[[str], np.ndarray]) -> list[Row]:
    """The cost of each complete trial in perplexity beside the baseline, as well as it is known by now; not of a trial
    whose losses the store has no more: its row says what was known then.

    losses_of: by the name of the store's entry; configurations of one policy share it. Raises OSError if it is gone."""
    known: dict[str, dict[str, float]] = {}
    added = []
    for row in rows:
        entry = row.quality_entry
        if row.state == "complete" and entry is not None:
            if entry not in known:
                known[entry] = {}
                with suppress(OSError):
                    known[entry] = comparison.increase(losses_of(entry)).flat("ppl_increase_percent")
            if known[entry]:
                added.append(Row.of({"trial": row.trial, **known[entry]}))
    return added


def _beside(measurement: TrialMeasurement, baseline: TrialMeasurement | None, comparison: QualityComparison) -> AnyRow:
    losses = measurement.losses
    assert losses is not None
    if baseline is None:
        beside = comparison.vs_strict(losses).flat("ppl_vs_strict_percent")
    else:
        assert baseline.losses is not None
        beside = compared(measurement.record, losses, (baseline.record, baseline.losses), comparison)
    n_losses = measurement.record["n_tokens"] - 1
    return beside | (sampled(losses, comparison, n_losses) if len(losses) < n_losses else {})


def _reused(measurement: TrialMeasurement) -> bool:
    return not (measurement.measured_quality or measurement.measured_speed)


def failed_row(trial: OpenTrial, reason: str, worker: int) -> Row:
    what = trial.spec.configuration
    values = {
        "trial": trial.number,
        "state": "failed",
        "reason": reason,
        "method": what.method,
        "backend_requested": what.backend,
        "execution": what.execution,
        "quantization": what.quantization,
        "feasible": False,
        "worker": worker,
    }
    return Row.of({**values, **asdict(what.policy), **_stamp()})


def _stamp() -> AnyRow:
    return {"finished_at": time.time(), "commit": commit()}
