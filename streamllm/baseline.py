"""The fixed baseline: what it re-computes, several runs of it as one, and what a result means beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .arguments import TOTAL_KV_CAP
from .policy import EvictionPolicy

if TYPE_CHECKING:
    import numpy as np

Measured = tuple[dict[str, Any], "np.ndarray"]
"""A flat record; losses (n, 2: position, nats)."""

_TIMES = (
    "tpot_ms",
    "decode_toks_per_sec",
    "runtime_sec",
    "prefill_sec",
    "first_token_latency_sec",
    "avg_attn_ms",
    "peak_memory_mb",
)
"""What differs from run to run."""


def baseline_policy(policy: EvictionPolicy, protocol: str, trained_length: int | None) -> EvictionPolicy:
    """What the fixed baseline re-computes beside a policy: its total S + W + slack, but at most the cap or the trained
    length. A chunk's prefill is as long for the baseline; in other protocols nothing of it is ever pruned lazily."""
    window = min(policy.kept + policy.cache_slack, TOTAL_KV_CAP, trained_length or TOTAL_KV_CAP)
    return EvictionPolicy(
        n_sink=0, window_size=window, compress_every=policy.compress_every if protocol == "chunked" else 1
    )


def average(runs: Sequence[Measured]) -> Measured:
    """One record of several runs of the same: times are means, with their standard deviation as `NAME_std` and the
    interval of the time per token over the runs' own; losses do not differ. Of one run, that run."""
    record, losses = runs[0]
    if len(runs) == 1:
        return record, losses
    import numpy as np

    from .quality import median_interval

    mean: dict[str, Any] = {}
    for name in _TIMES:
        values = np.array([run[name] for run, _ in runs])
        mean |= {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}
    interval = median_interval(np.array([run["tpot_ms"] for run, _ in runs]))
    mean |= {"tpot_ms_low": interval.low, "tpot_ms_high": interval.high, "runs": len(runs)}
    return record | mean | {"reused": all(run["reused"] for run, _ in runs)}, losses


def compared(record: dict[str, Any], losses: np.ndarray, baseline: Measured) -> dict[str, Any]:
    """What a result means beside a baseline; the perplexities' ratio is over the tokens that both were taken at."""
    from .quality import paired_increase

    increase = paired_increase(losses, baseline[1])
    return {
        "speedup": baseline[0]["tpot_ms"] / record["tpot_ms"],
        "ppl_increase_percent": increase.value,
        "ppl_increase_percent_low": increase.low,
        "ppl_increase_percent_high": increase.high,
    }
