"""A front of three objectives: the plane of each two, shaded by the third.

Of a colour for the third in one plane, of lines across three axes and of three planes, only in the planes can all three
values be read, and seen why a point is on the front that lies behind others: another plane shows it ahead. Shades are
as light and dark in grey as in colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from streamllm.results.front import pareto_front
from streamllm.results.schema import OBJECTIVES, AnyRow, number
from streamllm.results.study import StudyResults

from ..recommendation import recommended
from .style import GREY, LABELS, MARKERS, VERMILLION, NoDataError, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARGIN = 0.15
"""Of an axis' length, around the front: points far behind it would flatten it."""
_APART = (0.07, 0.07)
"""Shares of an axis, across and upwards, between numbers: of points that are closer, the first one's."""


def planes(study: StudyResults) -> Figure:
    """The front and, hollow, what it leaves behind; the steps join what no other of the front beats in that plane
    alone. Raises NoDataError for fewer objectives than three, and where nothing is on the front."""
    names = list(study.objectives)
    if len(names) < 3 or study.is_matrix:
        raise NoDataError("needs three objectives")
    front, on_front = study.front, {row["trial"] for row in study.front}
    if not front:
        raise NoDataError("no trial is complete and feasible")
    others = [row for row in study.trials if row["trial"] not in on_front and _has(row, names)]
    figure = new_figure(11, 4.4)
    spans = {name: _span([row[name] for row in front]) for name in names}
    best = recommended(study, front).row
    shapes = dict(zip(dict.fromkeys(row["method"] for row in front), MARKERS, strict=False))
    for axes, (x, y) in zip(figure.subplots(1, 3), combinations(names[:3], 2), strict=True):
        (third,) = {*names[:3]} - {x, y}
        axes.plot(
            [row[x] for row in others], [row[y] for row in others], "o", color=GREY, markersize=4, fillstyle="none"
        )
        _steps(axes, front, x, y)
        _shaded(figure, axes, front, x, y, third, shapes)
        if best is not None:
            axes.plot(best[x], best[y], "o", markersize=15, color=VERMILLION, fillstyle="none", zorder=4)
        axes.set(xlabel=LABELS[x], ylabel=LABELS[y], xlim=spans[x], ylim=spans[y])
        _number(axes, front, x, y)
    _legend(figure, shapes, sum(_is_outside(row, spans) for row in others))
    title = f"{study.configuration['summary']}: Pareto front, {len(front)} of {len(study.trials)} trials"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def _has(row: AnyRow, names: Sequence[str]) -> bool:
    return row["state"] == "complete" and all(number(row, name) is not None for name in names)


def _span(values: Sequence[float]) -> tuple[float, float]:
    margin = _MARGIN * (max(values) - min(values)) or 0.1 * abs(values[0]) or 1.0
    return min(values) - margin, max(values) + margin


def _is_outside(row: AnyRow, spans: dict[str, tuple[float, float]]) -> bool:
    """In some plane, which is in some value."""
    return any(not low <= row[name] <= high for name, (low, high) in spans.items())


def _steps(axes: Axes, front: Sequence[AnyRow], x: str, y: str) -> None:
    both = pareto_front(front, {name: OBJECTIVES[name] for name in (x, y)})
    best = sorted({(row[x], row[y]) for row in both})
    where = "post" if OBJECTIVES[x] == "minimize" else "pre"
    axes.plot(*zip(*best, strict=True), color="0.3", linewidth=1, drawstyle=f"steps-{where}")


def _shaded(
    figure: Figure, axes: Axes, front: Sequence[AnyRow], x: str, y: str, third: str, shapes: dict[str, str]
) -> None:
    """With the scale of the shades above: dark is what is wanted."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    values = [row[third] for row in front]
    spread = 0.0 if min(values) < max(values) else abs(values[0]) or 1.0
    scale = Normalize(min(values) - spread, max(values) + spread)
    shades = ScalarMappable(scale, "cividis" if OBJECTIVES[third] == "minimize" else "cividis_r")
    for method, shape in shapes.items():
        of = [row for row in front if row["method"] == method]
        colors = [shades.to_rgba(row[third]) for row in of]
        axes.scatter(
            [r[x] for r in of], [r[y] for r in of], c=colors, marker=shape, s=55, edgecolor="k", lw=0.6, zorder=3
        )
    bar = figure.colorbar(shades, ax=axes, location="top", aspect=30, pad=0.02)
    bar.set_label(f"shade: {LABELS[third]}")
    bar.ax.locator_params(nbins=5)


def _number(axes: Axes, rows: Sequence[AnyRow], x: str, y: str) -> None:
    """Trial numbers beside the points. The axes have their limits already."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    said: list[tuple[float, float]] = []
    for row in rows:
        at = (row[x] - left) / (right - left), (row[y] - low) / (high - low)
        if all(abs(at[0] - other[0]) > _APART[0] or abs(at[1] - other[1]) > _APART[1] for other in said):
            axes.annotate(str(row["trial"]), (row[x], row[y]), xytext=(5, 5), textcoords="offset points", fontsize=8)
            said.append(at)


def _legend(figure: Figure, shapes: dict[str, str], outside: int) -> None:
    from matplotlib.lines import Line2D

    def mark(shape: str, label: str, color: str = "k", size: int = 6) -> Line2D:
        return Line2D([], [], color=color, marker=shape, linestyle="", fillstyle="none", markersize=size, label=label)

    behind = f"behind it; {outside} out of sight" if outside else "behind it"
    handles = [
        *(mark(shape, f"on the front, {method}") for method, shape in shapes.items()),
        mark("o", behind, GREY, 4),
        mark("o", "recommended", VERMILLION, 12),
        Line2D([], [], color="0.3", linewidth=1, label="best in this plane alone"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
