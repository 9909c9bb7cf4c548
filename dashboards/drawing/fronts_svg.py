"""Fronts as SVG for a page: a thumbnail of one study's, and several studies' in one chart.

Nothing is coloured here: the page's style sheet does that, light and dark, by the classes `s0` to `s7`; in grey they
are told apart by shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from streamllm.results.schema import AnyRow, number

from ..tables.columns import BY_KEY
from .style import LABELS

_SHAPES = (
    "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M0-6L6 0 0 6-6 0z", "M-4.5-4.5h9v9h-9z", "M0-5.5L6 5H-6z",
    "M0 5.5L6-5H-6z", "M-5-3l2-2 3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3z", "M-2-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
    "M-6-2.5h12v5h-12z",
)  # fmt: skip
"""Disc, diamond, square, triangles, cross, plus, bar."""
_MOST_DOTS = 200
"""Of a thumbnail's other trials."""
_LOG_FROM = 8.0
"""Times that the largest value across is the least, from which the axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Front:
    study: str
    objectives: Sequence[str]
    rows: Sequence[AnyRow]
    """On the front."""
    others: Sequence[AnyRow]
    best: AnyRow | None
    """The recommended row."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values on a line of pixels."""

    low: float
    high: float
    start: float
    """Where `low` is."""
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool = False) -> _Axis:
        """All of the values with some room on both sides. log: if they are positive and far apart."""
        low, high = min(values), max(values)
        if log and low > 0 and high / low > _LOG_FROM:
            return cls(low / 1.15, high * 1.15, start, end, True)
        room = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log(max(one, 1e-300)) for one in (value, low, high))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Four to nine round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [v for d in decades for m in (1, 2, 5) if self.low <= (v := m * 10.0**d) <= self.high]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step)
        return [step * n for n in range(first, math.floor(self.high / step) + 1)]


def thumbnail(front: Front) -> str:
    """The front's steps, its points and the trials near them; without axes. Text where there is no front."""
    x, y = front.objectives if len(front.objectives) == 2 else ("", "")
    points = _points(front.rows, x, y)
    if not points:
        return '<span class="quiet">no front yet</span>'
    everything = [*points, *_points(front.others, x, y)[:_MOST_DOTS]]
    near_x, near_y = (_near([p[i] for p in everything], [p[i] for p in points]) for i in (0, 1))
    across, up = _Axis.over(near_x, 8, 212), _Axis.over(near_y, 112, 8)
    dots = "".join(
        f"M{across.at(px)} {up.at(py)}h0"
        for px, py in everything[len(points) :]
        if across.low <= px <= across.high and up.low <= py <= up.high
    )
    best = front.best
    marks = "".join(
        f'<path class="{"best" if row is best else "front"}" '
        f'd="M{across.at(px)} {up.at(py)}m0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z"/>'
        for (px, py), row in zip(points, _finite(front.rows, x, y), strict=True)
    )
    label = f"Front of {front.study}: {len(points)} points, {LABELS[x]} across, {LABELS[y]} up"
    return (
        f'<svg viewBox="0 0 220 120" role="img" aria-label="{escape(label)}"><path class="dots" d="{dots}"/>'
        f'<path class="steps" d="{_steps(points, across, up)}"/>{marks}</svg>'
    )


def overlay(fronts: Sequence[Front]) -> str:
    """All fronts in the plane of their two objectives, which are the same, with intervals."""
    x, y = fronts[0].objectives
    values = [_points(front.rows, x, y) for front in fronts]
    ends = [
        (name, [value for front in fronts for row in front.rows for value in _interval(row, name)]) for name in (x, y)
    ]
    across, up = _Axis.over(ends[0][1], 76, 744, log=True), _Axis.over(ends[1][1], 380, 40)
    drawn = "".join(
        f'<g class="s{series}"><path class="steps" d="{_steps(points, across, up)}"/>'
        + "".join(_point(front, row, series, across, up) for row in _finite(front.rows, x, y))
        + "</g>"
        for series, (front, points) in enumerate(zip(fronts, values, strict=True))
    )
    label = f"Fronts of {', '.join(front.study for front in fronts)}: {LABELS[x]} across, {LABELS[y]} up"
    return f'<svg viewBox="0 0 760 450" role="img" aria-label="{escape(label)}">{_axes(across, up, x, y)}{drawn}</svg>'


def marker(series: int, x: float, y: float) -> str:
    return f'<g transform="translate({x} {y})"><path class="mark" d="{_SHAPES[series % len(_SHAPES)]}"/></g>'


def _point(front: Front, row: AnyRow, series: int, across: _Axis, up: _Axis) -> str:
    x, y = front.objectives
    px, py = across.at(row[x]), up.at(row[y])
    (left, right), (below, above) = (_interval(row, name) for name in (x, y))
    whiskers = f"M{across.at(left)} {py}H{across.at(right)}M{px} {up.at(below)}V{up.at(above)}"
    values = ", ".join(f"{BY_KEY[name].header} {BY_KEY[name].text(row)}" for name in (x, y))
    title = f"{front.study}, trial {row['trial']}: {values}"
    return f'<g><title>{escape(title)}</title><path class="whiskers" d="{whiskers}"/>{marker(series, px, py)}</g>'


def _axes(across: _Axis, up: _Axis, x: str, y: str) -> str:
    lines = "".join(f"M{across.at(v)} {up.end}V{up.start}" for v in across.ticks())
    lines += "".join(f"M{across.start} {up.at(v)}H{across.end}" for v in up.ticks())
    texts = "".join(
        f'<text x="{across.at(v)}" y="{up.start + 26}" text-anchor="middle">{float(f"{v:.4g}"):g}</text>'
        for v in across.ticks()
    )
    texts += "".join(
        f'<text x="{across.start - 8}" y="{up.at(v) + 6}" text-anchor="end">{float(f"{v:.4g}"):g}</text>'
        for v in up.ticks()
    )
    names = (
        f'<text x="{across.end}" y="{up.start + 58}" text-anchor="end">{escape(LABELS[x])} →</text>'
        f'<text x="8" y="24">↑ {escape(LABELS[y])}</text>'
    )
    return f'<path class="grid" d="{lines}"/>{texts}{names}'


def _steps(points: Sequence[tuple[float, float]], across: _Axis, up: _Axis) -> str:
    """Of a front, best first across: what none of its points reaches lies below."""
    (first, *rest) = points
    return f"M{across.at(first[0])} {up.at(first[1])}" + "".join(f"H{across.at(px)}V{up.at(py)}" for px, py in rest)


def _points(rows: Sequence[AnyRow], x: str, y: str) -> list[tuple[float, float]]:
    return [(float(row[x]), float(row[y])) for row in _finite(rows, x, y)]


def _finite(rows: Sequence[AnyRow], x: str, y: str) -> list[AnyRow]:
    return [row for row in rows if number(row, x) is not None and number(row, y) is not None]


def _interval(row: AnyRow, name: str) -> tuple[float, float]:
    value = row[name]
    return float(row.get(f"{name}_low", value)), float(row.get(f"{name}_high", value))


def _near(values: Sequence[float], front: Sequence[float]) -> list[float]:
    """Those no farther from the front than it is wide, or from a point than two thirds of the values are: one trial
    that went wrong would leave no room for the others."""
    low, high = min(front), max(front)
    reach = high - low or sorted(abs(value - low) for value in values)[2 * (len(values) - 1) // 3]
    return [*front, *(value for value in values if low - reach <= value <= high + reach)]
