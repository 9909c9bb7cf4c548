"""Quality: what a policy's losses say beside a reference's and a baseline's on the same text, with 95% intervals.

Intervals are for what text of this kind would give, not for this one text: they come from contiguous blocks of it
(batch means), because losses of neighbouring tokens go together. With u_b what block b adds to an estimate's error,
the estimate's variance is B / (B - 1) sum_b u_b^2, and Student's t with B - 1 degrees of freedom gives the interval.
A mean over tokens that only some blocks have, c_b each, is the ratio of two sums: u_b = sum (x - mean) / sum_b c_b.
Of a text in chunks, each with a cache of its own, the chunks are the blocks. One block says nothing of others: what
rests on one has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_FEWEST_BLOCKS = 8
_BLOCK_FACTOR = 8
"""Blocks of 8 sqrt(n) tokens: the square root as in Flegal & Jones (2010), the factor from what differences between
policies are like: they hang together over tens of tokens, with their topics over hundreds (tests.benchmarks.coverage).
Shorter blocks claim too much; longer ones cost t's wider quantile, 7% at 23,000 tokens and 20% at 2,000."""
FEW_LOSSES = 256
"""Fewer say so little that their row has to say it: of losses that spread by 3 nats, perplexity is known to a factor of
1.4 by then."""
_Z = 1.959963984540054
_SMALL_T = {1: 12.706204736432095, 2: 4.302652729749464}


class NonFiniteLossError(ArithmeticError):
    """A loss is inf or NaN; the message names token and cure."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval, whose ends are NaN where nothing is known of it."""

    value: float
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float]:
        """As a part of a flat record; an unknown interval is not in it."""
        value = {name: self.value}
        if math.isnan(self.low) or math.isnan(self.high):
            return value
        return value | {f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True, slots=True)
class _Mean:
    """A mean over some tokens of a text, in nats, or a sum of such means."""

    value: float
    errors: np.ndarray
    """(blocks,): what each block of the text adds to the mean's error."""
    occupied: int
    """Blocks that have some of the tokens."""

    def __add__(self, other: _Mean) -> _Mean:
        return _Mean(self.value + other.value, self.errors + other.errors, min(self.occupied, other.occupied))

    def __neg__(self) -> _Mean:
        return _Mean(-self.value, -self.errors, self.occupied)

    def interval(self) -> Estimate:
        half = self.standard_error() * _t_quantile(self.occupied - 1) if self.occupied > 1 else math.nan
        return Estimate(self.value, self.value - half, self.value + half)

    def standard_error(self) -> float:
        """Of two blocks and more."""
        return math.sqrt(self.occupied / (self.occupied - 1) * float(self.errors @ self.errors))


class QualityComparison:
    """Compares policies' losses on one text with a reference's and a baseline's.

    Re-computation, the usual baseline, costs so much that it is known at a sample of tokens only; the reference (strict
    StreamingLLM) and the policies are known at every one. What hangs on the sample is therefore the difference between
    reference and baseline, which is the same for all policies; with l = policy, r = reference, b = baseline,

        mean(l - b) = mean_all(l - r) + mean_sample(r - b).

    Tables are (n, 2): position in the text, nats. A policy known at some tokens P only is estimated by
    mean_P(l - r). Methods raise ValueError where no token has both losses.
    """

    def __init__(
        self, reference: np.ndarray, baseline: np.ndarray | None = None, draws: int = 2000, seed: int = 0
    ) -> None:
        self._reference = reference
        self._block = _blocks(len(reference))
        self._to_baseline = None if baseline is None else -self._over_reference(baseline)
        self._draws = draws
        self._seed = seed

    def perplexity(self, losses: np.ndarray) -> Estimate:
        """Over all tokens of the reference, those that `losses` lacks included: exp(mean_all(r) + mean_P(l - r))."""
        of_reference = _mean(self._reference[:, 1], self._block, self._block[-1] + 1)
        return _exp((of_reference + self._over_reference(losses)).interval())

    def vs_strict(self, losses: np.ndarray) -> Estimate:
        """Percent by which perplexity exceeds the reference's."""
        return _percent(self._over_reference(losses).interval())

    def increase(self, losses: np.ndarray) -> Estimate:
        """Percent by which perplexity exceeds the baseline's; exactly 0 for the baseline itself."""
        if self._to_baseline is None:
            raise ValueError("there is no baseline to compare with")
        return _percent((self._over_reference(losses) + self._to_baseline).interval())

    def draws(self, tables: Sequence[np.ndarray]) -> np.ndarray:
        """(draws, tables): log ratios of perplexities to the reference's, as they might be in truth.

        In each draw a block of text weighs the same for all, so that differences between policies are paired. Their
        distribution is the multivariate t that has the intervals of `vs_strict`, column by column."""
        means = [self._over_reference(table) for table in tables]
        return _draws(means, int(self._block[-1]) + 1, self._draws, self._seed)

    def _over_reference(self, losses: np.ndarray) -> _Mean:
        differences, tokens = _paired(losses, self._reference)
        return _mean(differences, self._block[tokens], self._block[-1] + 1)


