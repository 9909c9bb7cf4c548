"""The effect of a prune on the losses after it: per-token losses beside a reference that does not forget, and the
spike.

Single losses are mostly text: some tokens are hard. So each is compared with the loss of the same token under vanilla
StreamingLLM (R = 1) with the same sinks and as many keys as the policy ever lets a query attend to, though no more than
the model was trained on. That reference sees, at every token, all that the policy sees, and never forgets at once: what
it pays less is the price of the prune. (Vanilla with the policy's own S + W would see, right after a prune, just what
the policy sees: no spike to find there.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from ..measuring.quality import Estimate
from ..policy import EvictionPolicy, evicted_before, peak_kv, prune_starts

if TYPE_CHECKING:
    import pandas as pd

FEWEST_PRUNES = 8
_MOST_POINTS = 64
_RESAMPLES = 1000


@dataclass(frozen=True)
class Spike:
    """The mean excess over the reference around a prune, in nats, and what stands out of it."""

    prunes: int
    """How many are averaged: those with whole surroundings."""
    before: int
    interval: int
    """Looked at are tokens -before .. interval-1 from a prune, 0 being the first whose query sees the cache pruned. The
    interval is the shortest between two prunes, and `before` a quarter of it."""
    offsets: np.ndarray
    curve: np.ndarray
    low: np.ndarray
    high: np.ndarray
    """(points) tokens since the prune, mean excess there, and its 95% band. Of more than 64 tokens, a point is the mean
    of neighbours."""
    level: Estimate
    """Mean excess of the `before` tokens before a prune. All that follows counts from there."""
    jump: Estimate
    """Excess of the first token after the prune."""
    peak: Estimate
    """The highest mean over `peak_tokens` tokens in a row. Where that is says one half of the prunes and how high it
    is the other, and the other way round: the highest of noisy values would always seem high."""
    peak_at: int
    """Tokens between the prune and those of the peak."""
    peak_tokens: int
    """An eighth of the interval."""
    area: Estimate
    """Sum over the interval: nats that a prune costs in all."""
    width: Estimate | None
    """Area over peak, in tokens; None if either may be zero."""


def reference_policy(policy: EvictionPolicy, n_queries: int, trained_length: int | None) -> EvictionPolicy:
    """Vanilla StreamingLLM that never has less in its cache than `policy`, within what the model was trained on; its
    positions are the policy's, so that prunes alone differ."""
    kept = peak_kv(policy, n_queries) - 1  # a query attends to its own key too
    if trained_length is not None:
        kept = min(kept, max(trained_length, policy.kept))
    return EvictionPolicy(n_sink=policy.n_sink, window_size=kept - policy.n_sink, positions=policy.positions)


def check_prunes(policy: EvictionPolicy, n_queries: int) -> None:
    """Raises UsageError where there is nothing to diagnose: too few prunes, or no tokens between them."""
    starts = prune_starts(policy, n_queries)
    if len(starts) < FEWEST_PRUNES + 2:
        raise UsageError(
            f"compress_every {policy.compress_every}: {len(starts)} prunes in {n_queries} tokens, at least "
            f"{FEWEST_PRUNES + 2} are needed; give a longer text, or lower --window-size or --compress-every (0 never "
            f"prunes, --max-drop 1 never ends)"
        )
    if min(np.diff(starts)) < 2:
        raise UsageError(
            f"compress_every {policy.compress_every}: prunes after every token, there is nothing between prunes to "
            f"compare; give --compress-every >= 2 or --cache-slack >= 1"
        )


def token_table(policy: EvictionPolicy, losses: np.ndarray, reference: np.ndarray) -> pd.DataFrame:
    """losses (n): element i is that of token i + 1, for both -> a row per token."""
    import pandas as pd

    n = len(losses)
    starts = prune_starts(policy, n)
    evicted = np.array(evicted_before(policy, n))
    queries = np.arange(n)
    newest = np.searchsorted(starts, queries, side="right")  # prunes that began so far
    since = queries - np.concatenate(([0], starts))[newest]
    return pd.DataFrame(
        {
            "token": queries + 1,
            "loss": losses,
            "reference_loss": reference,
            "excess": losses - reference,
            "evicted": evicted,
            "keys": queries + 1 - evicted,
            "prune": np.isin(queries, starts),
            "since_prune": pd.arrays.IntegerArray(since, newest == 0),
        }
    )


