"""How sure we can be of times and of fronts: intervals of paired times, probabilities, which points are told apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_ROUND_SPREAD = 0.02
"""Standard deviation of a configuration's log ratio between rounds, assumed where no candidate has two rounds."""

_ROUNDING = 1e-12


def time_draws(rounds: Sequence[np.ndarray], draws: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios (candidates,) to the reference decoder's time, and draws (draws, candidates) of what they may be.

    rounds: per candidate (rounds, pairs), time of a segment over that of the reference's beside it.

    A candidate's estimate is the mean over its rounds of the log median ratio. Its error is seen where it matters, in
    how a candidate's medians differ between rounds (another decoder, memory laid out anew, another load). Two or three
    rounds of one candidate say too little of that, so it is pooled over all; only what pairs scatter, of which each
    candidate has many, tells the noisy from the quiet. Draws are t distributed by the pooled degrees of freedom."""
    medians = [np.log(np.median(one, axis=1)) for one in rounds]
    counts = np.array([len(one) for one in medians])
    within = np.array([_median_variance(np.log(one)) for one in rounds])
    squares = np.array([float(((one - one.mean()) ** 2).sum()) for one in medians])
    freedom = int((counts - 1).sum())
    variances = _round_variances(within, squares, freedom) if freedom else within + _ROUND_SPREAD**2
    estimates = np.array([one.mean() for one in medians])
    random = np.random.default_rng(seed)
    deviates = random.normal(size=(draws, len(rounds)))
    if freedom:
        deviates *= np.sqrt(freedom / random.chisquare(freedom, size=(draws, 1)))
    return estimates, estimates + np.sqrt(variances / counts) * deviates


def front_probabilities(points: np.ndarray) -> np.ndarray:
    """(k,): the share of draws in which no other dominates the point.

    points: (draws, k, objectives), all to be minimised."""
    return 1 - _dominated(points).mean(axis=0)


def not_told_from(points: np.ndarray, level: float = 0.05) -> list[list[int]]:
    """For each point the others that it is better than in no objective for certain.

    points: (draws, k, objectives), all to be minimised. Certain: whatever the number of points, with probability
    1 - level nothing that is said here is wrong. Differences count beyond the 1 - level quantile, over draws, of the
    largest error among all pairs and objectives, in standard deviations; those that count then leave it to the others
    to be the largest, until no more do (step-down max-t: Romano & Wolf 2005)."""
    count = points.shape[1]
    one, other = np.triu_indices(count, 1)
    differences = points[:, one] - points[:, other]
    centre, spread = differences.mean(axis=0), differences.std(axis=0)
    uncertain = spread > _ROUNDING * (1 + np.abs(centre))
    distances = np.divide(np.abs(centre), spread, out=np.full_like(centre, np.inf), where=uncertain)
    errors = np.abs(np.divide(differences - centre, spread, out=np.zeros_like(differences), where=uncertain))
    told = ~uncertain
    while not told.all():
        largest = errors[:, ~told].max(axis=1)
        fresh = ~told & (distances > np.quantile(largest, 1 - level))
        if not fresh.any():
            break
        told |= fresh
    better = np.zeros((count, count), dtype=bool)
    better[one, other] = (told & (centre < -_ROUNDING)).any(axis=-1)
    better[other, one] = (told & (centre > _ROUNDING)).any(axis=-1)
    return [[j for j in range(count) if j != i and not better[i, j]] for i in range(count)]


def told_apart_front(estimates: np.ndarray, not_told: Sequence[Sequence[int]], probabilities: np.ndarray) -> list[int]:
    """Members, ascending, of which each is for certain better than each other in some objective.

    Of the points (k, objectives) that no other dominates by estimate, the one least probably on the front among those
    not told from another member is left out, the last one if several are, until none is left."""
    members = [int(index) for index in np.flatnonzero(~_dominated(estimates))]
    while doubtful := [i for i in members if set(not_told[i]) & set(members)]:
        members.remove(min(doubtful, key=lambda i: (probabilities[i], -i)))
    return members


def _round_variances(within: np.ndarray, squares: np.ndarray, freedom: int) -> np.ndarray:
    """(k,): variance of one round's log median. within: what pairs scatter, (k,); squares: sums of squared deviations
    of a candidate's medians from their mean, (k,), with `freedom` degrees of freedom in all.

    within + between, where `between` solves sum(squares / (within + between)) = freedom (Paule & Mandel 1982: each
    candidate by its own measure, so that the noisy do not drown the quiet); where even 0 is too much, a share of
    `within`."""
    within = np.maximum(within, _ROUNDING**2)
    share = float((squares / within).sum()) / freedom
    if share <= 1:
        return share * within
    low, high = 0.0, float(squares.sum()) / freedom
    for _ in range(60):
        between = (low + high) / 2
        enough = float((squares / (within + between)).sum()) <= freedom
        low, high = (low, between) if enough else (between, high)
    return within + high


def _dominated(points: np.ndarray) -> np.ndarray:
    """(..., k): whether another of the points (..., k, objectives) is as good in all and better in one."""
    one, other = points[..., :, None, :], points[..., None, :, :]
    return np.asarray(((other <= one).all(axis=-1) & (other < one).any(axis=-1)).any(axis=-1))


def _median_variance(logarithms: np.ndarray) -> float:
    """Variance of the median of one round's pairs, as it were if logarithms (rounds, pairs) were normal: pi / 2 of a
    mean's, the standard deviation being sqrt(pi / 2) times the mean absolute deviation."""
    deviation = np.abs(logarithms - np.median(logarithms, axis=1, keepdims=True)).mean()
    return float((math.pi / 2 * deviation) ** 2 / logarithms.shape[1])
