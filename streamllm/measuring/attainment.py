"""How sure a front is, as a region of the plane: which part of it so many of the drawn fronts attain.

A front attains a place that one of its points is as good as in both objectives. The empirical attainment function says
of each place which share of the drawn fronts attain it (Grunert da Fonseca, Fonseca & Hall 2001); where it is 5%, 50%
and 95% are staircases: between the outer two lies the front of nine draws in ten, whichever of the two objectives is
held fast.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEVELS = (5.0, 50.0, 95.0)
"""Percent of the drawn fronts."""
_NO_MATTER = 0.003
"""Share of a staircase's width and height below which a step cannot be seen."""


def attained(points: np.ndarray, levels: Sequence[float] = LEVELS) -> list[np.ndarray]:
    """For each level the corners (m, 2) of the region that at least so many percent of the drawn fronts attain, from
    the best in the first objective to the best in the second.

    points: (draws, k, 2), finite, all to be minimised; what is dominated in a draw changes nothing."""
    import moocore

    draws, count, _ = points.shape
    corners = moocore.eaf(points.reshape(-1, 2), np.repeat(np.arange(draws), count), percentiles=list(levels))
    return [_in_order(corners[np.isclose(corners[:, 2], level), :2]) for level in levels]


def best_within(corners: np.ndarray, limit: float) -> float:
    """The first objective's best in a region with these corners where the second is at most `limit`; inf if it has no
    such place."""
    return float(corners[corners[:, 1] <= limit, 0].min(initial=np.inf))


def thinned(corners: np.ndarray) -> np.ndarray:
    """Without the steps that cannot be seen: each that is left is a corner, and so are both ends."""
    least = _NO_MATTER * np.ptp(corners, axis=0)
    kept = [corners[0]]
    for corner in corners[1:-1]:
        if (np.abs(corner - kept[-1]) > least).any():
            kept.append(corner)
    return np.array([*kept, corners[-1]]) if len(corners) > 1 else corners


def _in_order(corners: np.ndarray) -> np.ndarray:
    return np.asarray(corners[np.argsort(corners[:, 0])])
