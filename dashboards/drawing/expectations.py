"""What the search's model of times and qualities expected: whether it was right, and what is left to gain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamllm.results.checks import checked_expectation
from streamllm.results.damaged import read_lines
from streamllm.results.front import pareto_front
from streamllm.results.schema import FIELDS, AnyRow, is_score, number, told_name
from streamllm.results.study import StudyResults

from .style import BLUE, GREY, LABELS, VERMILLION, NoDataError, grid, interval_errors, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEWEST = 6
"""Measurements, for a comparison with what was expected of them."""
_COMPARED = ("measured", "expected", "expected_low", "expected_high")
_WITH_INTERVALS = 12
"""Configurations that were not timed; of more, intervals would cover everything."""
_MAY_ADD = 1e-3
"""Share of the hypervolume, for a configuration to be drawn as one that may add something."""


def expectations(study: StudyResults) -> Figure:
    """Left, what was measured against what all other measurements let expect of it; right, the plane of the first two
    objectives, with what was timed and what is expected of the rest. Raises NoDataError for searches without a model,
    and of too few trials."""
    found, _ = read_lines(study.files.expected, checked_expectation)
    directions = {told_name(name): direction for name, direction in list(study.objectives.items())[:2]}
    x, y = directions
    rows = [row for row in found.values() if number(row, x) is not None and number(row, y) is not None]
    timed = [row for row in rows if row["timed"] and all(number(row, name) is not None for name in _COMPARED)]
    if len(timed) < _FEWEST:
        raise NoDataError(f"no model of the search, or fewer than {_FEWEST} trials")
    figure = new_figure(11, 4.5, panels=2)
    left, right = figure.subplots(*grid(2))
    _calibration(left, timed)
    _left_to_gain(right, rows, directions)
    return figure


def _calibration(axes: Axes, timed: Sequence[AnyRow]) -> None:
    expected, measured = ([row[name] for row in timed] for name in ("expected", "measured"))
    inside = sum(row["expected_low"] <= row["measured"] <= row["expected_high"] for row in timed)
    ends = interval_errors(timed, "expected")
    axes.errorbar(measured, expected, yerr=ends, fmt="o", color=BLUE, ecolor=GREY, markersize=4, elinewidth=0.8)
    line = [min(measured), max(measured)]
    axes.plot(line, line, color=VERMILLION, linewidth=1, zorder=0)
    axes.set_xlabel(f"measured: {_label(str(timed[0].get('of', 'time_ratio')))}")
    axes.set_ylabel("expected, by all other measurements")
    axes.set_title(f"{inside} of {len(timed)} within their interval of 95%")


def _left_to_gain(axes: Axes, rows: Sequence[AnyRow], directions: dict[str, str]) -> None:
    x, y = directions
    timed = [row for row in rows if row["timed"]]
    rest = sorted((row for row in rows if not row["timed"]), key=lambda row: -row["gain"])
    best = [row for row in rest[:_WITH_INTERVALS] if row["gain"] > _MAY_ADD]
    others = rest[len(best) :]
    for label, some, color, marker in (
        ("rest", others, GREY, "."),
        ("may add most", best, VERMILLION, "o"),
        ("timed", timed, BLUE, "D"),
    ):
        if some:
            with_ends = color != GREY
            axes.errorbar(
                [row[x] for row in some],
                [row[y] for row in some],
                xerr=interval_errors(some, x) if with_ends else None,
                yerr=interval_errors(some, y) if with_ends else None,
                fmt=marker,
                color=color,
                markersize=4,
                elinewidth=0.6,
                label=f"{label}: {len(some)}",
            )
    front = pareto_front([dict(row) | {"state": "complete"} for row in timed], directions)
    _look_at(axes, [*front, *best], x, y)
    axes.set_xlabel(_label(x))
    axes.set_ylabel(_label(y))
    axes.legend(fontsize=7)
    axes.set_title(f"of the rest, the {len(rest)} that may add most")


def _label(name: str) -> str:
    if name == "time_ratio":
        return "time per token over the reference's"
    return LABELS[name] if name in FIELDS or is_score(name) else name


def _look_at(axes: Axes, rows: Sequence[AnyRow], x: str, y: str) -> None:
    """The part of the plane where these rows are, and as much again around it."""
    for name, limit in ((x, axes.set_xlim), (y, axes.set_ylim)):
        values = [row[name] for row in rows]
        margin = (max(values) - min(values)) / 2 or 0.1 * abs(values[0]) or 0.1
        limit(min(values) - margin, max(values) + margin)
