"""The fixed baseline: what it re-computes, several runs of it as one, and what a result means beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..policy import TOTAL_KV_CAP, EvictionPolicy, for_chunks
from ..results.schema import AnyRow, Row
from .cache_size import peak_bytes
from .reference_time import speedup

if TYPE_CHECKING:
    import numpy as np

    from ..configuration import Configuration
    from .conditions import Conditions
    from .plans import Evaluated
    from .quality import QualityComparison

Measured = tuple[Row, "np.ndarray"]
"""A row, and losses (n, 2: position, nats)."""

_TIMES = (
    "time_ratio",
    "measured_tpot_ms",
    "reference_tpot_ms",
    "runtime_sec",
    "measuring_sec",
    "prefill_sec",
    "first_token_latency_sec",
    "avg_attn_ms",
    "peak_memory_mb",
)
"""Measures that differ from run to run; a protocol has one of the seconds."""


def row_of(what: Configuration, protocol: str, evaluated: Evaluated) -> Row:
    """What was found out, flat, with what it is of; `reused` where all of it was stored."""
    keys = evaluated.keys
    more: dict[str, Any] = {"reference_total": keys.total, "reused": not evaluated.is_fresh}
    if what.quantization is not None:  # one of several, beside one reference
        digest = keys.reference_digest or keys.conditions.model_digest
        more |= {"quantization": what.quantization, "reference_digest": digest}
    return with_bytes(Row.of(keys.identity(what, protocol) | evaluated.record | more), what, keys.conditions)


def with_bytes(row: Row, what: Configuration, conditions: Conditions) -> Row:
    """The row with its largest cache in bytes too: tokens of different models, dtypes and methods do not compare."""
    stream, n = what.effective, row["n_tokens"] - 1
    if row["protocol"] == "chunked":
        n = row["prefill_tokens"] + row["continuation_tokens"]
        stream = for_chunks(stream, row["prefill_tokens"])
    held = peak_bytes(what, conditions.layers, conditions.dtype, row["peak_kv"], stream, n)
    return row | {"peak_kv_mib": held / 2**20}


def baseline_policy(policy: EvictionPolicy, protocol: str, trained_length: int | None) -> EvictionPolicy:
    """The policy that the fixed baseline re-computes beside another: its total S + W + slack, but at most the cap or
    the trained length. A chunk's prefill is as long for the baseline; in other protocols nothing of it is ever pruned
    lazily."""
    window = min(policy.kept + policy.cache_slack, TOTAL_KV_CAP, trained_length or TOTAL_KV_CAP)
    return EvictionPolicy(
        n_sink=0, window_size=window, compress_every=policy.compress_every if protocol == "chunked" else 1
    )


def average(runs: Sequence[Measured]) -> Measured:
    """One record of several runs of the same: times are means, with their standard deviation as `NAME_std` and the
    interval of the time ratio over the runs' own, and `speed_entry` names all of theirs; losses do not differ. Of one
    run, that run."""
    record, losses = runs[0]
    if len(runs) == 1:
        return record, losses
    import numpy as np

    from .quality import median_interval

    mean: dict[str, Any] = {}
    for name in (name for name in _TIMES if name in record):
        values = np.array([run[name] for run, _ in runs])
        mean |= {name: float(values.mean()), f"{name}_std": float(values.std(ddof=1))}
    for name in ("time_ratio", "measured_tpot_ms"):
        interval = median_interval(np.array([run[name] for run, _ in runs]))
        mean |= {f"{name}_low": interval.low, f"{name}_high": interval.high}
    mean |= {"runs": len(runs)}
    if entries := [run["speed_entry"] for run, _ in runs if "speed_entry" in run]:
        mean["speed_entry"] = " ".join(entries)
    return record | mean | {"reused": all(run["reused"] for run, _ in runs)}, losses


def as_baseline(record: Row, losses: np.ndarray, comparison: QualityComparison | None) -> Row:
    """The row of what is itself the baseline; of a stream, with its perplexity over all tokens."""
    if comparison is not None:
        record = record | sampled(losses, comparison, record["n_tokens"] - 1)
    return record | {"speedup": 1.0, "ppl_increase_percent": 0.0}


def sampled(losses: np.ndarray, comparison: QualityComparison, n_losses: int) -> dict[str, Any]:
    """For a method whose losses are known only at a sample of the text's `n_losses` tokens: its perplexity over all of
    them, from its difference to the reference at the sample."""
    return {
        **comparison.perplexity(losses).flat("perplexity"),
        **comparison.vs_strict(losses).flat("ppl_vs_strict_percent"),
        "evaluated_tokens": n_losses,
        "sampled_tokens": len(losses),
    }


def compared(
    record: AnyRow, losses: np.ndarray, baseline: Measured, comparison: QualityComparison | None
) -> dict[str, Any]:
    """A result's meaning beside strict StreamingLLM and beside the baseline. Without a comparison, as by chunks, the
    perplexities' ratio is over the tokens that both were taken at."""
    from .quality import paired_increase

    if comparison is None:
        chunk = record.get("continuation_tokens")
        quality = paired_increase(losses, baseline[1], chunk).flat("ppl_increase_percent")
    else:
        quality = {
            **comparison.vs_strict(losses).flat("ppl_vs_strict_percent"),
            **comparison.increase(losses).flat("ppl_increase_percent"),
        }
    return speedup(record, baseline[0]) | quality