def find_spike(excess: np.ndarray, starts: list[int], seed: int = 0) -> Spike:
    """excess (n) in nats, by query; `starts` are queries, as of `prune_starts`. Intervals are 95% bootstrap ones over
    prunes."""
    interval = int(min(np.diff(starts)))
    before, run = max(interval // 4, 1), max(interval // 8, 1)
    whole = [start for start in starts if start >= before and start + interval <= len(excess)]
    windows = np.stack([excess[start - before : start + interval] for start in whole])
    halves = windows[::2], windows[1::2]
    generator = np.random.default_rng(seed)
    draws = np.stack(
        [np.stack([_resampled_mean(half, generator) for half in halves]) for _ in range(_RESAMPLES)]
    )  # (draws, 2, before + interval)
    found = np.stack([half.mean(axis=0) for half in halves])
    offsets = np.arange(-before, interval)
    low, high = np.quantile(_points(draws.mean(axis=1), before, interval), (0.025, 0.975), axis=0)
    level, jump, peak, area = (
        Estimate(float(value), *(float(x) for x in np.quantile(drawn, (0.025, 0.975))))
        for value, drawn in zip(_statistics(found, before, run), _statistics(draws, before, run), strict=True)
    )
    return Spike(
        prunes=len(windows),
        before=before,
        interval=interval,
        offsets=_points(offsets, before, interval),
        curve=_points(found.mean(axis=0), before, interval),
        low=low,
        high=high,
        level=level,
        jump=jump,
        peak=peak,
        peak_at=int(_running_means(found.mean(axis=0)[before:], run).argmax()),
        peak_tokens=run,
        area=area,
        width=_width(found, draws, before, run) if min(peak.low, area.low) > 0 else None,
    )


def _resampled_mean(windows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    count = len(windows)
    weights = np.bincount(generator.integers(count, size=count), minlength=count) / count
    return weights @ windows


def _points(curves: np.ndarray, before: int, interval: int) -> np.ndarray:
    """curves (..., before + interval) -> (..., points): means of neighbours on the same side of the prune."""
    step = -(-interval // _MOST_POINTS)
    first, last = before % step, before + interval - interval % step
    whole = curves[..., first:last]
    return whole.reshape(*whole.shape[:-1], -1, step).mean(axis=-1)


def _statistics(halves: np.ndarray, before: int, run: int) -> tuple[np.ndarray, ...]:
    """halves (..., 2, before + interval): mean curves of every other prune, and of the rest -> level, jump, peak (of
    `run` tokens) and area, each (...)."""
    level = halves[..., :before].mean(axis=-1)
    after = halves[..., before:] - level[..., None]
    means = _running_means(after, run)
    highest = means.argmax(axis=-1)[..., ::-1, None]  # of the other half
    peak = np.take_along_axis(means, highest, axis=-1).mean(axis=(-2, -1))
    return level.mean(axis=-1), after[..., 0].mean(axis=-1), peak, after.sum(axis=-1).mean(axis=-1)


def _running_means(curves: np.ndarray, run: int) -> np.ndarray:
    """(..., n) -> (..., n - run + 1): of each `run` neighbours."""
    return np.lib.stride_tricks.sliding_window_view(curves, run, axis=-1).mean(axis=-1)


def _width(found: np.ndarray, draws: np.ndarray, before: int, run: int) -> Estimate:
    _, _, peak, area = _statistics(found, before, run)
    _, _, peaks, areas = _statistics(draws, before, run)
    low, high = np.quantile(areas / peaks, (0.025, 0.975))
    return Estimate(float(area / peak), float(low), float(high))


def in_words(spike: Spike, largest_cache: int, trained_length: int | None) -> str:
    """The findings, in a sentence or two."""
    outgrown = trained_length is not None and largest_cache > trained_length + 1
    cause = f" The cache grows to {largest_cache} keys, the model was trained on {trained_length}." if outgrown else ""
    if spike.area.high < 0:
        return f"No spike but a relief: a prune saves {-spike.area.value:.2f} nats until the next one.{cause}"
    if max(spike.peak.low, spike.area.low) > 0:
        where = f"{spike.peak_at} tokens after it" if spike.peak_at else "right after it"
        return (
            f"A spike: a prune costs {spike.area.value:.2f} nats until the next one; at its highest, {where}, the loss "
            f"is {spike.peak.value:.3f} nats above where it was before.{cause}"
        )
    return (
        f"No spike to be told from noise: at its highest the loss after a prune is {spike.peak.value:.3f} nats above "
        f"where it was before it [{spike.peak.low:.3f}, {spike.peak.high:.3f}].{cause}"
    )
