"""How the figures of studies look: the engine's style, and labels."""

from __future__ import annotations

from collections.abc import Sequence

from streamllm.figure_style import (
    BLACK,
    BLUE,
    CYCLE,
    GREEN,
    GREY,
    HATCHES,
    MARKERS,
    ORANGE,
    PAPER,
    PURPLE,
    SCREEN,
    SHAPES,
    SKY,
    VERMILLION,
    Medium,
    grid,
    medium,
    new_figure,
    save,
    style,
)
from streamllm.results.schema import FIELDS, AnyRow

__all__ = [
    "BLACK",
    "BLUE",
    "CYCLE",
    "GREEN",
    "GREY",
    "HATCHES",
    "LABELS",
    "MARKERS",
    "ORANGE",
    "PAPER",
    "PURPLE",
    "SCREEN",
    "SHAPES",
    "SKY",
    "VERMILLION",
    "Medium",
    "NoDataError",
    "grid",
    "interval_errors",
    "medium",
    "new_figure",
    "save",
    "style",
]


class _Labels(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return FIELDS[name].label or name


LABELS = _Labels({field.name: field.label for field in FIELDS.values() if field.label})
"""Labels of axes."""


def interval_errors(rows: Sequence[AnyRow], name: str) -> list[list[float]] | None:
    """How far the intervals reach below and above the values, as matplotlib's `errorbar` takes it; None where no row
    has one."""
    if not any(f"{name}_low" in row for row in rows):
        return None
    return [
        [max(row[name] - row.get(f"{name}_low", row[name]), 0) for row in rows],
        [max(row.get(f"{name}_high", row[name]) - row[name], 0) for row in rows],
    ]


class NoDataError(Exception):
    """A figure has nothing to show; the message says what it would take."""
