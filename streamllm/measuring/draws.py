"""Draws of what candidates' objectives may be in truth: from their rounds of confirming, and from their losses.

What is said of a front's certainty (`certainty`, `attainment`) is said of these. The same rounds and losses give the
same draws, so that they are made again where they are needed, and kept nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..results.schema import STDERR, AnyRow, is_score
from .certainty import time_draws
from .quality import QualityComparison, mean_draws
from .store import Arrays, StoreError

PAIRED = {
    "tpot_ms": ("time_ratio", "minimize"),
    "speedup": ("time_ratio", "minimize"),
    "ttft_ms": ("ttft_ratio", "minimize"),
    "joules_per_token": ("energy_ratio", "minimize"),
    "perplexity": ("ppl_vs_strict_percent", "minimize"),
    "ppl_increase_percent": ("ppl_vs_strict_percent", "minimize"),
}
"""Objective -> what it is ranked by and which way: where all that configurations share cancels."""


def candidate_times(rounds: Sequence[Mapping[int, Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """`time_draws` of candidates: (candidates,) and (draws, candidates). rounds: of each, the ratios by round."""
    return time_draws([equally_long([*own.values()]) for own in rounds], [[*own] for own in rounds], seed=1)


def equally_long(series: Sequence[Sequence[float]]) -> np.ndarray:
    """(rounds, pairs): rounds of as many pairs as the shortest has."""
    length = min(map(len, series))
    return np.array([list(one[:length]) for one in series])


def objective_draws(
    name: str,
    direction: str,
    rows: Sequence[AnyRow],
    times: np.ndarray,
    comparison: QualityComparison,
    losses_of: Callable[[AnyRow], np.ndarray],
    arrays_of: Callable[[AnyRow], Arrays],
) -> np.ndarray:
    """(draws, rows), to be minimised: of what the objective is ranked by, times and perplexities as logarithms of
    ratios to the reference's. times: (draws, rows), log ratios."""
    paired, _ = PAIRED.get(name, (name, direction))
    if paired == "time_ratio":
        return times
    if paired == "ppl_vs_strict_percent":
        return comparison.draws([losses_of(row) for row in rows])
    if paired.startswith("kl") and (tables := _divergences(rows, arrays_of, paired)) is not None:
        return mean_draws(tables, rows[0]["n_tokens"] - 1, len(times))
    if paired in ("ttft_ratio", "energy_ratio"):
        return _ratio_draws(paired, rows, times.shape)
    sign = -1.0 if direction == "maximize" else 1.0
    if is_score(name):
        return sign * _score_draws(name, rows, times.shape)
    return np.broadcast_to([sign * float(row[name]) for row in rows], times.shape)


def _divergences(rows: Sequence[AnyRow], arrays_of: Callable[[AnyRow], Arrays], name: str) -> list[np.ndarray] | None:
    """Of each row (n, 2): position, nats; None where they cannot be read any more, or the measure is no mean of any."""
    places = name.replace("kl", "positions")
    found = []
    for row in rows:
        try:
            arrays = arrays_of(row)
            positions = arrays[places]
        except (StoreError, KeyError):
            return None
        found.append(np.column_stack((positions, arrays.get(name, np.zeros(len(positions))))))  # the reference has none
    return found


def _score_draws(name: str, rows: Sequence[AnyRow], shape: tuple[int, ...]) -> np.ndarray:
    """By the harness' standard errors, of each by itself: what configurations share in their documents is not known, so
    that fewer are told apart than could be."""
    errors = np.array([float(row.get(f"{name}{STDERR}", 0.0)) for row in rows])
    return np.array([float(row[name]) for row in rows]) + errors * np.random.default_rng(0).standard_normal(shape)


def _ratio_draws(name: str, rows: Sequence[AnyRow], shape: tuple[int, ...]) -> np.ndarray:
    """Log ratios that rounds do not take again: by the search's own interval, of each by itself."""
    ends = np.log([[float(row.get(f"{name}{end}", row[name])) for end in ("", "_low", "_high")] for row in rows])
    errors = (ends[:, 2] - ends[:, 1]) / (2 * 1.96)
    return ends[:, 0] + errors * np.random.default_rng(1).standard_normal(shape)
