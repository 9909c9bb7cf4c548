"""The columns of the tables: what is shown of a row, under which header, in which unit, with how many digits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from streamllm.results.schema import FIELDS, POLICY_KNOBS, POLICY_WORDS, STDERR, AnyRow, is_score


@dataclass(frozen=True, slots=True)
class Column:
    key: str
    header: str
    unit: str = ""
    """Empty where the header says it, or there is none."""
    decimals: int | None = None
    """Where no interval says how many; None for words and whole numbers."""
    interval: bool = False
    """Whether rows may have `KEY_low` and `KEY_high`."""
    words: bool = False

    @classmethod
    def of(cls, name: str) -> Column:
        """The column of a knob, measure or fact."""
        field = FIELDS[name]
        return cls(name, field.header or name, field.unit, field.decimals, field.interval, field.words)

    @property
    def title(self) -> str:
        return f"{self.header} ({self.unit})" if self.unit else self.header

    @property
    def heading(self) -> str:
        """The title where there is little room: nearly all are tokens, which is not said."""
        return self.header if self.unit == "tokens" else self.title

    @property
    def keys(self) -> tuple[str, ...]:
        """The row's keys that the column shows, including those of the interval."""
        return (self.key, f"{self.key}_low", f"{self.key}_high") if self.interval else (self.key,)

    def text(self, row: AnyRow) -> str:
        """The value, to the digit where its interval begins to matter, and the interval; empty if there is none."""
        value = row.get(self.key)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if self.decimals is None or not isinstance(value, int | float):
            return str(value)
        if (error := row.get(f"{self.key}{STDERR}")) is not None:
            return f"{_fixed(value, self.decimals)} ± {_fixed(error, self.decimals)}"
        low, high = row.get(f"{self.key}_low"), row.get(f"{self.key}_high")
        if not self.interval or low is None or high is None or low == high:  # of too little for an interval
            return _fixed(value, self.decimals)
        decimals = interval_decimals(low, high, self.decimals)
        return f"{_fixed(value, decimals)} [{_fixed(low, decimals)}, {_fixed(high, decimals)}]"


POLICY_COLUMNS = tuple(Column.of(field.name) for field in POLICY_KNOBS)
_PLACED = (
    Column("place", "place", words=True),
    Column("dominated_by", "dominated by"),
    Column("no_better_than", "no better than", words=True),
)
COLUMNS = (
    Column("study", "study", words=True),
    Column.of("trial"),
    Column("recommended", "recommended", words=True),
    *map(Column.of, ("method", "backend", "backend_requested", "execution", "quantization")),
    *POLICY_COLUMNS,
    *(Column.of(field.name) for field in POLICY_WORDS),
    *map(Column.of, ("peak_kv", "peak_kv_mib", "peak_memory_mb", "tpot_ms", "speedup")),
    *map(Column.of, ("ttft_ms", "joules_per_token", "rounds", "front_probability")),
    *map(Column.of, ("perplexity", "ppl_vs_strict_percent", "ppl_increase_percent")),
    *map(Column.of, ("kl", "kl_p99", "same_top_percent", "dp_rms_percent")),
    *map(Column.of, ("kl_vs_recompute", "kl_vs_recompute_p99")),
    *map(Column.of, ("same_top_vs_recompute_percent", "dp_rms_vs_recompute_percent")),
    *_PLACED,
)
"""Columns of a study's table, in order. The last three come from `pareto_table`, the others from rows."""


class _ByKey(dict[str, Column]):
    def __missing__(self, name: str) -> Column:
        return Column.of(name)


BY_KEY = _ByKey({column.key: column for column in COLUMNS})
"""And of any other knob, measure or fact, scores of tasks included."""
SPEEDUP = replace(BY_KEY["speedup"], decimals=2, interval=False)
"""For tables that have no room for its interval."""

_WHERE_THERE = {
    "study",
    "recommended",
    "ppl_vs_strict_percent",
    "front_probability",
    "place",
    "dominated_by",
    "no_better_than",
}
"""Columns that only rows with such a value have."""


_ASKED_FOR = {
    "peak_memory_mb",
    "ttft_ms",
    "joules_per_token",
    "kl",
    "kl_p99",
    "same_top_percent",
    "dp_rms_percent",
    "kl_vs_recompute",
    "kl_vs_recompute_p99",
    "same_top_vs_recompute_percent",
    "dp_rms_vs_recompute_percent",
}
"""Columns that are shown where they are objectives."""


def shown_columns(rows: Sequence[AnyRow], objectives: Collection[str] = ()) -> tuple[Column, ...]:
    """All but those that say nothing: settings that go without saying, memory, energy, the first token and details of
    predictions where they are no objective, the cache's bytes where they are as its tokens, the rounds of confirming
    where they are the same in every row."""
    present = {key for row in rows for key in _WHERE_THERE if row.get(key) is not None}
    needless = (_WHERE_THERE - present) | unsaid_settings(rows) | (_ASKED_FOR - {*objectives})
    if "peak_kv_mib" not in objectives and not bytes_differ(rows):
        needless.add("peak_kv_mib")
    if len({row.get("rounds", 0) for row in rows if row.get("state") == "complete"}) < 2:
        needless.add("rounds")
    scores = dict.fromkeys([*filter(is_score, objectives), *(key for row in rows for key in row if is_score(key))])
    placed = [column.key for column in _PLACED]
    shown = [column for column in COLUMNS if column.key not in needless]
    before = [column for column in shown if column.key not in placed]
    return (*before, *map(Column.of, scores), *(column for column in shown if column.key in placed))


def bytes_differ(rows: Sequence[AnyRow]) -> bool:
    """Whether a token of one row's cache takes other memory than one of another's: by the model, its dtype, or the
    method, where layers have windows of their own."""
    per_token = [
        row["kv_bytes_per_token"] if not row.get("peak_kv_mib") else round(row["peak_kv_mib"] * 2**20 / row["peak_kv"])
        for row in rows
        if row.get("kv_bytes_per_token") is not None
    ]
    return len(set(per_token)) > 1


def unsaid_settings(rows: Sequence[AnyRow]) -> set[str]:
    """Execution, quantization and the policy's words where all rows have the usual one, the backend asked for where it
    is the one that ran."""
    names = ("execution", "quantization", *(field.name for field in POLICY_WORDS))
    unsaid = {name for name in names if all(row.get(name, FIELDS[name].usual) == FIELDS[name].usual for row in rows)}
    granted = (row.get("backend_requested") in (row.get("backend"), None) or "backend" not in row for row in rows)
    return unsaid | {"backend_requested"} if all(granted) else unsaid


def interval_decimals(low: float, high: float, otherwise: int) -> int:
    """Decimals of a value with that interval, by the Particle Data Group's rule: the half-width has two significant
    digits where they are up to 35, else one. `otherwise` where it has no width, or none that is finite."""
    half = (high - low) / 2
    if not math.isfinite(half) or half <= 0:
        return otherwise
    mantissa, exponent = f"{half:.2e}".split("e")
    return max((2 if float(mantissa) < 3.55 else 1) - 1 - int(exponent), 0)


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text
