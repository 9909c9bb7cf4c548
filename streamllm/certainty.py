"""How sure we can be of times and of fronts: intervals of paired times, probabilities, which points are told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .quality import Estimate, median_interval

_ROUND_SPREAD = 0.02
"""Standard deviation of a configuration's log ratio between rounds, assumed where no candidate has two rounds."""


def ratio_interval(ratios: np.ndarray) -> Estimate:
    """Of one measurement: the median of the ratios (pairs,) of its segments to the reference's, with its interval."""
    return median_interval(ratios)


def time_draws(rounds: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios (candidates,) to the reference decoder's time, and draws (draws, candidates) of what they may be.

    rounds: per candidate (rounds, pairs), time of a segment over that of the reference's beside it.

    A candidate's estimate is the mean over its rounds of the log median ratio. The error of a round's median has two
    parts: what its pairs scatter, seen in each candidate's own pairs, and what differs between rounds (another decoder,
    memory laid out anew), for which two or three rounds of one candidate say too little: that variance is pooled over
    all. Draws are t distributed by the pooled degrees of freedom."""
    medians = [np.median(np.log(one), axis=1) for one in rounds]
    within = np.array([np.mean([_median_variance(pairs) for pairs in np.log(one)]) for one in rounds])
    counts = np.array([len(one) for one in medians])
    freedom = int((counts - 1).sum())
    if freedom:
        scatter = sum(float(((one - one.mean()) ** 2).sum()) for one in medians) / freedom
        between = max(scatter - float(((counts - 1) * within).sum()) / freedom, 0.0)
    else:
        between = _ROUND_SPREAD**2
    estimates = np.array([one.mean() for one in medians])
    errors = np.sqrt((within + between) / counts)
    random = np.random.default_rng(seed)
    deviates = random.normal(size=(draws, len(rounds)))
    if freedom:
        deviates *= np.sqrt(freedom / random.chisquare(freedom, size=(draws, 1)))
    return estimates, estimates + errors * deviates


def front_probabilities(points: np.ndarray) -> np.ndarray:
    """(k,): the share of draws in which no other dominates the point.

    points: (draws, k, objectives), all to be minimised."""
    return 1 - _dominated(points).mean(axis=0)


def not_told_from(points: np.ndarray, level: float = 0.05) -> list[list[int]]:
    """For each point the others that it is better than in no objective for certain.

    points: (draws, k, objectives), all to be minimised. Certain: all that is said here is true at once with probability
    1 - level, whatever the number of points: differences count beyond the 1 - level quantile of the largest error, in
    standard deviations, among all pairs and objectives of a draw (as Tukey's and the max-t procedures)."""
    differences = points[:, :, None] - points[:, None]
    centre, spread = differences.mean(axis=0), differences.std(axis=0)
    errors = np.divide(differences - centre, spread, out=np.zeros_like(differences), where=spread > 0)
    margin = np.quantile(errors.max(axis=(1, 2, 3), initial=0), 1 - level)
    better = (centre < -margin * spread).any(-1)
    return [[j for j in range(len(better)) if j != i and not better[i, j]] for i in range(len(better))]


def told_apart_front(estimates: np.ndarray, not_told: Sequence[Sequence[int]], probabilities: np.ndarray) -> list[int]:
    """Members, ascending, of which each is for certain better than each other in some objective.

    Of the points (k, objectives) that no other dominates by estimate, the one least probably on the front among those
    not told from another member is left out, the last one if several are, until none is left."""
    members = [int(index) for index in np.flatnonzero(~_dominated(estimates))]
    while doubtful := [i for i in members if set(not_told[i]) & set(members)]:
        members.remove(min(doubtful, key=lambda i: (probabilities[i], -i)))
    return members


def _dominated(points: np.ndarray) -> np.ndarray:
    """(..., k): whether another of the points (..., k, objectives) is as good in all and better in one."""
    one, other = points[..., :, None, :], points[..., None, :, :]
    return np.asarray(((other <= one).all(axis=-1) & (other < one).any(axis=-1)).any(axis=-1))


def _median_variance(values: np.ndarray) -> float:
    """Variance of the median of `values`, by the bootstrap's exact law (Efron 1979; of an even number, the lower one).

    P(median of a resample > i-th smallest of n) = P(fewer than m of n draws are among the i smallest), m = (n+1) // 2.
    """
    ordered, n = np.sort(values), len(values)
    share = np.arange(n + 1) / n
    above = sum(math.comb(n, j) * share**j * (1 - share) ** (n - j) for j in range((n + 1) // 2))
    weights = -np.diff(above)
    return float(weights @ (ordered - weights @ ordered) ** 2)
