"""From measurements to the rows of a table: what a trial means beside strict StreamingLLM and beside the baseline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING

from streamllm.configuration import Configuration
from streamllm.measuring.baseline import as_baseline, row_of, sampled
from streamllm.measuring.reference_time import speedup
from streamllm.policy import EvictionPolicy, strict_policy
from streamllm.results.schema import AnyRow, Row
from streamllm.results.study import BASELINE, STRICT

from ..configuration import commit
from .study import OpenTrial

if TYPE_CHECKING:
    import numpy as np

    from streamllm.measuring.plans import Evaluated
    from streamllm.measuring.quality import QualityComparison


def fixed_configuration(name: str, cap: int) -> Configuration:
    """Of the reference, strict StreamingLLM by the ring, or of the baseline, a sliding window of the whole cap that is
    computed anew for every token."""
    if name == STRICT:
        return Configuration("ring", strict_policy(cap))
    return Configuration("recompute", EvictionPolicy(n_sink=0, window_size=cap))


def fixed_row(
    name: str, cap: int, evaluated: Evaluated, baseline: Evaluated | None, comparison: QualityComparison
) -> Row:
    """The row of the reference or of the baseline, whose perplexity is stated over all tokens. baseline: beside which
    that of the reference is."""
    row = row_of(fixed_configuration(name, cap), "fast", evaluated) | {"trial": name, "state": "complete"} | _stamp()
    if name == BASELINE:
        return as_baseline(row, evaluated.losses, comparison)
    of_baseline = None if baseline is None else row_of(fixed_configuration(BASELINE, cap), "fast", baseline)
    return row | _beside(row, evaluated, of_baseline, comparison)


def trial_row(trial: OpenTrial, evaluated: Evaluated, baseline: Row | None, comparison: QualityComparison) -> Row:
    """One flat row. Times are ratios to the reference's; `ppl_vs_strict_percent` is over all tokens."""
    row = row_of(trial.configuration, "fast", evaluated)
    about = {"trial": trial.number, "state": "complete", "feasible": True, "worker": evaluated.worker}
    return row | _beside(row, evaluated, baseline, comparison) | _stamp() | about


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


def _beside(row: Row, evaluated: Evaluated, baseline: Row | None, comparison: QualityComparison) -> AnyRow:
    losses = evaluated.losses
    beside = comparison.vs_strict(losses).flat("ppl_vs_strict_percent")
    if baseline is not None:
        beside |= speedup(row, baseline) | comparison.increase(losses).flat("ppl_increase_percent")
    n_losses = row["n_tokens"] - 1
    return beside | (sampled(losses, comparison, n_losses) if len(losses) < n_losses else {})


def quality_row(
    what: Configuration, evaluated: Evaluated, comparison: QualityComparison, *, beside_baseline: bool
) -> Row:
    """What is known of a configuration that was not timed."""
    row = row_of(what, "fast", evaluated)
    beside = comparison.vs_strict(evaluated.losses).flat("ppl_vs_strict_percent")
    if beside_baseline:
        beside |= comparison.increase(evaluated.losses).flat("ppl_increase_percent")
    return row | beside


def failed_row(trial: OpenTrial, reason: str) -> Row:
    what = trial.configuration
    values = {
        "trial": trial.number,
        "state": "failed",
        "reason": reason,
        "method": what.method,
        "backend_requested": what.backend,
        "execution": what.execution,
        "quantization": what.quantization,
        "feasible": False,
    }
    return Row.of({**values, **asdict(what.policy), **_stamp()})


def _stamp() -> AnyRow:
    return {"finished_at": time.time(), "commit": commit()}