def check_finite(losses: np.ndarray, dtype: str) -> None:
    """Raises NonFiniteLossError at the first loss that is no number: typically float16 eager attention overflowing."""
    bad = np.flatnonzero(~np.isfinite(losses))
    if len(bad):
        raise NonFiniteLossError(
            f"loss of token {bad[0] + 1} is {losses[bad[0]]} in {dtype} ({len(bad)} of {len(losses)} are not finite); "
            f"use --dtype bfloat16 or float32"
        )


def perplexity(losses: np.ndarray, chunk: int | None = None) -> Estimate:
    """exp of the mean of `losses` (n,), nats of successive tokens; chunk: of so many each, where the text is in
    chunks."""
    blocks = _blocks(len(losses), chunk)
    return _exp(_mean(losses, blocks, blocks[-1] + 1).interval())


def paired_increase(losses: np.ndarray, baseline: np.ndarray, chunk: int | None = None) -> Estimate:
    """Percent by which perplexity exceeds the baseline's over the tokens that both (n, 2: position, nats) have. chunk:
    as of `perplexity`.

    Raises ValueError if they share none."""
    differences, _ = _paired(losses, baseline)
    blocks = _blocks(len(differences), chunk)
    return _percent(_mean(differences, blocks, blocks[-1] + 1).interval())


def median_interval(values: np.ndarray) -> Estimate:
    """The median with the distribution-free interval between order statistics that covers it with 95% or more.

    P(median below the k-th smallest of n) = sum_{i<k} C(n, i) / 2^n. Fewer than 6 values: the whole range; one has
    none.
    """
    ordered, n = np.sort(values), len(values)
    if n == 1:
        return Estimate(float(ordered[0]), math.nan, math.nan)
    below, k = 0.5**n, 0
    while below <= 0.025:
        k += 1
        below += math.comb(n, k) * 0.5**n
    edge = max(k - 1, 0)
    return Estimate(float(np.median(ordered)), float(ordered[edge]), float(ordered[n - 1 - edge]))


def mean_at(values: np.ndarray, positions: np.ndarray, n: int) -> Estimate:
    """The mean of `values` (k,), known at ascending positions of a text's n."""
    return _at(values, positions, n).interval()


def share_at(values: np.ndarray, positions: np.ndarray, n: int) -> Estimate:
    """The share of `values` (k,) that are true, known at ascending positions of a text's n. The interval is no narrower
    than Wilson's, of as many tokens that have nothing to do with one another: all of 64 are not all of the text."""
    of_blocks, k = mean_at(values.astype(float), positions, n), len(values)
    share, spread = of_blocks.value, _Z**2 / k
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    low, high = min(of_blocks.low, middle - half), max(of_blocks.high, middle + half)
    return Estimate(share, min(max(low, 0.0), share), max(min(high, 1.0), share))


