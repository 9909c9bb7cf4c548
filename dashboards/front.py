"""The Pareto front: which trials nobody beats on every objective at once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
"""One finished trial, flat: knobs, metrics with `_low` and `_high`, what was used, `state`."""


def pareto_front(rows: Sequence[Row], objectives: Mapping[str, str]) -> list[Row]:
    """The complete, feasible rows that no other one dominates, best first in the first objective. Of rows with equal
    objectives all are kept; rows with a missing, NaN or infinite objective are never on the front.

    Where a row has a confirmed value of an objective, that one counts.

    objectives: name -> "minimize" or "maximize".
    """
    points = [(point, row) for row in rows if (point := _point(row, objectives)) is not None]
    points.sort(key=lambda pair: pair[0])
    front: list[tuple[tuple[float, ...], Row]] = []
    for point, row in points:  # in this order a later point never dominates an earlier one
        if not any(_dominates(other, point) for other, _ in front):
            front.append((point, row))
    return [row for _, row in front]


def confirmed(row: Row) -> Row:
    """The row with its confirmed values, where it has any, in place of those of the search."""
    prefix = "confirmed_"
    return {**row, **{name.removeprefix(prefix): row[name] for name in row if name.startswith(prefix)}}


def hypervolume(rows: Sequence[Row], objectives: Mapping[str, str], reference: Mapping[str, float]) -> float:
    """The volume, in the product of the objectives' units, between the front and a reference point that is worse than
    it: of the front's two or more objectives, the part that its rows dominate. Rows no better than the reference in
    every objective add nothing; no rows have volume 0.

    reference: objective -> value, each in its own direction.
    """
    corner = _point({"state": "complete"} | dict(reference), objectives)
    if corner is None:
        raise ValueError(f"reference {dict(reference)}: needs a finite value of each of {', '.join(objectives)}")
    points = [point for row in pareto_front(rows, objectives) if (point := _point(row, objectives)) is not None]
    return _volume([p for p in points if all(a < b for a, b in zip(p, corner, strict=True))], corner)


def _volume(points: Sequence[tuple[float, ...]], corner: tuple[float, ...]) -> float:
    """By slices along the last coordinate: between two points' the cross-section is that of the points so far."""
    if not points:
        return 0.0
    if len(corner) == 1:
        return corner[0] - min(point[0] for point in points)
    points = sorted(points, key=lambda point: point[-1])
    ends = [*(point[-1] for point in points[1:]), corner[-1]]
    return sum(
        (end - point[-1]) * _volume([p[:-1] for p in points[: index + 1]], corner[:-1])
        for index, (point, end) in enumerate(zip(points, ends, strict=True))
        if end > point[-1]
    )


def _point(row: Row, objectives: Mapping[str, str]) -> tuple[float, ...] | None:
    """The row's objectives, all to be minimised; None if it cannot be on a front."""
    if row.get("state") != "complete" or not row.get("feasible", True):
        return None
    values = [row.get(f"confirmed_{name}", row.get(name)) for name in objectives]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
        return None
    signs = (-1.0 if direction == "maximize" else 1.0 for direction in objectives.values())
    return tuple(sign * float(value) for sign, value in zip(signs, values, strict=True) if value is not None)


def _dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
