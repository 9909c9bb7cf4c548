"""A study's milliseconds, and joules: each timing's ratio to the reference beside it, times one pooled time of the
reference.

A ratio holds whatever else the machine did in that minute; milliseconds do not. So whatever is ranked, is ranked by
ratios, and all milliseconds of a table are ratios in one unit: the median time of the reference on that kind of worker.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..results.schema import AnyRow, Row

Kind = tuple[Any, ...]

WORKER = ("device", "threads", "software")
"""The properties that tell the kinds of workers apart: times of different kinds do not compare."""
_PAIRED = {
    "tpot_ms": ("time_ratio", "reference_tpot_ms"),
    "ttft_ms": ("ttft_ratio", "reference_ttft_ms"),
    "joules_per_token": ("energy_ratio", "reference_joules_per_token"),
}
"""What a table shows -> the ratio that it is told from, and what the reference had beside it."""
_KIND = ("model", "model_digest", "dtype", "quantization", "reference_total", "reference_execution", *WORKER)
"""Everything that the reference's time depends on."""


@dataclass(frozen=True, slots=True)
class ReferenceTime:
    """The reference's milliseconds per token on one kind of worker: the median of some timings, and the range of the
    middle nine tenths of them."""

    device: str
    threads: int | None
    """Threads of a CPU."""
    ms: float
    low: float
    high: float
    timings: int
    software: str | None = None
    """Versions that the times depend on, where the rows say them."""
    execution: str | None = None
    """How its steps were run, where that is not eagerly."""
    told: bool = False
    """Whether another time is told from it by nothing else."""

    def __str__(self) -> str:
        """A sentence without its end."""
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.threads else ""
        spread = (
            f", {self.low:.3g} to {self.high:.3g} in nine of ten of {self.timings} timings" if self.timings > 1 else ""
        )
        versions = f", {self.software or 'versions not known'}" if self.told else ""
        execution = f", {self.execution}" if self.execution else ""
        return f"{self.ms:.3g} ms on {self.device}{threads}{execution}{versions}{spread}"


def kind(row: AnyRow) -> Kind:
    """The kind of reference that a row was timed beside: its weights are the row's own, unless the row says whose."""
    if "reference_digest" in row:
        row = {**row, "model_digest": row["reference_digest"], "quantization": None}
    return tuple(row.get(name) for name in _KIND)


class ReferencePool:
    """The reference's time, time to first token and energy on each kind of worker, over all rows added so far."""

    def __init__(self, rows: Iterable[AnyRow] = ()) -> None:
        self._ordered: dict[str, dict[Kind, list[float]]] = {name: defaultdict(list) for name in _PAIRED}
        for row in rows:
            self.add(row)

    def add(self, row: AnyRow) -> None:
        """Takes in what the reference had beside the row."""
        for name, (_, beside) in _PAIRED.items():
            if beside in row:
                insort(self._ordered[name][kind(row)], row[beside])

    def time(self, of: Kind) -> ReferenceTime | None:
        ordered = self._ordered["tpot_ms"].get(of)
        if not ordered:
            return None
        low, median, high = (_quantile(ordered, share) for share in (0.05, 0.5, 0.95))
        named = dict(zip(_KIND, of, strict=True))
        who = named["device"], named["threads"]
        return ReferenceTime(*who, median, low, high, len(ordered), named["software"], named["reference_execution"])

    def times(self) -> list[ReferenceTime]:
        """One time for each kind, the one with the most timings first."""
        found = [time for of in self._ordered["tpot_ms"] if (time := self.time(of)) is not None]
        alike = Counter((time.device, time.threads, time.execution) for time in found)
        found = [replace(time, told=alike[time.device, time.threads, time.execution] > 1) for time in found]
        return sorted(found, key=lambda time: -time.timings)

    def with_time(self, row: Row) -> Row:
        """The row with `tpot_ms` and what follows from it, with `ttft_ms` and `joules_per_token`: of these, what was
        measured of it."""
        of = kind(row)
        found: dict[str, float] = {}
        for name, (ratio, _) in _PAIRED.items():
            if (ordered := self._ordered[name].get(of)) and ratio in row:
                unit = _quantile(ordered, 0.5)
                ends = (end for end in ("", "_low", "_high", "_std") if f"{ratio}{end}" in row)
                found |= {f"{name}{end}": row[f"{ratio}{end}"] * unit for end in ends}
        if "tpot_ms" in found:
            found["decode_toks_per_sec"] = 1e3 / found["tpot_ms"]
        return row | found


def with_times(rows: Sequence[Row]) -> list[Row]:
    """All of them in one unit, their own pooled reference."""
    pool = ReferencePool(rows)
    return [pool.with_time(row) for row in rows]


def speedup(row: AnyRow, baseline: AnyRow) -> dict[str, float]:
    """How many times as fast as the baseline: the quotient of their ratios to the reference, with both intervals; with
    none where neither has one."""
    value = baseline["time_ratio"] / row["time_ratio"]
    if "time_ratio_low" not in row and "time_ratio_low" not in baseline:
        return {"speedup": value}
    below = math.hypot(_half(baseline, "low"), _half(row, "high"))
    above = math.hypot(_half(baseline, "high"), _half(row, "low"))
    return {"speedup": value, "speedup_low": value * math.exp(-below), "speedup_high": value * math.exp(above)}


def _half(row: AnyRow, end: str) -> float:
    """The distance from the ratio to an end of its interval, in logarithms."""
    return math.log(row.get(f"time_ratio_{end}", row["time_ratio"]) / row["time_ratio"])


def _quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of ascending values, between neighbours in proportion. No numpy: this is read before anything heavy is
    there."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