def quantile_at(level: float, values: np.ndarray, positions: np.ndarray, n: int, name: str) -> dict[str, float]:
    """That quantile of `values` (k,), known at ascending positions of a text's n, as a part of a flat record: with the
    distribution-free interval between order statistics, by as many values as those would be, had they nothing to do
    with one another, that make the share above it as uncertain as blocks say. Without an interval where they are too
    few for one, or in one block: none of 300 is above the 99th percentile of what they come from in one case of 20."""
    ordered, k, value = np.sort(values), len(values), float(np.quantile(values, level))
    rare, above = 1 - level, _at((values > value).astype(float), positions, n)
    if above.occupied == 1:
        return {name: value}
    variance = above.standard_error() ** 2
    enough = k if variance <= rare * level / k else max(math.floor(rare * level / variance), 1)
    below = np.cumsum(_binomial(enough, rare))  # of so many values above the quantile or fewer: how probable
    fewest, most = np.searchsorted(below, 0.025, side="right"), np.searchsorted(below, 0.975) + 1
    if not fewest or most > enough:
        return {name: value}
    high, low = max(math.floor(fewest * k / enough), 1), min(math.ceil(most * k / enough), k)
    return Estimate(value, float(ordered[k - low]), float(ordered[k - high])).flat(name)


def mean_draws(tables: Sequence[np.ndarray], n: int, draws: int, seed: int = 0) -> np.ndarray:
    """(draws, tables): what the means of quantities may be in truth, paired as those of `QualityComparison.draws`.
    tables: (k, 2) each: position in a text of n tokens, value."""
    means = [_at(table[:, 1], table[:, 0].astype(int), n) for table in tables]
    return _draws(means, int(_blocks(n)[-1]) + 1, draws, seed)


def _draws(means: Sequence[_Mean], blocks: int, draws: int, seed: int) -> np.ndarray:
    count = min((mean.occupied for mean in means), default=1)
    random = np.random.default_rng(seed)
    weights = random.normal(size=(draws, blocks))
    if count > 1:
        weights *= np.sqrt(count / random.chisquare(count - 1, size=(draws, 1)))
    columns = [mean.value + weights @ mean.errors for mean in means]
    return np.stack(columns, axis=-1) if columns else np.empty((draws, 0))


def _binomial(n: int, p: float) -> np.ndarray:
    """(n + 1,): the probabilities of 0 .. n of n."""
    counts = np.arange(1, n + 1)
    logs = np.concatenate(([0.0], np.cumsum(np.log(n + 1 - counts) - np.log(counts))))
    return np.exp(logs + np.arange(n + 1) * math.log(p) + np.arange(n, -1, -1) * math.log1p(-p))


def _at(values: np.ndarray, positions: np.ndarray, n: int) -> _Mean:
    block = _blocks(n)
    return _mean(values, block[positions], block[-1] + 1)


def _paired(losses: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences at the shared tokens, and these tokens' rows in `other`."""
    _, own, theirs = np.intersect1d(losses[:, 0], other[:, 0], assume_unique=True, return_indices=True)
    if not len(own):
        raise ValueError("no token has both losses")
    return losses[own, 1] - other[theirs, 1], theirs


def _blocks(n: int, chunk: int | None = None) -> np.ndarray:
    """(n,): the number of the block that each of n successive tokens is in."""
    if chunk is not None:
        return np.arange(n) // chunk
    count = min(n, max(_FEWEST_BLOCKS, round(math.sqrt(n) / _BLOCK_FACTOR)))
    return np.arange(n) * count // n


def _mean(values: np.ndarray, block: np.ndarray, count: int) -> _Mean:
    mean = float(values.mean(dtype=np.float64))
    errors = np.bincount(block, values - mean, minlength=count) / len(values)
    return _Mean(mean, errors, len(np.unique(block)))


def _t_quantile(freedom: int) -> float:
    """97.5% of Student's t: Abramowitz & Stegun 26.7.5, whose error is below 0.02 from 3 degrees of freedom on."""
    if freedom in _SMALL_T:
        return _SMALL_T[freedom]
    z, v = _Z, freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4


def _exp(logarithm: Estimate) -> Estimate:
    """inf beyond what a float holds: two tokens of a broken policy can get there."""
    with np.errstate(over="ignore"):
        return Estimate(*(float(np.exp(x)) for x in (logarithm.value, logarithm.low, logarithm.high)))


def _percent(logarithm: Estimate) -> Estimate:
    with np.errstate(over="ignore"):
        return Estimate(*(100 * float(np.expm1(x)) for x in (logarithm.value, logarithm.low, logarithm.high)))
