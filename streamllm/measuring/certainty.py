"""How sure we can be of times and of fronts: intervals of paired times, probabilities, which points are told apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

_ROUND_SPREAD = 0.02
"""Standard deviation of a configuration's log ratio between rounds, assumed where no candidate has two rounds."""

_ROUNDING = 1e-12
_LEAST_SPREAD = 1e-6
"""Of a round's log median: no clock is better."""


def time_draws(
    rounds: Sequence[np.ndarray], numbers: Sequence[Sequence[int]] | None = None, draws: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios (candidates,) to the reference decoder's time, and draws (draws, candidates) of what they may be.

    rounds: per candidate (rounds, pairs), time of a segment over that of the reference's beside it; numbers: of these
    rounds, where not all candidates are in the same.

    The log median ratio of a candidate in a round is what is sought, plus what all share in that round (the reference
    was the same for all: another worker's, another minute's), plus its own (a decoder laid out anew in memory): a mixed
    model of two ways, its variances by their moments (Paule & Mandel 1982, once for each), estimates by generalised
    least squares. What is shared blurs ratios to the reference, not candidates against one another. Two or three rounds
    of one candidate say too little of its own scatter, so it is pooled over all; only what pairs scatter, of which each
    candidate has many, tells the noisy from the quiet. Draws are t distributed: what the estimates would be, were the
    errors drawn again."""
    who = np.repeat(np.arange(len(rounds)), [len(one) for one in rounds])
    names = np.concatenate([range(len(one)) for one in rounds] if numbers is None else list(numbers))
    when = np.unique(names, return_inverse=True)[1]
    medians = np.concatenate([np.log(np.median(one, axis=1)) for one in rounds])
    within = np.array([_median_variance(np.log(one)) for one in rounds])[who]
    candidate, shared_by = np.eye(len(rounds))[who], np.eye(when.max() + 1)[when]
    own, freedom = _own_variances(medians, within, candidate, shared_by)
    shared = _shared_variance(medians, own, candidate, shared_by)
    operator = _least_squares(candidate, np.diag(own) + shared * shared_by @ shared_by.T)
    random = np.random.default_rng(seed)
    errors = np.sqrt(own) * random.normal(size=(draws, len(medians))) * _t_scale(random, draws, freedom)
    of_rounds = random.normal(size=(draws, len(shared_by.T))) * _t_scale(random, draws, freedom)
    estimates = operator @ medians
    return estimates, estimates + (errors + math.sqrt(shared) * of_rounds @ shared_by.T) @ operator.T


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


def _own_variances(
    medians: np.ndarray, within: np.ndarray, candidate: np.ndarray, shared_by: np.ndarray
) -> tuple[np.ndarray, int]:
    """(n,): variances of what is a candidate's own in a round, and their degrees of freedom. within: of what pairs
    scatter, (n,).

    within + between, where `between` makes the squared residuals, each over its variance, sum to their degrees of
    freedom: each candidate by its own measure, so that the noisy do not drown the quiet. Where even 0 is too much, a
    share of `within`."""
    design = np.hstack((candidate, shared_by))
    if (freedom := len(medians) - int(np.linalg.matrix_rank(design))) == 0:
        design, freedom = candidate, len(medians) - candidate.shape[1]  # one candidate: all is its own
    if freedom == 0:
        return within + _ROUND_SPREAD**2, 0
    within = np.maximum(within, _LEAST_SPREAD**2)

    def squares(between: float) -> float:
        return _squares(medians, design, np.diag(within + between)) / freedom

    if (share := squares(0.0)) <= 1:
        return np.maximum(share * within, _LEAST_SPREAD**2), freedom
    return within + _root(squares, float(np.var(medians)) * len(medians)), freedom


def _shared_variance(medians: np.ndarray, own: np.ndarray, candidate: np.ndarray, shared_by: np.ndarray) -> float:
    """Of what all candidates of a round share: the rest of what their own does not explain."""
    freedom = len(medians) - candidate.shape[1]
    if freedom <= 0 or candidate.shape[1] == 1:
        return 0.0
    together = shared_by @ shared_by.T

    def squares(shared: float) -> float:
        return _squares(medians, candidate, np.diag(own) + shared * together) / freedom

    return 0.0 if squares(0.0) <= 1 else _root(squares, float(np.var(medians)) * len(medians))


def _least_squares(design: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """(parameters, n): of measurements of that covariance, the matrix that makes the estimates of them."""
    precision = np.linalg.inv(covariance)
    return np.asarray(np.linalg.pinv(design.T @ precision @ design) @ design.T @ precision)


def _squares(medians: np.ndarray, design: np.ndarray, covariance: np.ndarray) -> float:
    """Squared residuals, each over its variance."""
    residuals = medians - design @ (_least_squares(design, covariance) @ medians)
    return float(residuals @ np.linalg.solve(covariance, residuals))


def _root(falling: Callable[[float], float], most: float) -> float:
    """Where a falling function is 1."""
    low, high = 0.0, most
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if falling(middle) <= 1 else (middle, high)
    return high


def _t_scale(random: np.random.Generator, draws: int, freedom: int) -> np.ndarray:
    """(draws, 1): what makes normal deviates t distributed; 1 where nothing was estimated."""
    return np.sqrt(freedom / random.chisquare(freedom, size=(draws, 1))) if freedom else np.ones((draws, 1))


def _dominated(points: np.ndarray) -> np.ndarray:
    """(..., k): whether another of the points (..., k, objectives) is as good in all and better in one."""
    one, other = points[..., :, None, :], points[..., None, :, :]
    return np.asarray(((other <= one).all(axis=-1) & (other < one).any(axis=-1)).any(axis=-1))


def _median_variance(logarithms: np.ndarray) -> float:
    """Variance of the median of one round's pairs, as it were if logarithms (rounds, pairs) were normal: pi / 2 of a
    mean's, the standard deviation being sqrt(pi / 2) times the mean absolute deviation."""
    deviation = np.abs(logarithms - np.median(logarithms, axis=1, keepdims=True)).mean()
    return float((math.pi / 2 * deviation) ** 2 / logarithms.shape[1])
