"""The data of a report's page, which its script draws, sorts and filters, as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

from streamllm.results.schema import FIELDS, OBJECTIVES, AnyRow
from streamllm.results.study import StudyResults

from ..attainment import Band
from ..attainment import data as corners
from ..recommendation import reproduce_command
from ..tables.columns import COLUMNS, shown_columns, unsaid_settings
from ..tables.conditions import EXAMPLE
from ..tables.filters import FRONT, columns_of
from .sources import called, runs_address, traced

_AXES = ("tpot_ms", "ppl_vs_strict_percent", "ppl_increase_percent", *OBJECTIVES)
"""Offered in this order, each once."""
_HEADINGS = {column.key: column.heading for column in COLUMNS}
_SPELLED_OUT = ("perplexity", "ppl_vs_strict_percent", "ppl_increase_percent")
LABELS = _HEADINGS | {name: FIELDS[name].label for name in _SPELLED_OUT}
"""Of a measure, where it stands by itself."""
_DECIMALS = {column.key: column.decimals for column in COLUMNS if column.decimals is not None}
_NOT_OF_A_TRIAL = {"study", "trial", "recommended", "place", "dominated_by", "no_better_than"}
_VALUES = tuple(column.key for column in COLUMNS if column.key not in _NOT_OF_A_TRIAL)
_DETAILS = (*_VALUES, "state", "violated", "reason", "warning")
_SETTINGS = ("method", "backend", "backend_requested", "execution", "quantization")
_BAND_DIGITS, _DIGITS = 5, 6
"""Significant ones: what the chart and the table can show, and conditions compare."""


def data(
    study: StudyResults, front: Sequence[AnyRow], recommended: AnyRow | None, at: Path, sure: Band | str = ""
) -> str:
    """JSON that cannot end its element: no `<` is left in it. at: the folder that the page lies in."""
    rows = list(study.trials)
    names = [name for name in columns_of([*rows, *study.fixed]) if name != FRONT]
    plain = [name for name in names if not any(isinstance(row.get(name), list | tuple) for row in rows)]
    shared, keys = _apart(rows, plain)
    index = {row["trial"]: place for place, row in enumerate(rows)}
    measures = [name for name in dict.fromkeys([*study.objectives, *_AXES]) if any(name in row for row in rows)]
    details = [key for key in _DETAILS if key in names and key not in unsaid_settings(rows)]
    values = [column.key for column in shown_columns(rows, study.objectives) if column.key in details]
    value = {
        "shared": shared,
        "keys": keys,
        "rows": [[_shown(row.get(key)) for key in keys] for row in rows],
        "fixed": [{key: _shown(row.get(key)) for key in plain if key in row} for row in study.fixed],
        "known": sorted({*FIELDS} - {*plain}),
        "front": [index[row["trial"]] for row in front],
        "recommended": None if recommended is None else index[recommended["trial"]],
        "objectives": study.objectives,
        "band": None if isinstance(sure, str) else corners(sure, _BAND_DIGITS),
        "axes": measures if len(measures) > 1 else [*study.objectives][:2],
        "labels": {key: LABELS.get(key, key) for key in {*measures, *details}},
        "headings": {key: _HEADINGS.get(key, key) for key in ("trial", *details, *measures)},
        "decimals": _DECIMALS,
        "intervals": [column.key for column in COLUMNS if column.interval],
        "details": details,
        "table": [key for key in values if not _goes_without_saying(rows, key)],
        "inCommon": [key for key in values if _goes_without_saying(rows, key)],
        "example": EXAMPLE,
        "call": called(study),
        "trace": traced(study),
        "commands": _commands(study, rows),
        "folder": os.path.relpath(study.folder, at),
        "mlflow": runs_address(study),
    }
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _apart(rows: Sequence[AnyRow], names: Sequence[str]) -> tuple[dict[str, object], list[str]]:
    """What all rows share, and the names of what they differ in."""
    differ = [name for name in names if len({row.get(name) for row in rows}) > 1]
    shared = {name: _shown(rows[0].get(name)) for name in names if rows and name not in differ}
    return {name: value for name, value in shared.items() if value is not None}, differ


def _goes_without_saying(rows: Sequence[AnyRow], key: str) -> bool:
    """A setting or knob that three trials or more have in common; it is said once."""
    is_setting = key in _SETTINGS or (FIELDS[key].knob if key in FIELDS else False)
    return is_setting and len(rows) > 2 and len({row.get(key) for row in rows}) == 1


def _commands(study: StudyResults, rows: Sequence[AnyRow]) -> dict[str, object]:
    """The command that measures each trial again, and what it is compared with: a list of all words, and each command
    as their places in it, as it is nearly the same for all."""
    commands = [reproduce_command(study, row).split(" ") for row in (*rows, *study.fixed)]
    places = {word: place for place, word in enumerate(dict.fromkeys(word for one in commands for word in one))}
    return {"words": [*places], "of": [[places[word] for word in one] for one in commands]}


def _shown(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
