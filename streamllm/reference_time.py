"""A study's milliseconds: each timing's ratio to the reference beside it, times one pooled time of the reference.

A ratio holds whatever else the machine did in that minute; milliseconds do not. So whatever is ranked, is ranked by
ratios, and all milliseconds of a table are ratios in one unit: the median time of the reference on that kind of worker.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Kind = tuple[Any, ...]

_KIND = ("model", "model_digest", "dtype", "quantization", "device", "threads", "reference_total")
"""What the reference's time depends on."""


@dataclass(frozen=True, slots=True)
class ReferenceTime:
    """The reference's milliseconds per token on one kind of worker: the median of some timings, and the range of the
    middle nine tenths of them."""

    ms: float
    low: float
    high: float
    timings: int


def kind(row: Row) -> Kind:
    """What a row was timed on."""
    return tuple(row.get(name) for name in _KIND)


def reference_times(rows: Iterable[Row]) -> dict[Kind, ReferenceTime]:
    """Pooled by kind of worker, over all rows with a `reference_tpot_ms`."""
    found: dict[Kind, list[float]] = defaultdict(list)
    for row in rows:
        if "reference_tpot_ms" in row:
            found[kind(row)].append(row["reference_tpot_ms"])
    return {of: _pooled(values) for of, values in found.items()}


def with_time(row: Row, references: Mapping[Kind, ReferenceTime]) -> dict[str, Any]:
    """The row with `tpot_ms` and what follows from it; as it is if it was not timed."""
    reference = references.get(kind(row))
    if reference is None or "time_ratio" not in row:
        return dict(row)
    ends = ("", "_low", "_high", "_std")
    times = {f"tpot_ms{end}": row[f"time_ratio{end}"] * reference.ms for end in ends if f"time_ratio{end}" in row}
    return {**row, **times, "decode_toks_per_sec": 1e3 / times["tpot_ms"]}


def with_times(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """All of them in one unit, their own pooled reference."""
    references = reference_times(rows)
    return [with_time(row, references) for row in rows]


def speedup(row: Row, baseline: Row) -> dict[str, float]:
    """How many times as fast as the baseline: the quotient of two ratios to the reference, with the intervals of both."""
    value = baseline["time_ratio"] / row["time_ratio"]
    below = math.hypot(_half(baseline, "low"), _half(row, "high"))
    above = math.hypot(_half(baseline, "high"), _half(row, "low"))
    return {"speedup": value, "speedup_low": value * math.exp(-below), "speedup_high": value * math.exp(above)}


def _half(row: Row, end: str) -> float:
    """From the ratio to an end of its interval, in logarithms."""
    return math.log(row.get(f"time_ratio_{end}", row["time_ratio"]) / row["time_ratio"])


def _pooled(values: Sequence[float]) -> ReferenceTime:
    ordered = sorted(values)
    return ReferenceTime(_quantile(ordered, 0.5), _quantile(ordered, 0.05), _quantile(ordered, 0.95), len(ordered))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Of ascending values, between neighbours in proportion. No numpy: this is read before anything heavy is there."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
