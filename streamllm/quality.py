"""Quality: perplexity, and its increase over the re-computation baseline on the same tokens, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BASELINE_POSITIONS = 1024
"""Tokens of a text at which the baseline, which costs a whole window each, is evaluated."""

_RESAMPLES = 1000


class NonFiniteLossError(ArithmeticError):
    """A loss is inf or NaN; the message names token and cure."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float]:
        """As a part of a flat record."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def baseline_positions(n_tokens: int, count: int = BASELINE_POSITIONS) -> np.ndarray:
    """Ascending indices into the losses of a text of `n_tokens`, spread evenly; all of them if `count` is 0."""
    n_losses = n_tokens - 1
    if count == 0 or count >= n_losses:
        return np.arange(n_losses)
    return np.linspace(0, n_losses - 1, count).round().astype(np.int64)


def check_finite(losses: np.ndarray, dtype: str) -> None:
    """Raises NonFiniteLossError at the first loss that is no number: typically float16 eager attention overflowing."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise NonFiniteLossError(
            f"loss of token {bad[0] + 1} is {losses[bad[0]]} in {dtype} ({len(bad)} of {len(losses)} are not finite); "
            f"use --dtype bfloat16 or float32"
        )


def perplexity(losses: np.ndarray, seed: int = 0) -> Estimate:
    """exp of the mean loss; its interval from a block bootstrap, because losses of neighbouring tokens go together."""
    blocks = _block_means(losses)
    return _exp_of_mean(losses.mean(), blocks, seed)


def paired_increase(losses: np.ndarray, baseline: np.ndarray, seed: int = 0) -> Estimate:
    """Percent by which perplexity exceeds the baseline's over the tokens that both (n, 2: position, loss) have.

    Bootstrap over tokens, or over blocks of them where they are neighbours. Raises ValueError if they share none."""
    mean, units = _paired_units(losses, baseline)
    ratio = _exp_of_mean(mean, units, seed)
    return Estimate(*(100 * (x - 1) for x in (ratio.value, ratio.low, ratio.high)))


def joint_draws(losses: Sequence[np.ndarray], baseline: np.ndarray | None, draws: int, seed: int = 0) -> np.ndarray:
    """(draws, len(losses)): bootstrap draws of perplexities, or of percents above a baseline's. A draw takes the same
    tokens for all, so that what is easy or hard in a text does not blur their differences."""
    if baseline is None:
        units = np.stack([_block_means(table[:, 1]) for table in losses])
    else:
        units = np.stack([_paired_units(table, baseline)[1] for table in losses])
    count = units.shape[1]
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws) / count
    means = np.exp(weights @ units.T)
    return means if baseline is None else 100 * (means - 1)


def median_interval(values: np.ndarray) -> Estimate:
    """The median with the distribution-free interval between order statistics that covers it with 95% or more.

    P(median below the k-th smallest of n) = sum_{i<k} C(n, i) / 2^n. Fewer than 6 values: the whole range.
    """
    ordered, n = np.sort(values), len(values)
    below, k = 0.5**n, 0
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    edge = max(k - 1, 0)
    return Estimate(float(np.median(ordered)), float(ordered[edge]), float(ordered[n - 1 - edge]))


def _paired_units(losses: np.ndarray, baseline: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean difference over the shared tokens, and what a bootstrap draws from: differences, or means of blocks."""
    shared, own, theirs = np.intersect1d(losses[:, 0], baseline[:, 0], assume_unique=True, return_indices=True)
    if not len(shared):
        raise ValueError("no token has both losses")
    differences = losses[own, 1] - baseline[theirs, 1]
    neighbours = len(shared) == 1 or np.median(np.diff(shared)) == 1
    return differences.mean(), _block_means(differences) if neighbours else differences


def _block_means(losses: np.ndarray, block: int = 64) -> np.ndarray:
    count = max(len(losses) // block, 1)
    return np.array([part.mean() for part in np.array_split(losses, count)])


def _exp_of_mean(mean: float, units: np.ndarray, seed: int) -> Estimate:
    draws = np.random.default_rng(seed).integers(len(units), size=(_RESAMPLES, len(units)))
    low, high = np.quantile(units[draws].mean(axis=1), (0.025, 0.975))
    return Estimate(*(math.exp(x) for x in (mean, low, high)))
